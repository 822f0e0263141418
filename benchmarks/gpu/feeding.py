"""Feeds given tokens to a model on forced routes, and looks at what each layer and call costs."""

from __future__ import annotations

import statistics
import time
import warnings
from contextlib import ExitStack
from typing import Any

import torch
from forced_routes import ForcedRoutes, Ids
from gpu_common import seconds_of
from transformers import DynamicCache

_SEED = 1


class Feeder:
    """One sequence of random tokens [num_tokens] that all peers get, on the routes `ids`.

    `logits` keeps those after the tokens at `watched`, to compare peers by.
    """

    def __init__(self, ids: Ids, vocab: int, device: torch.device) -> None:
        self.routes = ForcedRoutes(ids, device)
        self.device = device
        generator = torch.Generator().manual_seed(_SEED)
        tokens = torch.randint(vocab, (1, len(ids)), generator=generator)
        self._tokens = tokens.to(device)
        self._cache: Any = None

    def start(self, model: Any) -> None:
        """Begin the sequence again."""
        self.routes.position = 0
        self._cache = DynamicCache(config=model.config)

    def step(self, model: Any, num_tokens: int = 1) -> torch.Tensor:
        """Feed the next tokens at once; return the logits after the last, [vocab]."""
        first = self.routes.position
        tokens = self._tokens[:, first : first + num_tokens]
        output = model(
            input_ids=tokens, past_key_values=self._cache, use_cache=True, logits_to_keep=1
        )
        self.routes.position += num_tokens
        logits: torch.Tensor = output.logits[0, -1]
        return logits

    def seconds(self, model: Any, num_steps: int) -> list[float]:
        """Feed tokens one by one; return the seconds of each, the device idle before and after."""
        return [seconds_of(self.device, lambda: self.step(model)) for _ in range(num_steps)]


def layer_seconds(feeder: Feeder, model: Any, num_steps: int) -> list[float]:
    """Return, for each layer, the median seconds that its experts take of a token.

    From when the device comes to the experts until it has left them: what a layer takes longer
    than with all its experts resident, it has waited.
    """
    clocks = [_Clock(layer.mlp.experts, feeder.device) for layer in model.model.layers]
    with ExitStack() as hooks:
        for clock in clocks:
            hooks.callback(clock.remove)
        for _ in range(num_steps):
            feeder.step(model)
        return [statistics.median(clock.seconds()) for clock in clocks]


class _Clock:
    """The times at which a module is entered and left, on the device's own clock if it has one."""

    def __init__(self, module: Any, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._times: list[Any] = []
        self._handles = [
            module.register_forward_pre_hook(lambda *_: self._note()),
            module.register_forward_hook(lambda *_: self._note()),
        ]

    def _note(self) -> None:
        if not self._cuda:
            self._times.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._times.append(event)

    def seconds(self) -> list[float]:
        pairs = zip(self._times[::2], self._times[1::2], strict=True)
        if not self._cuda:
            return [left - entered for entered, left in pairs]
        torch.cuda.synchronize()
        return [entered.elapsed_time(left) / 1e3 for entered, left in pairs]

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def host_syncs(feeder: Feeder, model: Any, num_steps: int) -> float | None:
    """Return how often a token makes the host wait for the device, as torch counts it.

    None where torch doesn't count: off CUDA.
    """
    if feeder.device.type != "cuda":
        return None
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(num_steps):
                feeder.step(model)
    finally:
        torch.cuda.set_sync_debug_mode(before)
    return sum("synchroniz" in str(warning.message) for warning in seen) / num_steps
