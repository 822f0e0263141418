"""Files that are there whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def new_file(path: Path, *, overwrite: bool = False) -> Iterator[BinaryIO]:
    """Open a file for writing that gets its name only once it is written without an error.

    Raises `FileExistsError` if `path` is there already and `overwrite` isn't asked for.
    """
    check_new(path, overwrite=overwrite)
    draft = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with draft.open("xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        draft.replace(path)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise


def check_new(path: Path, *, overwrite: bool = False) -> None:
    """Raise as `new_file` would: for work that takes long before it writes."""
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a directory; name a file in it")
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is no plain file, so it can't be replaced by one")
    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} is there already; write elsewhere or overwrite it (--force)")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"there is no directory {path.parent} to write {path.name} into")
