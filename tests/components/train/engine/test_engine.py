"""The step: what it computes, what no example can exceed, and what it does at the edges."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lazydp.components.features.batch import Bags
from lazydp.components.models.build import build_model
from lazydp.components.models.config import DlrmConfig, TwoTowerConfig
from lazydp.components.models.recommender import ModelInputs, Recommender, initial_tables, pool
from lazydp.components.shared.errors import FormatError, InputError, NonFiniteError, PendingNoiseError
from lazydp.components.train.data.examples import Examples
from lazydp.components.train.engine.dense import DenseOptimizer
from lazydp.components.train.engine.step import Engine
from lazydp.components.train.engine.timer import StepTimer
from lazydp.components.train.mechanism.parameters import PrivacyParameters
from lazydp.components.train.mechanism.unit_order import ROUNDING
from lazydp.components.train.tables import schedules
from lazydp.components.train.tables.skip_ahead import EmbeddingSgd
from lazydp.kernels.noise_key import NoiseKey

pytestmark = pytest.mark.usefixtures("one_thread")

CONFIGS: dict[str, DlrmConfig | TwoTowerConfig] = {
    "dlrm": DlrmConfig(embedding_dim=4, bottom_widths=(5,), top_widths=(6,), embedding_init_std=0.5),
    "dlrm softmax": DlrmConfig(embedding_dim=4, bottom_widths=(), top_widths=(6,), loss="sampled_softmax"),
    "two tower": TwoTowerConfig(embedding_dim=4, user_widths=(6,), item_widths=(5,), embedding_init_std=0.5),
    "two tower bce": TwoTowerConfig(embedding_dim=4, loss="bce", temperature=0.5, embedding_init_std=0.5),
}
SGD = DenseOptimizer.named("sgd", learning_rate=schedules.constant(1.0))


def engine_of(
    model: Recommender,
    *,
    mode: Any = "lazydp",
    noise_multiplier: float = 0.0,
    max_grad_norm: float = 1.0,
    expected_batch_size: float = 4.0,
    embeddings: EmbeddingSgd | None = None,
    dense: DenseOptimizer = SGD,
    **more: Any,
) -> Engine:
    return Engine(
        model,
        mode=mode,
        privacy=PrivacyParameters(
            noise_multiplier=noise_multiplier, max_grad_norm=max_grad_norm, expected_batch_size=expected_batch_size
        ),
        embeddings=embeddings or EmbeddingSgd(schedules.constant(1.0)),
        dense=dense,
        key=NoiseKey.for_tests(0),
        **more,
    )


def parameters_of(engine: Engine) -> dict[str, Tensor]:
    """Every dense parameter and every table, copied."""
    dense = {f"dense {name}": p.detach().clone() for name, p in engine.model.named_parameters()}
    return dense | {f"table {name}": weight.clone() for name, weight in engine.tables.weights().items()}


def sent_by(engine: Engine, examples: Examples | list[Examples]) -> dict[str, Tensor]:
    """What one step at rate 1 took off every parameter, times b: the clipped sum, and the noise."""
    engine.flush()
    before = parameters_of(engine)
    engine.step(examples)
    engine.flush()
    after = parameters_of(engine)
    b = engine.privacy.expected_batch_size
    return {name: (before[name].double() - after[name].double()) * b for name in before}


def norm(parts: dict[str, Tensor]) -> float:
    return math.sqrt(sum(float(part.double().square().sum()) for part in parts.values()))


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor], *, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(value.float(), expected[name].float(), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", CONFIGS)
@given(
    size=st.integers(1, 6),
    negatives=st.integers(0, 5),
    pooling=st.sampled_from(["sum", "mean"]),
    candidates=st.booleans(),
    max_grad_norm=st.sampled_from([0.05, 1.0, 100.0]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=10, deadline=None)
def test_one_pass_equals_per_example_gradients_of_torch_func(
    *,
    world: Any,
    oracle: Any,
    norms_of: Any,
    name: str,
    size: int,
    negatives: int,
    pooling: str,
    candidates: bool,
    max_grad_norm: float,
    seed: int,
) -> None:
    config = CONFIGS[name]
    made = world(pooling=pooling, candidates=candidates or config.kind == "two_tower")  # type: ignore[attr-defined]
    model = build_model(made.layout, config)
    examples = made.examples(size, seed=seed, num_negatives=negatives)
    gradients = oracle(model, initial_tables(model), examples)
    # What is left for rounding takes its part of every clipped example.
    coefficients = (max_grad_norm / (1.0 + ROUNDING) / norms_of(gradients)).clamp(max=1.0).float()
    expected = {
        f"{kind} {key}": torch.einsum("b,b...->...", coefficients, value)
        for kind, group in zip(("dense", "table"), gradients, strict=True)
        for key, value in group.items()
    }
    engine = engine_of(model, max_grad_norm=max_grad_norm)
    assert_all_close(sent_by(engine, examples), expected, tolerance=2e-4 * min(max_grad_norm, 1.0) + 2e-6)


@pytest.mark.parametrize("name", CONFIGS)
@given(
    pooling=st.sampled_from(["sum", "mean"]),
    longest=st.integers(0, 40),
    scale=st.sampled_from([1.0, 1e3, 1e6]),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=12, deadline=None)
def test_no_example_contributes_more_than_the_norm_bound(
    *, world: Any, name: str, pooling: str, longest: int, scale: float, seed: int
) -> None:
    """Bags of up to 40 lookups over 10 rows: repeated ids, the trap that ghost clipping in Opacus 1.6.0 falls into."""
    made = world(pooling=pooling, longest_bag=longest)
    model = build_model(made.layout, CONFIGS[name])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_() if scale == 1e6 else parameter.mul_(min(scale, 10.0))
    examples = made.examples(1, seed=seed)
    examples = replace(examples, dense=examples.dense * scale, item_dense=examples.item_dense * scale)
    tables = {key: torch.zeros_like(weight) for key, weight in initial_tables(model).items()}
    if scale != 1e6:
        tables = {key: weight * min(scale, 10.0) for key, weight in initial_tables(model).items()}
    # Zero weights at the largest scale keep the difference of weights free of rounding.
    sent = sent_by(engine_of(model, max_grad_norm=0.5, expected_batch_size=1.0, tables=tables), examples)
    assert norm(sent) <= 0.5 * (1 + (1e-6 if scale == 1e6 else 1e-4))


def test_an_id_repeated_in_a_bag_is_coalesced_before_the_norm(world: Any) -> None:
    made = world()
    model = build_model(replace(made.layout, candidate=()), CONFIGS["dlrm"].model_copy(update={"loss": "bce"}))
    repeated = Bags(torch.tensor([3, 3, 3, 3]), torch.tensor([0, 4]))
    examples = replace(made.examples(1, seed=0), num_candidates=1, item_dense=torch.zeros(1, 1, 0), candidate_bags={})
    examples = replace(examples, bags={**examples.bags, "history": repeated})
    layout = replace(made.layout, candidate=(), num_item_dense=0)
    features = tuple(replace(feature, pooling="sum") for feature in layout.example)
    model = build_model(replace(layout, example=features), CONFIGS["dlrm"])
    sent = sent_by(engine_of(model, max_grad_norm=1e-3), examples)
    assert norm(sent) == pytest.approx(1e-3, rel=1e-2)


@pytest.mark.parametrize("name", CONFIGS)
def test_neighbouring_batches_differ_by_at_most_the_norm_bound(world: Any, name: str) -> None:
    """Record and replay: the same real steps, noise included, with and without one example."""
    made = world()
    largest = 0.0
    for seed in range(4):
        results = []
        for leave_out in (False, True):
            engine = engine_of(
                build_model(made.layout, CONFIGS[name]),
                noise_multiplier=0.1,
                max_grad_norm=0.7,
                noise="ones",
            )
            for step in range(3):
                engine.step(made.examples(5, seed=100 * seed + step))
            first = made.examples(4, seed=seed)
            second = replace(made.examples(1, seed=50 + seed), labels=torch.ones(1))
            sent = sent_by(engine, [first] if leave_out else [first, second])
            results.append(sent)
            assert engine.steps_done == 4
            assert engine.pending() == 0
        difference = {key: results[0][key] - results[1][key] for key in results[0]}
        assert norm(difference) <= 0.7 * (1 + 1e-4)
        largest = max(largest, norm(difference))
    assert largest > 0.01  # the example left out did count


@pytest.mark.parametrize("name", CONFIGS)
def test_without_noise_and_clipping_private_modes_are_sgd(world: Any, name: str) -> None:
    made = world()
    runs = {}
    for mode in ("sgd", "dpsgd", "lazydp"):
        engine = engine_of(
            build_model(made.layout, CONFIGS[name]),
            mode=mode,
            max_grad_norm=math.inf,
            embeddings=EmbeddingSgd(schedules.warmup_cosine(0.5, steps=8), momentum=0.5, weight_decay=0.01),
            dense=DenseOptimizer.named("sgd", learning_rate=schedules.constant(0.1), momentum=0.9),
        )
        for step in range(6):
            engine.step(made.examples(4, seed=step))
        engine.flush()
        runs[mode] = parameters_of(engine)
    assert_all_close(runs["dpsgd"], runs["sgd"], tolerance=2e-5)
    assert_all_close(runs["lazydp"], runs["sgd"], tolerance=2e-5)


class PlainModel(nn.Module):
    """The same model as anyone would write it: tables as parameters, autograd, torch.optim."""

    def __init__(self, model: Recommender) -> None:
        super().__init__()
        self.dense = model
        self.tables = nn.ParameterDict({name: nn.Parameter(w) for name, w in initial_tables(model).items()})

    def mean_loss(self, examples: Examples, expected_batch_size: float) -> Tensor:
        layout = self.dense.layout
        candidate = pool(layout.candidate, dict(self.tables.items()), examples.candidate_bags)
        inputs = ModelInputs(
            example=pool(layout.example, dict(self.tables.items()), examples.bags),
            candidate={
                name: rows.view(examples.num_candidates, examples.size, -1).transpose(0, 1)
                for name, rows in candidate.items()
            },
            dense=examples.dense,
            item_dense=examples.item_dense,
        )
        return self.dense.losses(self.dense(inputs), examples.labels).sum() / expected_batch_size


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(("momentum", "decay"), [(0.0, 0.0), (0.0, 0.05), (0.9, 0.0), (0.9, 0.05)])
def test_sgd_mode_is_plain_torch(world: Any, name: str, momentum: float, decay: float) -> None:
    made = world()
    rate = schedules.warmup_cosine(0.3, steps=10, warmup_steps=2)
    plain = PlainModel(build_model(made.layout, CONFIGS[name]))
    optimizer = torch.optim.SGD(
        [  # type: ignore[arg-type]
            {"params": plain.tables.parameters(), "momentum": momentum, "weight_decay": decay},
            {"params": plain.dense.parameters()},
        ],
        lr=0.1,
    )
    engine = engine_of(
        build_model(made.layout, CONFIGS[name]),
        mode="sgd",
        embeddings=EmbeddingSgd(rate, momentum, decay),
        dense=DenseOptimizer.named("sgd", learning_rate=rate),
    )
    for step in range(8):
        examples = made.examples(4, seed=step)
        for group in optimizer.param_groups:
            group["lr"] = rate(step + 1)
        optimizer.zero_grad(set_to_none=False)
        plain.mean_loss(examples, 4.0).backward()
        for parameter in plain.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        optimizer.step()
        engine.step(examples)
    engine.flush()
    expected = {f"dense {key}": p.detach() for key, p in plain.dense.named_parameters()}
    expected |= {f"table {key}": p.detach() for key, p in plain.tables.items()}
    assert_all_close(parameters_of(engine), expected, tolerance=2e-5)


@given(sizes=st.lists(st.integers(0, 4), min_size=1, max_size=4), noise=st.sampled_from(["gaussian", "ones"]))
@settings(max_examples=25, deadline=None)
def test_micro_batches_sum_to_the_same_step(world: Any, sizes: list[int], noise: Any) -> None:
    made = world()
    whole = made.batch(sum(sizes), seed=5)
    generator = torch.Generator().manual_seed(0)
    negatives = torch.randint(1, 10, (sum(sizes), 3), generator=generator)
    results = []
    for parts in ([sum(sizes)], sizes):
        engine = engine_of(
            build_model(made.layout, CONFIGS["two tower"]),
            noise_multiplier=0.5,
            max_grad_norm=0.3,
            noise=noise,
        )
        engine.step(made.examples(3, seed=1))
        rows = torch.arange(sum(sizes)).split(parts)
        engine.step([Examples.of(whole.take(r), negatives=negatives[r], items=made.items()) for r in rows])
        engine.flush()
        results.append(parameters_of(engine))
    assert_all_close(results[0], results[1], tolerance=1e-5)


@pytest.mark.parametrize("mode", ["lazydp", "dpsgd"])
def test_an_empty_batch_is_noise_alone_and_counts(world: Any, mode: Any) -> None:
    made = world()
    engine = engine_of(build_model(made.layout, CONFIGS["dlrm"]), mode=mode, noise_multiplier=2.0, noise="ones")
    for empty in ([], made.examples(0, seed=0)):  # type: ignore[var-annotated]
        sent = sent_by(engine, empty)
        assert all(torch.allclose(part, torch.full_like(part, 2.0), atol=1e-5) for part in sent.values())
    assert engine.steps_done == 2


def test_eager_noise_is_added_to_every_row_at_every_step(world: Any) -> None:
    made = world()
    engine = engine_of(build_model(made.layout, CONFIGS["dlrm"]), mode="dpsgd", noise_multiplier=2.0, noise="ones")
    b = engine.privacy.expected_batch_size
    for _ in range(5):
        before = parameters_of(engine)
        engine.step([])
        # Nothing flushes here: what reads the tables next finds the noise of this step in every row.
        assert engine.pending() == 0
        for name, after in parameters_of(engine).items():
            torch.testing.assert_close((before[name] - after) * b, torch.full_like(after, 2.0), rtol=0, atol=1e-5)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_non_finite_example_contributes_zero_and_is_counted(world: Any, name: str, bad: float) -> None:
    made = world()
    examples = made.examples(4, seed=2)
    dense = examples.dense.clone()
    dense[1] = bad
    with_bad = sent_by(engine_of(build_model(made.layout, CONFIGS[name])), replace(examples, dense=dense))
    engine = engine_of(build_model(made.layout, CONFIGS[name]))
    report = engine.step(replace(examples, dense=dense))
    assert bool(torch.isfinite(dense[0]).all())
    assert report.non_finite in ((1,) if not math.isfinite(bad) else (0, 1))
    assert all(bool(torch.isfinite(part).all()) for part in with_bad.values())
    assert norm(with_bad) <= 4.0
    if report.non_finite:
        rows = torch.tensor([0, 2, 3])
        negatives = torch.randint(1, 10, (4, 3), generator=torch.Generator().manual_seed(2 + 1_000_000))
        rest = Examples.of(made.batch(4, seed=2).take(rows), negatives=negatives[rows], items=made.items())
        without = sent_by(engine_of(build_model(made.layout, CONFIGS[name])), rest)
        assert_all_close(with_bad, without, tolerance=1e-5)


def test_the_report_counts_what_happened(world: Any) -> None:
    made = world()
    engine = engine_of(build_model(made.layout, CONFIGS["dlrm"]), max_grad_norm=1e-3)
    report = engine.step(made.examples(4, seed=0))
    assert (report.step, report.size, report.clipped, report.non_finite) == (1, 4, 1.0, 0)
    assert report.loss > 0
    assert report.mean_norm > 1e-3


def test_pending_rows_do_not_leave_training(world: Any) -> None:
    made = world()
    engine = engine_of(build_model(made.layout, CONFIGS["dlrm"]), noise_multiplier=1.0)
    assert engine.pending() == 0
    engine.step(made.examples(4, seed=0))
    assert engine.pending() == 6 + 10 + 4
    with pytest.raises(PendingNoiseError, match="20 rows still have pending noise at step 1"):
        engine.table_weights()
    engine.flush()
    assert engine.pending() == 0
    assert engine.table_weights().keys() == {"user", "item", "genre"}


def test_weights_that_are_not_finite_do_not_leave_training(world: Any) -> None:
    made = world()
    engine = engine_of(build_model(made.layout, CONFIGS["dlrm"]))
    engine.tables.weights()["item"][3, 1] = math.nan
    with pytest.raises(NonFiniteError, match="'item'"):
        engine.table_weights()
    engine = engine_of(build_model(made.layout, CONFIGS["dlrm"]))
    with torch.no_grad():
        next(engine.model.parameters())[0] = math.inf
    with pytest.raises(NonFiniteError, match=r"bottom.0.weight"):
        engine.table_weights()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("mode", ["lazydp", "dpsgd", "sgd"])
def test_a_resumed_engine_ends_in_the_same_bits(world: Any, mode: Any, momentum: float) -> None:
    made = world()

    def fresh() -> Engine:
        return engine_of(
            build_model(made.layout, CONFIGS["two tower"]),
            mode=mode,
            noise_multiplier=0.5,
            embeddings=EmbeddingSgd(schedules.warmup_cosine(0.3, steps=12), momentum, 0.01),
            dense=DenseOptimizer.named("adam", learning_rate=schedules.warmup_cosine(0.01, steps=12)),
        )

    undisturbed, killed, resumed = fresh(), fresh(), fresh()
    for step in range(10):
        undisturbed.step(made.examples(4, seed=step))
    for step in range(5):
        killed.step(made.examples(4, seed=step))
    resumed.load_state_dict(killed.state_dict())
    for step in range(5, 10):
        resumed.step(made.examples(4, seed=step))
    for engine in (undisturbed, resumed):
        engine.flush()
    expected, found = parameters_of(undisturbed), parameters_of(resumed)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


def test_a_state_of_another_run_is_refused(world: Any) -> None:
    made = world()
    state = engine_of(build_model(made.layout, CONFIGS["two tower"])).state_dict()
    with pytest.raises(FormatError, match="mode 'lazydp'"):
        engine_of(build_model(made.layout, CONFIGS["two tower"]), mode="sgd").load_state_dict(state)
    with pytest.raises(FormatError, match="another model"):
        engine_of(build_model(made.layout, CONFIGS["dlrm"])).load_state_dict(state)
    other = world(num_users=7)
    with pytest.raises(FormatError, match="'user' has shape"):
        engine_of(build_model(other.layout, CONFIGS["two tower"])).load_state_dict(state)


def test_noise_has_the_stated_scale_on_every_parameter(world: Any) -> None:
    """Standard deviation sigma C on the sum, for dense layers and tables; 2/3 and 3/2 of it would be seen."""
    made = world(num_users=2000, num_items=2000)
    config = DlrmConfig(embedding_dim=16, bottom_widths=(64,), top_widths=(64,))
    engine = engine_of(build_model(made.layout, config), noise_multiplier=1.5, max_grad_norm=2.0)
    sent = sent_by(engine, [])
    for name, part in sent.items():
        if part.numel() >= 500:
            # 12 standard errors of a standard deviation at 500 draws are 38 %: far inside 2/3 and 3/2.
            spread = 4.0 / math.sqrt(2 * part.numel())
            assert float(part.std()) == pytest.approx(3.0, rel=spread), name


def test_parameters_outside_their_range_are_refused(world: Any) -> None:
    for values in ((-1.0, 1.0, 1.0), (1.0, 0.0, 1.0), (1.0, math.inf, 1.0), (1.0, 1.0, 0.0), (math.nan, 1.0, 1.0)):
        with pytest.raises(InputError):
            PrivacyParameters(noise_multiplier=values[0], max_grad_norm=values[1], expected_batch_size=values[2])
    with pytest.raises(InputError, match="no dense optimizer"):
        DenseOptimizer.named("lbfgs", learning_rate=schedules.constant(1.0))
    model = build_model(world().layout, CONFIGS["dlrm"])
    privacy = PrivacyParameters(noise_multiplier=1.0, max_grad_norm=1.0, expected_batch_size=1.0)
    with pytest.raises(InputError, match="needs a noise key"):
        Engine(
            model,
            mode="lazydp",
            privacy=privacy,
            embeddings=EmbeddingSgd(schedules.constant(1.0)),
            dense=SGD,
            key=None,
        )
    with pytest.raises(InputError, match=r"expected .*, found \{'user': \(3, 4\)\}"):
        engine_of(model, tables={"user": torch.zeros(3, 4)})
    other_order = dict(reversed(list(initial_tables(model).items())))
    with pytest.raises(InputError, match="in the model's order"):
        engine_of(model, tables=other_order)


def test_phases_are_timed(world: Any) -> None:
    made = world()
    timer = StepTimer()
    engine = engine_of(build_model(made.layout, CONFIGS["dlrm"]), noise_multiplier=1.0, timer=timer)
    engine.step(made.examples(4, seed=0))
    assert {"lookups", "catch-up", "gather", "forward", "backward", "norms", "scatter"} <= timer.seconds.keys()
    timer.reset()
    assert not timer.seconds


def test_an_example_hardly_changes_how_thousands_of_others_are_rounded(
    world: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one float32 sum this one moved the bias by 5 C: the others add up to a power of two with it, or stay below."""
    made = world(candidates=False, longest_bag=1)
    model = build_model(made.layout, CONFIGS["dlrm"])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()  # only the last bias has a gradient
    monkeypatch.setattr(model, "losses", lambda logits, labels: logits.sum(dim=1) * labels)
    half = 8192
    sizes = torch.cat([torch.full((half + 1,), 0.5), torch.full((half,), -0.26 * 0.5 * half * 2.0**-23)])
    examples = replace(made.examples(2 * half + 1, seed=0), labels=sizes)
    norm_bound = 0.5 * (1.0 + 2 * ROUNDING)  # nothing is clipped
    sent = []
    for labels in (sizes, torch.where(torch.arange(2 * half + 1) == 0, 0.0, sizes)):
        engine = engine_of(model, max_grad_norm=norm_bound, expected_batch_size=1.0)
        sent.append(sent_by(engine, replace(examples, labels=labels)))
    moved = norm({name: sent[0][name] - sent[1][name] for name in sent[0]})
    assert moved <= norm_bound
