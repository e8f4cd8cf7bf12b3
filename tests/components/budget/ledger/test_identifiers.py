"""A dataset's public name tells nothing of its content, and equal content is known again all the same."""

import hashlib
import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from dp_accounting import dp_event

from lazydp.components.budget.ledger.identifiers import register
from lazydp.components.budget.ledger.ledger import Ledger
from lazydp.components.budget.ledger.secret import VARIABLE, LedgerSecret
from lazydp.components.budget.ledger.verify import verify
from lazydp.components.shared.errors import BudgetExceededError, InputError, PrivacyError

CONTENT, LOG = (hashlib.sha256(text).hexdigest() for text in (b"every row of every person", b"the raw log"))
EVENT = dp_event.GaussianDpEvent(10.0)


def url_of(folder: Path) -> str:
    return f"sqlite:///{folder / 'ledger.db'}"


def secret_of(folder: Path) -> Path:
    return folder / "ledger.db.secret"


def test_equal_content_has_one_name_in_a_ledger_and_another_elsewhere(tmp_path: Path) -> None:
    found = {}
    for place in ("ours", "theirs"):
        (tmp_path / place).mkdir()
        with Ledger.open(url_of(tmp_path / place)) as ledger:
            first, again = (register(ledger, fingerprint=CONTENT, name="shop", sources=[LOG]) for _ in range(2))
            other = register(ledger, fingerprint=LOG, name="other")
            assert first == again
            assert len(ledger.entries()) == 2
            found[place] = (first.identifier, *first.sources, other.identifier)
    assert len({*found["ours"], *found["theirs"]}) == 6
    assert stat.S_IMODE(secret_of(tmp_path / "ours").stat().st_mode) == 0o600


def test_who_knows_the_content_cannot_find_it_in_the_ledger(tmp_path: Path) -> None:
    """What an outsider can compute from the right guess; the control is the owner, who has the secret."""
    with Ledger.open(url_of(tmp_path)) as ledger:
        register(ledger, fingerprint=CONTENT, name="shop", sources=[LOG])
        published = "".join(f"{entry.dataset} {entry.body}" for entry in ledger.entries())
    guessed = LedgerSecret(bytes(32))
    for digest in (CONTENT, LOG):
        for spelling in (digest, digest[:12], hashlib.sha256(digest.encode()).hexdigest()):
            assert spelling not in published
        assert guessed.identifier("dataset", digest) not in published
        assert guessed.identifier("source", digest) not in published
    held = LedgerSecret.of(url_of(tmp_path))
    assert held.identifier("dataset", CONTENT) in published
    assert held.identifier("source", LOG) in published
    assert secret_of(tmp_path).read_text().strip() not in published
    assert secret_of(tmp_path).read_text().strip() not in repr(held)


def test_a_second_ingest_of_the_same_rows_has_no_fresh_budget(tmp_path: Path) -> None:
    """The same rows, and the same log under another feature spec, which has another fingerprint."""
    with Ledger.open(url_of(tmp_path)) as ledger:
        first = register(ledger, fingerprint=CONTENT, name="shop", sources=[LOG])
        ledger.set_budget(first.identifier, epsilon=0.45, delta=1e-5)
        ledger.reserve(dataset=first.identifier, event=EVENT, run_id="one")
        for fingerprint in (CONTENT, "e" * 64):
            again = register(ledger, fingerprint=fingerprint, name="shop again", sources=[LOG])
            ledger.set_budget(again.identifier, epsilon=0.45, delta=1e-5)
            with pytest.raises(BudgetExceededError):
                ledger.reserve(dataset=again.identifier, event=EVENT, run_id="two")
        # the control: other rows of another log
        other = register(ledger, fingerprint="f" * 64, name="other", sources=["another log"])
        ledger.set_budget(other.identifier, epsilon=0.45, delta=1e-5)
        ledger.reserve(dataset=other.identifier, event=EVENT, run_id="two")


@pytest.mark.parametrize("loss", ["lost", "exchanged"])
def test_without_its_secret_a_ledger_takes_no_known_data_for_new(loss: str, tmp_path: Path) -> None:
    with Ledger.open(url_of(tmp_path)) as ledger:
        before = register(ledger, fingerprint=CONTENT, name="shop")
        kept = secret_of(tmp_path).read_text()
        if loss == "lost":
            secret_of(tmp_path).unlink()
        else:
            secret_of(tmp_path).write_text("0" * 64)
        message = r"is missing: it was|under another secret \([0-9a-f]{16}\)"
        with pytest.raises((InputError, PrivacyError), match=message):
            register(ledger, fingerprint=CONTENT, name="shop")
        assert len(ledger.entries()) == 1
        secret_of(tmp_path).write_text(kept)
        assert register(ledger, fingerprint=CONTENT, name="shop") == before


def test_the_environment_names_it_where_there_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    postgres = "postgresql://user:***@host/ledger"
    with pytest.raises(InputError, match=f"set {VARIABLE} to 64 hexadecimal digits"):
        LedgerSecret.of(postgres)
    monkeypatch.setenv(VARIABLE, "ab" * 32)
    given = LedgerSecret.of(postgres)
    assert given.name == LedgerSecret(b"\xab" * 32).name
    with Ledger.open(url_of(tmp_path)) as ledger:
        assert register(ledger, fingerprint=CONTENT, name="shop").identifier == given.identifier("dataset", CONTENT)
    assert not secret_of(tmp_path).exists()
    for wrong in ("ab" * 31, "AB" * 32, "kilroy"):
        monkeypatch.setenv(VARIABLE, wrong)
        with pytest.raises(InputError, match="found something else") as refused:
            LedgerSecret.of(postgres)
        assert wrong not in str(refused.value)


def test_many_at_once_make_one_secret(tmp_path: Path) -> None:
    def secret(url: str) -> str:
        with Ledger.open(url) as ledger:
            return ledger.secret().name

    for number in range(5):
        url = f"sqlite:///{tmp_path / f'{number}.db'}"
        Ledger.open(url).close()
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(secret, [url] * 8))
        assert len(set(found)) == 1
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("known", ["dataset", "source"])
def test_what_an_older_ledger_knows_by_its_hash_stays_one_family(known: str, tmp_path: Path) -> None:
    with Ledger.open(url_of(tmp_path)) as ledger:
        identifier, sources = (CONTENT, ["l" * 64]) if known == "dataset" else ("c" * 64, [LOG])
        ledger.register_dataset(identifier, name="shop", sources=sources)
        ledger.set_budget(identifier, epsilon=0.45, delta=1e-5)
        ledger.reserve(dataset=identifier, event=EVENT, run_id="one")
        now = register(ledger, fingerprint=CONTENT, name="shop", sources=[LOG])
        assert now.identifier not in (CONTENT, identifier)
        assert ledger.show(now.identifier).family == (identifier,)
        ledger.set_budget(now.identifier, epsilon=0.45, delta=1e-5)
        with pytest.raises(BudgetExceededError):
            ledger.reserve(dataset=now.identifier, event=EVENT, run_id="two")
        assert verify(ledger.entries()).problems == ()
