"""How much memory this process may use."""

from __future__ import annotations

from pathlib import Path

_MEMINFO = Path("/proc/meminfo")
_OWN_GROUPS = Path("/proc/self/cgroup")
_GROUPS = Path("/sys/fs/cgroup")


def available_memory() -> int:
    """Bytes that are free or hold what can be read again, within the limits of the process's control groups.

    Of a group its limit counts, whatever is used of it: files in the page cache are part of what is used.
    """
    fields = dict(line.split(":") for line in _MEMINFO.read_text().splitlines())
    return min([int(fields["MemAvailable"].split()[0]) << 10, *_limits()])


def _limits() -> list[int]:
    """Limits of the groups of the process and of those above them, of both versions of control groups."""
    found = []
    for line in _OWN_GROUPS.read_text().splitlines() if _OWN_GROUPS.exists() else []:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, name = _GROUPS, "memory.max"
        elif "memory" in controllers.split(","):
            base, name = _GROUPS / "memory", "memory.limit_in_bytes"
        else:
            continue
        # In a container the path may be that of the host, and what is mounted the group itself.
        folder = base / path.strip("/")
        for place in (folder, *folder.parents):
            found += _limit(place / name)
            if place == base:
                break
    return found


def _limit(file: Path) -> list[int]:
    try:
        text = file.read_text().strip()
    except OSError:
        return []
    return [int(text)] if text.isdigit() else []
