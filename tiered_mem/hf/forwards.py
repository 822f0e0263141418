"""Where the generation of each thread stands, as a model's forwards tell."""

from __future__ import annotations

import inspect
import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn

from tiered_mem.trace import Phase


@dataclass
class Here(threading.local):
    """Where this thread's generation stands."""

    sequence: int = 0
    num_tokens: int = 0  # of the sequence, before this forward
    phase: Phase = Phase.PREFILL
    cache: Callable[[], Any] | None = None  # a weak reference; None: not known yet


class Forwards:
    """Follows a model's forwards while it is entered.

    A sequence begins with a forward whose cache is empty, or another one than the forward before
    had in this thread. Those of a batch count as one.
    """

    def __init__(self, model: nn.Module) -> None:
        self.here = Here()
        self._model = model
        self._lock = threading.Lock()
        self._num_sequences = 0

    def __enter__(self) -> Forwards:
        hook = self._model.register_forward_pre_hook(self._on_forward, with_kwargs=True)
        self._remove: Callable[[], None] = hook.remove
        return self

    def __exit__(self, *_: object) -> None:
        self._remove()

    def _on_forward(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = dict(zip(inspect.signature(module.forward).parameters, args, strict=False)) | kwargs
        tokens = given.get("input_ids")
        if tokens is None:
            tokens = given.get("inputs_embeds")
        if tokens is None:
            return  # the model itself says what it misses
        here, cache = self.here, given.get("past_key_values")
        here.num_tokens = 0 if cache is None else int(cache.get_seq_length())
        another = here.cache is not None and here.cache() is not cache
        if here.num_tokens == 0 or another:
            with self._lock:
                here.sequence, self._num_sequences = self._num_sequences, self._num_sequences + 1
        here.cache = None if cache is None else weakref.ref(cache)
        here.phase = Phase.PREFILL if tokens.shape[1] > 1 else Phase.DECODE
