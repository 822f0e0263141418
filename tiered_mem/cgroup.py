"""The memory limit of the control group (version 2) this process is in: a container's, mostly."""

from __future__ import annotations

from pathlib import Path

_MOUNT = Path("/sys/fs/cgroup")
_MEMBERSHIP = Path("/proc/self/cgroup")


def memory_left() -> int | None:
    """Return the bytes the tightest limit still allows, maybe none or less; None without a limit.

    The page cache counts against a limit, but gives way: it isn't counted here.
    """
    lefts = [left for group in _groups() if (left := _left(group)) is not None]
    return min(lefts, default=None)


def _groups() -> list[Path]:
    """Return the directories of our group and those above it; empty without cgroup v2."""
    try:
        lines = _MEMBERSHIP.read_text().splitlines()
    except OSError:
        return []
    own = next((line[len("0::/") :] for line in lines if line.startswith("0::/")), None)
    if own is None:
        return []
    group = _MOUNT / own
    return [group, *(parent for parent in group.parents if parent.is_relative_to(_MOUNT))]


def _left(group: Path) -> int | None:
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no limit ("max"), not ours to read, or the root
        return None
    cache = int(counts.get("inactive_file", 0)) + int(counts.get("active_file", 0))
    return limit - (used - cache)
