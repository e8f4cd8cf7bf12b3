"""What `lazydp pipeline run --ask` asks about."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lazydp.components.bundle.untrained import write_untrained
from lazydp.pipelines.show import _NOBODY, _somebody


@pytest.mark.parametrize("name", ["log.parquet", "log.csv"])
def test_a_user_is_read_from_parquet_and_none_from_other_logs(tmp_path: Path, name: str) -> None:
    write_untrained(tmp_path / "bundle", kind="two_tower", num_items=80, dim=8)
    (tmp_path / "log.csv").write_text("user,item\n7,1\n")
    pq.write_table(pa.table({"user": [7, 8, 7], "item": [11, 12, 13], "time": [9, 1, 2]}), tmp_path / "log.parquet")
    manifest = tmp_path / "bundle" / "manifest.json"
    document = json.loads(manifest.read_text())
    document["features"]["timestamp"] = "time"
    manifest.write_text(json.dumps(document))
    user, history = _somebody(str(tmp_path / name), tmp_path / "bundle")
    if name == "log.parquet":
        assert (user, history) == ("7", ["13", "11"])
    else:
        assert user == _NOBODY
        assert len(history) == 10
