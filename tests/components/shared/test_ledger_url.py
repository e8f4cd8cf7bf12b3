"""One ledger for each user, and no password where others can read it."""

from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from lazydp.components.shared.errors import InputError
from lazydp.components.shared.ledger_url import LEDGER, default_ledger_url


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("LAZYDP_LEDGER", "LAZYDP_LEDGER_FILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    monkeypatch.chdir(tmp_path)


def test_every_working_folder_has_the_same_ledger(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        monkeypatch.chdir(tmp_path / name)
        found.add(default_ledger_url())
    assert found == {f"sqlite:///{tmp_path / 'data' / 'lazydp' / 'ledger.db'}"}
    assert (tmp_path / "data" / "lazydp").stat().st_mode & 0o777 == 0o700


def test_a_ledger_that_was_the_default_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "lazydp-ledger.db").touch()
    with pytest.raises(InputError, match="say which one you mean"):
        default_ledger_url()


def test_the_environment_or_a_file_names_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "url").write_text("postgresql://u:secret@host/ledger\n")
    monkeypatch.setenv("LAZYDP_LEDGER_FILE", str(tmp_path / "url"))
    assert default_ledger_url() == "postgresql://u:secret@host/ledger"
    monkeypatch.setenv("LAZYDP_LEDGER", "sqlite:///here.db")
    assert default_ledger_url() == "sqlite:///here.db"
    monkeypatch.delenv("LAZYDP_LEDGER")
    monkeypatch.setenv("LAZYDP_LEDGER_FILE", str(tmp_path / "missing"))
    with pytest.raises(InputError, match="cannot be read"):
        default_ledger_url()


@click.command()
@LEDGER
def command(ledger: str | None) -> None:
    click.echo(ledger)


@pytest.mark.parametrize("url", ["postgresql://u:secret@host/db", "postgresql://host/db?user=u&password=secret"])
def test_a_password_on_the_command_line_is_refused(url: str) -> None:
    refused = CliRunner().invoke(command, ["--ledger", url])
    assert isinstance(refused.exception, InputError)
    assert "secret" not in str(refused.exception)
    assert CliRunner().invoke(command, [], env={"LAZYDP_LEDGER": url}).output == f"{url}\n"
    for harmless in ("postgresql://u@host/db", "sqlite:///a:b@c.db", "sqlite:////x/ledger.db"):
        assert CliRunner().invoke(command, ["--ledger", harmless]).output == f"{harmless}\n"
