"""Conversations of `tiered-mem run --session`: their tokens by name, beside the stored prefixes."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tiered_mem.errors import ConfigError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


class Conversation:
    """The tokens of one conversation so far; none of a new one."""

    def __init__(self, directory: Path, name: str) -> None:
        """Raises `ConfigError` for a name that no file can have, and for a damaged file."""
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name!r} can't name a session: use up to 64 letters, digits, dots, dashes and "
                "underscores"
            )
        self.prefixes = directory / "prefixes"
        self._path = directory / "sessions" / f"{name}.json"
        self.tokens = _read(self._path)

    def check(self, num_embeddings: int) -> None:
        """Raise `ConfigError` if it has tokens that the model can't have said."""
        if max(self.tokens, default=0) >= num_embeddings:
            raise ConfigError(
                f"{self._path} has tokens of another model: go on with that one, or name another "
                "session"
            )

    def save(self, tokens: Sequence[int]) -> None:
        """Replace what is stored, whole or not at all."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", dir=self._path.parent, suffix=".new", delete=False
        ) as file:
            json.dump({"tokens": list(tokens)}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(file.name, self._path)
        parent = os.open(self._path.parent, os.O_RDONLY)
        os.fsync(parent)  # the name, too, must outlive a crash
        os.close(parent)


def _read(path: Path) -> list[int]:
    try:
        tokens = json.loads(path.read_text())["tokens"]
    except FileNotFoundError:
        return []
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is no stored session ({error}): remove it to start anew"
        ) from error
    if not isinstance(tokens, list) or not all(
        isinstance(token, int) and 0 <= token < 1 << 31 for token in tokens
    ):
        raise ConfigError(f"{path} is no stored session: remove it to start anew")
    return tokens
