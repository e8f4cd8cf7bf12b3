"""A `DataLoader` whose batches are true Poisson samples: the batch of step t, for the step that is done next.

The caller's loader says what an example is (its dataset), how examples become a batch (its collate function), and how
they are fetched (workers, pinned memory). It no longer says which examples: its shuffling and its batch size, which
the accounting knows nothing of, are not used.

**One step for each draw.** The batch of step t is a pure function of the key and t. Asked for the next batch, the
loader refuses to go on unless the step of the batch before was done: batches that are left out, because they are empty
or for any other reason, would give the others another distribution than the one that is accounted for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from lazydp.components.shared.errors import BudgetExceededError, InputError
from lazydp.components.train.data.sampler import PoissonSampler

# What is taken over of the caller's loader: how examples are fetched.
_KEPT = (
    "num_workers",
    "pin_memory",
    "timeout",
    "worker_init_fn",
    "multiprocessing_context",
    "prefetch_factor",
    "persistent_workers",
)


class PoissonLoader:
    """The Poisson batches of a training of `steps` steps, in passes of `steps_per_pass`.

    `len(loader)` is the number of batches of a pass. An empty draw gives a batch of the same structure without
    examples; it is a step like every other.

    Args:
        data_loader: the caller's; `check_loader` accepted it.
        empty: what an empty draw gives, see `empty_batch`.
        sampler: draws the members of a step.
        steps: T.
        steps_per_pass: batches that one `for` loop gets at most.
        steps_done: how many steps were done.
    """

    def __init__(
        self,
        data_loader: DataLoader[Any],
        *,
        empty: Any,
        sampler: PoissonSampler,
        steps: int,
        steps_per_pass: int,
        steps_done: Callable[[], int],
    ) -> None:
        self.dataset = data_loader.dataset
        self.sampler = sampler
        self.steps = steps
        self._steps_per_pass = steps_per_pass
        self._steps_done = steps_done
        self._draws = _Draws(sampler)
        self._drawn: int | None = None
        options = {name: getattr(data_loader, name) for name in _KEPT}
        self._batches: DataLoader[Any] = DataLoader(
            self.dataset,
            batch_sampler=self._draws,
            collate_fn=_Collate(data_loader.collate_fn, empty),
            **options,
        )

    def __len__(self) -> int:
        return self._steps_per_pass

    def __iter__(self) -> Iterator[Any]:
        """The batches of the next `len(loader)` steps, or of as many as are left.

        Raises:
            BudgetExceededError: all steps were done.
            InputError: the step of the batch before was not done.
        """
        first = self._steps_done() + 1
        if first > self.steps:
            raise BudgetExceededError(
                f"all {self.steps} steps that the noise was calibrated for are done, and another pass would spend more "
                "than was stated: use the model, or train anew with more epochs or steps"
            )
        self._draws.plan(range(first, min(first + self._steps_per_pass, self.steps + 1)))
        try:
            for step, batch in enumerate(self._batches, first):
                self._drawn = step
                yield batch
                if self._steps_done() != step:
                    raise InputError(
                        f"the batch of step {step} was drawn, and {self._steps_done()} steps were done: do one "
                        "trainer.step for each batch, also for an empty one; a batch that is left out gives the others "
                        "another distribution than the one that is accounted for"
                    )
        finally:
            self._drawn = None

    def size_of(self, step: int) -> int:
        """Number of examples in the batch that was drawn for `step`.

        Raises:
            InputError: the latest batch is of no such step: none was taken from the loader, or it was used already.
        """
        if self._drawn != step:
            raise InputError(
                f"step {step} has no batch: take one batch of the loader for each trainer.step, inside its `for` loop"
            )
        return self._draws.sizes[step]


class _Draws:
    """A batch sampler: the members of the planned steps, in their order."""

    def __init__(self, sampler: PoissonSampler) -> None:
        self._sampler = sampler
        self._planned = range(0)
        self.sizes: dict[int, int] = {}

    def plan(self, steps: range) -> None:
        """Draw these steps when next asked."""
        self._planned = steps

    def __iter__(self) -> Iterator[list[int]]:
        self.sizes.clear()
        for step in self._planned:
            members = self._sampler.members(step).tolist()
            self.sizes[step] = len(members)
            yield members


class _Collate:
    """The caller's collate function, and what an empty draw gives instead; pickled to workers."""

    def __init__(self, collate: Callable[[list[Any]], Any], empty: Any) -> None:
        self._collate = collate
        self._empty = empty

    def __call__(self, examples: list[Any]) -> Any:
        return self._collate(examples) if examples else self._empty


def empty_batch(data_loader: DataLoader[Any]) -> Any:
    """A batch of the loader's structure without examples. It is made of one example, of which only shapes are left.

    Raises:
        InputError: what the collate function gives cannot be emptied.
    """
    return without_examples(data_loader.collate_fn([data_loader.dataset[0]]))


def without_examples(batch: Any) -> Any:
    """A batch of the same structure with no examples.

    Raises:
        InputError: a part whose first extent may not be that of the examples.
    """
    if isinstance(batch, Tensor) and batch.dim():
        return batch[:0]
    if isinstance(batch, Mapping):
        return type(batch)({name: without_examples(part) for name, part in batch.items()})  # type: ignore[call-arg]
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*map(without_examples, batch))
    if isinstance(batch, list | tuple):
        # Strings and numbers are collated into lists of one an example.
        return (
            type(batch)() if all(isinstance(p, _OF_ONE) for p in batch) else type(batch)(map(without_examples, batch))
        )
    raise InputError(
        f"an empty Poisson draw needs a batch without examples, and a {type(batch).__name__} of collate_fn cannot be "
        "emptied: let collate_fn give tensors whose first extent is that of the examples, or tuples, lists and dicts "
        "of such tensors"
    )


_OF_ONE = (str, bytes, int, float)


def check_loader(data_loader: DataLoader[Any]) -> None:
    """Refuse a loader whose examples cannot be drawn independently.

    Raises:
        InputError: says why, and what to give instead.
    """
    dataset = data_loader.dataset
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise InputError(
            "data_loader.dataset is iterable: a Poisson sample takes each example independently, so examples must be "
            "found by their number; give a map-style dataset (__getitem__ and __len__)"
        )
    if data_loader.batch_sampler is None:
        raise InputError(
            "data_loader was made with batch_size=None, so its dataset gives whole batches: give a dataset of examples "
            "and a batch_size"
        )
    if type(data_loader.batch_sampler) is not BatchSampler:
        raise InputError(
            "data_loader has a batch_sampler of its own: batches are drawn by Poisson sampling, and the accounting "
            "holds for no others; make the loader with batch_size, or draw yourself around make_private"
        )
    sampler = data_loader.sampler
    weighted = isinstance(sampler, RandomSampler) and (
        sampler.replacement or sampler.num_samples != len(sampler.data_source)
    )
    if type(sampler) not in (SequentialSampler, RandomSampler) or weighted:
        raise InputError(
            f"data_loader has the sampler {type(sampler).__name__}: each example is drawn with the same probability, "
            "and the accounting holds for no other sampler; leave the sampler out (a subset: torch.utils.data.Subset)"
        )
    if not len(dataset):
        raise InputError("data_loader.dataset has no examples")
