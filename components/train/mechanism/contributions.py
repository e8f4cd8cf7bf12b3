"""What each privacy unit of a micro-batch adds to the sums: norms, clipping, and the weighted products that add it.

A unit's gradient is that of its example, or of a user the sum (or mean) of those of its examples. Norms come from what
the one backward pass left, exactly: of the dense layers by `norm_rules`, of the tables after equal rows have met, over
all features that share a table and all examples of the unit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lazydp.components.shared.errors import InputError
from lazydp.components.train.device.placement import CPU, moved
from lazydp.components.train.mechanism.capture import Capture, without
from lazydp.components.train.mechanism.clip import clip_coefficients, rounded
from lazydp.components.train.mechanism.parameters import GROUPS, Group, GroupNorms, PrivacyParameters
from lazydp.components.train.mechanism.units import EqualUnits, Units
from lazydp.components.train.tables.embedding_tables import TableGradient
from lazydp.components.train.tables.lookups import Lookups
from lazydp.kernels import ops


@dataclass(frozen=True, slots=True)
class Contributions:
    """The clipped contributions of one micro-batch.

    Attributes:
        units: U units of B examples.
        sq_norms: squared norm of each unit's gradient by group, before clipping, float64 [U].
        coefficients: what each unit's gradient is multiplied by, by group, float64 [U]; zero for a unit whose gradient
            is not finite.
        per_example: what that means for each example's gradient: float32 [B] by group, divided by b.
    """

    units: Units
    sq_norms: Mapping[Group, Tensor]
    coefficients: Mapping[Group, Tensor]
    per_example: Mapping[Group, Tensor]

    @classmethod
    def of(
        cls,
        of_dense: Tensor,
        tables: Mapping[str, tuple[Lookups, Tensor]],
        units: Units,
        privacy: PrivacyParameters,
    ) -> Contributions:
        """Norms and coefficients, once the backward pass is done.

        Args:
            of_dense: squared norm of each unit's gradient over the dense layers, [U], where the tables live.
            tables: by table, all its lookups and the gradient of each bag [F * B, D].
            units: of the micro-batch.
            privacy: norms, divisor, and what is clipped of a user.
        """
        weights = _example_weights(units, privacy, of_dense.device)
        of_tables = sq_norms_of_tables(list(tables.values()), units) if tables else torch.zeros_like(of_dense)
        sums: dict[Group, Tensor] = {"dense": of_dense, "embeddings": of_tables}
        sq_norms = sums if weights is None else {group: total * weights.square() for group, total in sums.items()}
        coefficients = _coefficients(sq_norms, privacy)
        scale = 1.0 / privacy.expected_batch_size
        per_example = {
            group: units.per_example(rounded(factor * scale if weights is None else factor * weights * scale))
            for group, factor in coefficients.items()
        }
        return cls(units, sq_norms, coefficients, per_example)

    def add(self, capture: Capture, tables: Mapping[str, tuple[Lookups, Tensor]]) -> dict[str, TableGradient]:
        """Add the clipped contributions to the dense gradients, and give what the tables are to add."""
        finite = torch.isfinite(self.sq_norms["dense"]) & torch.isfinite(self.sq_norms["embeddings"])
        sent = {name: gradient for name, (_, gradient) in tables.items()}
        # To know whether there is anything to drop the host would have to wait for a GPU; dropping nothing is no harm.
        if not finite.is_cpu or not bool(finite.all()):
            dropped = self.units.per_example(~finite)
            capture.drop(dropped)
            sent = {
                name: without(gradient, dropped.repeat(tables[name][0].bags_per_example))
                for name, gradient in sent.items()
            }
            tables = {name: (_with_finite_weights(lookups), gradient) for name, (lookups, gradient) in tables.items()}
        capture.add_weighted(self.per_example["dense"])
        return {
            name: TableGradient(tables[name][0], gradient, self.per_example["embeddings"])
            for name, gradient in sent.items()
        }


def objective(losses: Tensor, units: Units, privacy: PrivacyParameters) -> Tensor:
    """What a step without clipping is the gradient of, from the loss of each example, [B]."""
    weights = _example_weights(units, privacy, losses.device)
    scale = (1.0 if weights is None else units.per_example(weights)) / privacy.expected_batch_size
    return (losses * scale).sum()


def units_of(size: int, user_sizes: Tensor | None, privacy: PrivacyParameters) -> Units:
    """The units of a micro-batch of `size` examples.

    Args:
        size: B.
        user_sizes: examples of each user, int64 [U], where users are sampled.
        privacy: says whether they are.

    Raises:
        InputError: sizes where examples are clipped, none where users are, or sizes that don't add up to B.
    """
    if (user_sizes is None) != (privacy.user_gradient is None):
        found = "no user_sizes" if user_sizes is None else "user_sizes"
        raise InputError(f"user_gradient is {privacy.user_gradient}, and the examples came with {found}")
    units = Units.examples(size) if user_sizes is None else Units(user_sizes)
    if units.num_examples != size:
        raise InputError(f"user_sizes add up to {units.num_examples}, in a micro-batch of {size} examples")
    return units


def sq_norms_of_tables(tables: Sequence[tuple[Lookups, Tensor]], units: Units) -> Tensor:
    """Squared norm of what each unit sends to all `tables`, float64 [U]: equal rows of a unit add up first.

    Args:
        tables: one at least: F bags of each example, and the gradient of each bag, [F * B, D].
        units: of the examples.
    """
    if units.single:
        return _sq_norms([(lookups, _by_bag(lookups, gradient, units.count)) for lookups, gradient in tables])
    by_run = [_ordered_by_run(lookups, gradient, units) for lookups, gradient in tables]
    return torch.cat([_sq_norms([_of_run(*table, run) for table in by_run]) for run in units.runs()])


def _sq_norms(tables: Sequence[tuple[Lookups, Tensor]]) -> Tensor:
    lookups = [of_table for of_table, _ in tables]
    return ops.foreach_bag_sq_norms(
        [of_table.indices for of_table in lookups],
        [of_table.offsets for of_table in lookups],
        [by_bag for _, by_bag in tables],
        [of_table.weights for of_table in lookups],
    )


def _by_bag(lookups: Lookups, gradient: Tensor, units: int) -> Tensor:
    return gradient.view(lookups.bags_per_example, units, gradient.shape[1])


def _ordered_by_run(lookups: Lookups, gradient: Tensor, units: Units) -> tuple[Lookups, Tensor]:
    """The bags of each run side by side, position by position; the lookups on the host."""
    order = units.bags_by_run(lookups.bags_per_example)
    taken = _on_host(lookups).take(order, bags_per_example=lookups.bags_per_example)
    return taken, gradient[moved([order], gradient.device)[0]]


def _on_host(lookups: Lookups) -> Lookups:
    """The lookups where the lengths of bags can be read; the host waits for those of a model of one's own on a GPU."""
    if lookups.on_host is not None:
        return lookups.on_host
    indices, offsets, *weights = moved(lookups.tensors(), CPU)
    return Lookups(indices, offsets, weights[0] if weights else None, lookups.bags_per_example)


def _of_run(lookups: Lookups, gradient: Tensor, run: EqualUnits) -> tuple[Lookups, Tensor]:
    """One run of g users of n examples, as g examples with n F bags, which is what such a user is to the kernel."""
    width = lookups.bags_per_example
    first, end = run.first * width, (run.first + run.units * run.size) * width
    offsets = lookups.offsets[first : end + 1]
    start, stop = int(offsets[0]), int(offsets[-1])
    of_run = Lookups(
        lookups.indices[start:stop],
        offsets - start,
        None if lookups.weights is None else lookups.weights[start:stop],
        width * run.size,
    )
    indices, offsets, *weights = moved(of_run.tensors(), gradient.device)
    sent = Lookups(indices, offsets, weights[0] if weights else None, width * run.size)
    return sent, _by_bag(sent, gradient[first:end], run.units)


def _with_finite_weights(lookups: Lookups) -> Lookups:
    """A lookup whose weight is not finite belongs to an example that is dropped; zero times the weight would be NaN."""
    if lookups.weights is None:
        return lookups
    return replace(lookups, weights=lookups.weights.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0))


def _example_weights(units: Units, privacy: PrivacyParameters, device: torch.device) -> Tensor | None:
    """What the gradients of a unit's examples are multiplied by to give the unit's, [U]; None where it is 1."""
    if privacy.user_gradient != "mean":
        return None
    return moved([1.0 / units.sizes.to(torch.float64)], device)[0]


def _coefficients(sq_norms: Mapping[Group, Tensor], privacy: PrivacyParameters) -> dict[Group, Tensor]:
    norms = privacy.max_grad_norm
    total = sq_norms["dense"] + sq_norms["embeddings"]
    if not isinstance(norms, GroupNorms):
        joint = clip_coefficients(total, max_grad_norm=norms)
        return dict.fromkeys(GROUPS, joint)
    # A unit that is not finite in one group is not used in the other.
    not_finite = ~torch.isfinite(total)
    return {
        group: clip_coefficients(sq_norms[group], max_grad_norm=norms.of(group)).masked_fill(not_finite, 0.0)
        for group in GROUPS
    }
