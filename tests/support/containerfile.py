"""Runs the instructions of a Containerfile without a container engine: each stage in a root file system of its own.

A stage starts from this machine's root, with an overlay above it that takes every change; nothing below it is written.
So the base image is this machine, which has more in it than the real one: what a step needs and the base image lacks is
not noticed. Everything else is as an engine does it: the steps in order, the environment that the file gives and no
other, files from the build context and from earlier stages alone.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

_KNOWN = {"FROM", "ARG", "ENV", "RUN", "COPY", "WORKDIR", "SHELL", "LABEL", "USER", "EXPOSE", "HEALTHCHECK"} | {
    "ENTRYPOINT"
}
# How this machine reaches package registries; an engine has settings of its own for that.
_NETWORK = re.compile(r"PIP_.*|.*_proxy|.*_PROXY|.*_CA_.*|.*_CERT.*|SSL_.*")
_MARK = "===== built ====="
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


@dataclass(frozen=True)
class Instruction:
    """One line of the file, continued lines joined."""

    name: str
    text: str


def instructions(file: Path) -> list[Instruction]:
    """The instructions in order.

    Raises:
        ValueError: one that this module does not know.
    """
    lines = [line for line in file.read_text().splitlines() if line.strip() and not line.lstrip().startswith("#")]
    found = []
    for line in re.sub(r"\\\n", " ", "\n".join(lines)).splitlines():
        name, _, text = line.strip().partition(" ")
        if name not in _KNOWN:
            raise ValueError(f"unknown instruction {name}: {line}")
        found.append(Instruction(name, text.strip()))
    return found


def can_build() -> bool:
    """Whether this process may mount."""
    tried = subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False) if _unshare() else None
    return tried is not None and tried.returncode == 0


def _unshare() -> bool:
    return shutil.which("unshare") is not None and os.getuid() == 0


@dataclass
class Build:
    """A build.

    Args:
        context: the folder that COPY reads.
        folder: an empty one, for the root file systems.
        arguments: of the build, as `--build-arg`.
        extra: folder of this machine -> where every stage sees it, read-only.
    """

    context: Path
    folder: Path
    arguments: dict[str, str] = field(default_factory=dict)
    extra: dict[Path, str] = field(default_factory=dict)

    def script(self, steps: list[Instruction], *, last: str) -> str:
        """A shell script, for a mount namespace of its own, that does the steps and then `last` in the last stage."""
        lines, root, environment, folder, user = ["set -euo pipefail"], "", {}, "/", "0"
        stages: dict[str, str] = {}
        given: dict[str, str] = {}
        for step in steps:
            if step.name == "FROM":
                root, environment, folder, user = str(self.folder / f"stage-{len(stages)}"), {"PATH": _PATH}, "/", "0"
                stages[step.text.partition(" AS ")[2] or str(len(stages))] = root
                given = {}
                lines += self._mounted(root)
            elif step.name == "ARG":
                name, _, default = step.text.partition("=")
                given[name] = self.arguments.get(name, default)
            elif step.name == "ENV":
                environment |= dict(part.split("=", 1) for part in _expanded(step.text, given | environment))
            elif step.name == "WORKDIR":
                folder = step.text
                lines.append(f"mkdir -p {root}{folder}")
            elif step.name == "USER":
                user = step.text
            elif step.name == "COPY":
                lines += self._copied(step.text, root, folder, stages)
            elif step.name == "RUN":
                lines.append(_inside(root, {**_network(), **given, **environment}, folder, user, step.text))
        lines.append(_inside(root, environment, folder, user, last))
        return "\n".join(lines) + "\n"

    def run(self, steps: list[Instruction], *, last: str) -> str:
        """Do the steps; returns what `last` printed, which is the end of the output."""
        file = self.folder / "build.sh"
        file.write_text(self.script(steps, last=f"echo && echo '{_MARK}' && {last}"))
        done = subprocess.run(
            ["unshare", "--mount", "--propagation", "private", "bash", str(file)],
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise RuntimeError(f"the build failed: {done.stdout[-3000:]}{done.stderr[-3000:]}")
        return done.stdout.rpartition(f"\n{_MARK}\n")[2]

    def _mounted(self, root: str) -> list[str]:
        above = f"lowerdir=/,upperdir={root}.changes,workdir={root}.work"
        lines = [
            f"mkdir -p {root} {root}.changes {root}.work",
            f"mount -t overlay overlay -o {above} {root}",
            f"mount -t proc proc {root}/proc",
            f"mount --rbind /dev {root}/dev",
        ]
        for source, target in self.extra.items():
            lines += [f"mkdir -p {root}{target}", f"mount --bind {source} {root}{target}"]
        return lines

    def _copied(self, text: str, root: str, folder: str, stages: dict[str, str]) -> list[str]:
        words = text.split()
        source = str(self.context)
        if words[0].startswith("--from="):
            source = stages[words.pop(0).removeprefix("--from=")]
        *names, target = words
        where = target if target.startswith("/") else f"{folder}/{target}"
        lines = []
        for name in names:
            path = f"{source}/{name.lstrip('/')}"
            one = f"{root}{where}" if not where.endswith("/") else f"{root}{where}{Path(name).name}"
            # A folder is copied as its content, a file under its name.
            lines.append(f"mkdir -p $(dirname {one}) && cp -aT {path} {one}")
        return lines


def _expanded(text: str, known: dict[str, str]) -> list[str]:
    """The words of a line with `$NAME` and `${NAME}` replaced."""
    whole = re.sub(r"\$\{(\w+)\}|\$(\w+)", lambda found: known.get(found[1] or found[2], ""), text)
    return shlex.split(whole)


def _network() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if _NETWORK.fullmatch(name)}


def _inside(root: str, environment: dict[str, str], folder: str, user: str, command: str) -> str:
    """A command in a root file system, with this environment and no other."""
    variables = [f"{name}={value}" for name, value in environment.items()]
    shell = ["/bin/bash", "-o", "pipefail", "-c", f"cd {folder} && {command}"]
    who = [] if user == "0" else [f"--userspec={user}:{user}"]
    return shlex.join(["chroot", *who, root, "env", "-i", *variables, *shell])
