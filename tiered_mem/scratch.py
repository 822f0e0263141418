"""Directories for blocks that nobody needs once their process has ended."""

from __future__ import annotations

import shutil
import tempfile
import time
from pathlib import Path

from tiered_mem.environment import WriterLock
from tiered_mem.errors import ConfigError, StoreError

_PREFIX, _STORE = "tiered-mem-kv-", "store"
_GRACE = 60.0  # seconds in which a directory may not be locked yet


def make_scratch(parent: str | Path | None) -> Path:
    """Make a directory under `parent` (None: the system's temporary one) and return it.

    Its `store_in` is the place for a store. What processes that were killed left there is removed.
    Raises `ConfigError` if `parent` is a file.
    """
    if parent is not None:
        if Path(parent).exists() and not Path(parent).is_dir():
            raise ConfigError(f"{parent} is a file: give a directory for KV blocks")
        Path(parent).mkdir(parents=True, exist_ok=True)
    _remove_left_over(Path(parent or tempfile.gettempdir()))
    return Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))


def store_in(scratch: Path) -> Path:
    return scratch / _STORE


def _remove_left_over(parent: Path) -> None:
    """Remove the scratch directories whose stores nobody has open: their locks died with them."""
    for scratch in parent.glob(f"{_PREFIX}*"):
        store = store_in(scratch)
        try:
            if not store.is_dir() or time.time() - scratch.stat().st_mtime < _GRACE:
                continue
            lock = WriterLock(store)
        except (OSError, StoreError):  # in use, gone meanwhile, or another user's
            continue
        shutil.rmtree(scratch, ignore_errors=True)
        lock.release()
