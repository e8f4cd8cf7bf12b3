"""`lazydp bench train`: whole runs of all contestants do the same number of steps on the same data."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from lazydp.components.bench import cli
from lazydp.components.bench import train as bench
from lazydp.components.bench.trainers import TorchSgd
from lazydp.components.ingest.dataset import EncodedDataset
from lazydp.components.shared.errors import InputError
from lazydp.components.train.data.examples import Examples
from support.tiny import TINY_CONFIG


@pytest.fixture
def config(tiny: Any) -> Any:
    path = tiny.folder / "train.yaml"
    path.write_text(yaml.safe_dump(TINY_CONFIG))
    return path


def test_every_contestant_runs_to_the_end(tiny: Any, config: Any) -> None:
    arguments = ["--dataset", str(tiny.dataset), "--config", str(config), "--steps", "3", "--repeats", "1"]
    shown = CliRunner().invoke(cli.train, [*arguments, "--json"])
    assert shown.exit_code == 0, shown.output
    lines = [json.loads(line) for line in shown.stdout.splitlines() if line.startswith("{")]
    assert [line["contestant"] for line in lines] == list(bench.CONTESTANTS)
    examples = round(3 * 0.05 * len(EncodedDataset.open(tiny.dataset).split("train")))
    assert {line["shape"]["examples"] for line in lines} == {examples}


def test_the_loop_in_plain_torch_takes_every_step(tiny: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Past the end of the data it begins again."""
    sizes = []
    step = TorchSgd.step

    def counted(self: TorchSgd, parts: Sequence[Examples]) -> object:
        sizes.append(parts[0].size)
        return step(self, parts)

    monkeypatch.setattr(TorchSgd, "step", counted)
    data, settings = EncodedDataset.open(tiny.dataset), tiny.config(steps=45)
    bench.torch_loop(data, settings, tiny.folder / "weights.pt")
    assert len(sizes) == 45
    assert sum(sizes) > len(data.split("train"))
    assert (tiny.folder / "weights.pt").stat().st_size > 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"mode": "sgd", "noise_multiplier": None, "target_delta": None}, "a private run of steps"),
        ({"sampling": "user", "user_gradient": "sum", "privacy_unit": "user"}, "not users"),
    ],
)
def test_what_cannot_be_compared_is_refused(tiny: Any, changes: dict[str, Any], said: str) -> None:
    path = tiny.folder / "train.yaml"
    path.write_text(yaml.safe_dump({**TINY_CONFIG, **changes}))
    with pytest.raises(InputError, match=said):
        bench.run(tiny.dataset, path, repeats=1)
