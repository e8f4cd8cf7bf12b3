"""Builds the documentation site into build/site, with warnings as errors: `make docs`.

Every tracked page is copied to build/docs where it stands in the repository, so that links between pages hold in both
places. Each name that `lazydp.api` exports gets a page, written from its docstring.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import yaml

import lazydp.api

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "build" / "docs"
SITE = ROOT / "build" / "site"
# Pages, and what pages show or link to.
COPIED = ("*.md", "examples/*.py", "*.png", "*.svg", "*.yaml", "*.cff", "LICENSE")
NOT_COPIED = ("tests/", ".github/")


def tracked() -> list[str]:
    """The tracked files that belong to the site."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *COPIED]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout  # noqa: S603
    names = [name for name in listed.split("\0") if name and not name.startswith(NOT_COPIED)]
    return [name for name in names if (ROOT / name).is_file()]


def gather(pages: Path) -> None:
    """Copy the pages to the folder `pages`, and write the reference's there."""
    shutil.rmtree(pages, ignore_errors=True)
    for name in tracked():
        target = pages / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, target)
    (pages / "reference").mkdir()
    for name, page in reference_pages().items():
        (pages / "reference" / f"{name}.md").write_text(page)


def reference_pages() -> dict[str, str]:
    """Name -> page, for everything that `lazydp.api` exports."""
    pages = {}
    for name in sorted(lazydp.api.__all__):
        where = f"`from lazydp.api import {name}`\n\n"
        home = lazydp.api._HOMES.get(name)
        pages[name] = where + (
            f"::: {home}.{name}\n" if home else "The version of lazydp, such as `0.1.0`: a string.\n"
        )
    return pages


def build(pages: Path, site: Path) -> tuple[bool, list[str]]:
    """Build the gathered `pages` into `site`; whether it was built, and what mkdocs complained of."""
    document = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    document["nav"].append({"Reference": [{name: f"reference/{name}.md"} for name in reference_pages()]})
    document |= {"docs_dir": str(pages), "site_dir": str(site)}
    document["plugins"][1]["mkdocstrings"]["handlers"]["python"]["paths"] = [str(ROOT / ".typecheck")]
    configuration = pages.with_suffix(".yml")
    configuration.write_text(yaml.safe_dump(document, sort_keys=False))
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--clean", "-f", str(configuration)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}  # an advertisement of another program
    done = subprocess.run(  # noqa: S603
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    said = [line for line in done.stdout.splitlines() if line.strip() and not line.startswith("INFO")]
    return done.returncode == 0, said


def main() -> None:
    """Gather and build; status 1 where anything was complained of."""
    gather(PAGES)
    built, said = build(PAGES, SITE)
    said.append(f"wrote {SITE}" if built else "the site was not built")
    sys.stdout.write("\n".join(said) + "\n")
    sys.exit(0 if built else 1)


if __name__ == "__main__":
    main()
