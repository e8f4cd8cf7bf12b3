"""The documentation site builds without a warning, with a page for every exported name."""

import sys
from pathlib import Path

import pytest

import lazydp.api

ROOT = Path(__file__).resolve().parent.parent


def test_the_site_builds_and_a_broken_link_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One build with one fault: the fault is all that is complained of, and it is enough to fail."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import build_site

    try:
        build_site.gather(tmp_path / "pages")
        with (tmp_path / "pages" / "README.md").open("a") as page:
            page.write("\n[a page](docs/nowhere.md)\n")
        built, said = build_site.build(tmp_path / "pages", tmp_path / "site")
    finally:
        sys.modules.pop("build_site", None)
    warnings = [line for line in said if line.startswith(("WARNING", "ERROR"))]
    assert len(warnings) == 1, warnings
    assert "docs/nowhere.md" in warnings[0]
    assert not built
    pages = {path.stem for path in (tmp_path / "pages" / "reference").glob("*.md")}
    assert pages == set(lazydp.api.__all__)  # type: ignore[attr-defined]
    for name in pages - {"__version__"}:
        assert (
            f'id="{lazydp.api._HOMES[name]}.{name}"' in (tmp_path / "site" / "reference" / f"{name}.html").read_text()  # type: ignore[attr-defined]
        )
