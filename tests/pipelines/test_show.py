"""What `lazydp pipeline run --ask` asks about."""

from __future__ import annotations

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
    pq.write_table(pa.table({"user": [7], "item": [1]}), tmp_path / "log.parquet")
    user, history = _somebody(str(tmp_path / name), tmp_path / "bundle")
    assert user == ("7" if name == "log.parquet" else _NOBODY)
    assert history
