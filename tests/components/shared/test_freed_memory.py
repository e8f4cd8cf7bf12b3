"""What Arrow keeps of freed memory is the user's to say."""

import os

import pytest

from lazydp.components.shared import freed_memory


@pytest.mark.parametrize(("before", "after"), [(None, "10000"), ("10", "10")])
def test_the_environment_goes_first(before: str | None, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Set, then deleted: so that monkeypatch restores it after the test, whatever the function does.
    monkeypatch.setenv(freed_memory.VARIABLE, before or "")
    if before is None:
        monkeypatch.delenv(freed_memory.VARIABLE)
    freed_memory.keep_freed_memory()
    assert os.environ[freed_memory.VARIABLE] == after
