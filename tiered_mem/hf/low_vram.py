"""When the device has no memory left for the model's own compute: HBM gives some back.

An allocation that fails in the model's forward unwinds it. What it had added to the KV cache is
taken off again, HBM shrinks by at least what was asked for, and the same forward starts over: its
result is what it would have been. Slower, since fewer experts are resident; that is said once.
"""

from __future__ import annotations

import copy
import functools
import logging
import re
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import (
    Cache,
    DynamicIndexedLayer,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    EncoderDecoderCache,
)

from tiered_mem.config import format_size
from tiered_mem.errors import BudgetError, RuntimeClosedError

if TYPE_CHECKING:
    from tiered_mem.runtime import Runtime

logger = logging.getLogger(__name__)

_LEAST_SHARE = 16  # of HBM's budget, one part in so many is given back at least
_MOST_RETRIES = 32  # of one forward
_UNITS = {"bytes": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
_ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) (bytes|KiB|MiB|GiB)")


class RoomMaker:
    """Runs a model's forward again, with less HBM, when it runs out of device memory.

    Args:
        runtime: whose HBM shrinks.
        forget: called before each retry, in the thread that runs the forward: what was noted of
            the failed one is void.
    """

    def __init__(self, runtime: Runtime, forget: Callable[[], None]) -> None:
        self._runtime = runtime
        self._forget = forget
        self._has_said = False

    def guard(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """Return `forward` (a bound method of a model) with retries."""

        @functools.wraps(forward)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            caches = [CacheState(c) for c in (*args, *kwargs.values()) if isinstance(c, Cache)]
            for attempt in range(_MOST_RETRIES + 1):
                try:
                    return forward(*args, **kwargs)
                except torch.OutOfMemoryError as error:
                    reason = self._why_not(attempt, caches)
                    if reason:
                        error.add_note(f"tiered-mem: {reason}")
                        raise
                    asked = bytes_asked_for(error)
                    _forget_frames(error)
                # Out of the except clause: nothing refers to the failed forward's tensors now.
                for cache in caches:
                    cache.restore()
                self._forget()
                self._make_room(asked)
            raise AssertionError("unreachable: the last attempt returns or raises")

        return guarded

    def _why_not(self, attempt: int, caches: Sequence[CacheState]) -> str:
        """Say why the forward can't run again; "" if it can."""
        budget, least = self._runtime.budgets.hbm, self._runtime.least_hbm()
        if budget <= least:
            return (
                f"HBM has given back all but {format_size(budget)}, the least it can do with; "
                "shorten the prompt or the batch, or use a device with more memory"
            )
        if attempt == _MOST_RETRIES:
            return f"the forward failed {attempt} times, though HBM gave memory back each time"
        for cache in caches:
            if kept := cache.not_restorable():
                return (
                    f"the forward can't run again, because {kept} in its KV cache can't be taken "
                    "back to what they were; give a smaller hbm"
                )
        return ""

    def _make_room(self, asked: int) -> None:
        runtime = self._runtime
        budget = runtime.budgets.hbm
        smaller = max(runtime.least_hbm(), budget - max(asked, budget // _LEAST_SHARE))
        level = logging.DEBUG if self._has_said else logging.WARNING
        self._has_said = True
        logger.log(
            level,
            "the device ran out of memory: HBM shrinks from %s to %s and the forward runs again; "
            "with a smaller hbm from the start it would have run once",
            format_size(budget),
            format_size(smaller),
        )
        try:
            runtime.resize(hbm=smaller)
        except (BudgetError, RuntimeClosedError):
            return  # a larger model came, or close(): the forward that follows says what is wrong


def bytes_asked_for(error: BaseException) -> int:
    """Return the bytes that torch's error says couldn't be had; 0 if it doesn't say."""
    found = _ASKED.search(str(error))
    return 0 if found is None else int(float(found[1]) * _UNITS[found[2]])


def _forget_frames(error: BaseException | None) -> None:
    """Drop the locals of the frames that errors came through: they hold tensors."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        following = error.__cause__ or error.__context__
        error.__traceback__ = None
        error = following


class CacheState:
    """What a KV cache holds before a forward, noted in a few microseconds a layer.

    Growing layers are noted by their length, so that nothing keeps their old tensors alive; layers
    that are empty or keep a window, by what they hold. Others are left as they are: where a forward
    has changed one, it can't be restored.
    """

    def __init__(self, cache: Cache) -> None:
        parts = [cache]
        if isinstance(cache, EncoderDecoderCache):
            parts = [cache.self_attention_cache, cache.cross_attention_cache]
            self._is_updated: dict[Any, Any] | None = dict(cache.is_updated)
        else:
            self._is_updated = None
        self._whole = cache
        self._parts = [(part, [_LayerState(layer) for layer in part.layers]) for part in parts]

    def not_restorable(self) -> str:
        """Return the class of layers that can't be restored; "" if all can."""
        for part, states in self._parts:
            for layer, state in zip(part.layers, states, strict=False):
                if not state.restorable:
                    return type(layer).__name__
        return ""

    def restore(self) -> None:
        for part, states in self._parts:
            del part.layers[len(states) :]
            for layer, state in zip(part.layers, states, strict=True):
                state.restore(layer)
        if self._is_updated is not None:
            self._whole.is_updated = self._is_updated


# Layers whose tensors grow along one dimension, by being replaced with longer ones.
_GROWING = (DynamicLayer, DynamicIndexedLayer)


class _LayerState:
    __slots__ = ("_shapes", "_values", "restorable")

    def __init__(self, layer: Any) -> None:
        self._shapes: dict[str, torch.Size] = {}
        self._values: dict[str, Any] = {}
        self.restorable = True
        kind = type(layer)
        for name, value in vars(layer).items():
            if kind in _GROWING and isinstance(value, torch.Tensor):
                self._shapes[name] = value.shape
            elif kind is DynamicSlidingWindowLayer:  # replaces its tensors, and they are small
                self._values[name] = value
            elif not _holds_states(value):
                self._values[name] = _note(value)
            else:
                self.restorable = False
                return

    def restore(self, layer: Any) -> None:
        for name, value in list(vars(layer).items()):
            if name in self._values:
                setattr(layer, name, self._values[name])
            elif name not in self._shapes:
                delattr(layer, name)
            else:
                for dim, size in enumerate(self._shapes[name]):
                    if value.shape[dim] != size:
                        value = value.narrow(dim, 0, size)
                setattr(layer, name, value)


def _holds_states(value: Any) -> bool:
    if isinstance(value, dict | list | tuple):
        return any(map(_holds_states, value.values() if isinstance(value, dict) else value))
    return isinstance(value, torch.Tensor) and value.numel() > 1


def _note(value: Any) -> Any:
    if isinstance(value, dict | list):
        return copy.copy(value)
    # A count may be added to in place.
    return value.clone() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
