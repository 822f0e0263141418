"""Where a report goes: it appears whole or not at all, and replaces nothing but a report."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tiered_mem.compare import FORMAT
from tiered_mem.errors import ConfigError

RESULTS, TABLE, PAGE, PLOTS = "results.json", "runs.csv", "index.html", "plots"


@contextmanager
def new_directory(target: Path, *, force: bool = False) -> Iterator[Path]:
    """Yield an empty directory that becomes `target` if the body succeeds, and is removed if not.

    Raises `ConfigError`, before the body, if `target` is something else than an empty directory;
    with `force` it may be a former report as well.
    """
    target = target.resolve()  # a link stays, and its directory is replaced
    _check(target, force)
    target.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=target.parent))
    try:
        yield staging
        staging.chmod(0o777 & ~_umask())
        _check(target, force)  # what has come there meanwhile stays, too
        _replace(target, staging)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def _check(target: Path, force: bool) -> None:
    if not os.path.lexists(target):
        return
    if not target.is_dir():
        raise ConfigError(f"{target} is not a directory: name another one for the report")
    names = {path.name for path in target.iterdir()}
    if not names:
        return
    if not _is_report(target):
        raise ConfigError(
            f"{target} holds other files and no former report: name another directory"
        )
    if not force:
        raise ConfigError(f"{target} holds a report: add --force to replace it, or name another")
    foreign = sorted(names - {RESULTS, TABLE, PAGE, PLOTS})
    if foreign:
        raise ConfigError(
            f"{target} holds a report and {foreign[0]}, which would be lost: move it elsewhere"
        )


def _is_report(directory: Path) -> bool:
    try:
        results = json.loads((directory / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(results, dict) and results.get("format") == FORMAT


def _replace(target: Path, staging: Path) -> None:
    former = staging.with_name(staging.name + "-former")
    if not target.exists():
        staging.rename(target)
        return
    target.rename(former)
    try:
        staging.rename(target)
    except BaseException:
        former.rename(target)
        raise
    shutil.rmtree(former, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
