"""Methods that a wrapped model has in front of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from tiered_mem.errors import TieredMemError

_NOTHING = object()


class Overrides:
    """Attributes set on a model or a module itself, in front of its own. Undone at once."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self._before: dict[str, Any] = {}  # what stood on the model itself

    def set(self, name: str, value: Any) -> None:
        self._before.setdefault(name, vars(self.model).get(name, _NOTHING))
        vars(self.model)[name] = value

    def undo(self) -> None:
        for name, before in self._before.items():
            if before is _NOTHING:
                vars(self.model).pop(name, None)
            else:
                vars(self.model)[name] = before
        self._before.clear()


def refuse_copies(overrides: Overrides) -> None:
    """Make a model refuse to be saved, pickled or copied."""

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise TieredMemError(
            "a wrapped model can't be saved, pickled or copied: its experts are in a store; use "
            "its checkpoint, or unwrap() it first"
        )

    # Pickle and deepcopy ask the object, not its class.
    for name in ("save_pretrained", "__reduce_ex__"):
        overrides.set(name, refuse)
