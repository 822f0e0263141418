"""The handle of a wrapped model: what it has counted, and the way back."""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from tiered_mem.config import Budgets, format_size, memory_to_spare
from tiered_mem.errors import (
    BudgetError,
    ChecksumError,
    ConfigError,
    RuntimeClosedError,
    TieredMemError,
)
from tiered_mem.hf.checkpoint import Checkpoint
from tiered_mem.hf.detect import find_experts
from tiered_mem.hf.device import Home, refuse_moves
from tiered_mem.hf.experts import TieredExperts
from tiered_mem.hf.hollow import Origin
from tiered_mem.hf.kv import KvPool
from tiered_mem.hf.kv_cache import TieredCache
from tiered_mem.hf.layout import ExpertLayout
from tiered_mem.hf.low_vram import RoomMaker
from tiered_mem.hf.overrides import Overrides, refuse_copies
from tiered_mem.hf.prefetch import RouterHooks
from tiered_mem.hf.record import Recorder
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.policies.prefetch import Predictor, make_predictor
from tiered_mem.space import Space
from tiered_mem.stats import Stats
from tiered_mem.store import Store, allocate

Progress = Callable[[int, int], None]


class TieredModel:
    """The handle of a wrapped model, `model.tiered_mem`."""

    def __init__(
        self,
        model: PreTrainedModel,
        layouts: Sequence[ExpertLayout],
        store: Store,
        checkpoint: Checkpoint | None,
        space: Space,
        prefetch: str | Predictor,
        resources: ExitStack,
        stock_implementation: str | None,
        *,
        owns_runtime: bool,
    ) -> None:
        """Take over `resources`, of which what is to be closed first came last.

        `owns_runtime`: the runtime is among them, and no other model's.
        """
        self.model = model
        self.layouts = list(layouts)
        self.store = store
        self.runtime = space.runtime
        predictor = make_predictor(prefetch)
        self.prefetch = predictor.name
        self._owns_runtime = owns_runtime
        self.kv: KvPool | None = None
        self._checkpoint = checkpoint
        self._stock_implementation = stock_implementation
        self._baseline = self.runtime.stats()
        self._space = space
        self._experts = find_experts(model)
        self.hooks = RouterHooks(
            model,
            self._experts,
            predictor,
            self._hint,
            layer_resident=self._space.layer_resident,
            worthwhile=self._space.prefetch_pays,
        )
        self.home = Home(space, stock_implementation)
        self.experts: list[TieredExperts] = []
        for _, module, layer in self._experts:
            tiered = TieredExperts(self._space, layer, self.layouts[layer], self.hooks, self.home)
            module.tiered = tiered  # type: ignore[assignment]
            self.experts.append(tiered)
        self._overrides = Overrides(model)
        refuse_moves(self._overrides, self.home.device)
        refuse_copies(self._overrides)
        self.home.follow_generate(self._overrides)
        maker = RoomMaker(self.runtime, self._start_over)
        self._overrides.set("forward", maker.guard(model.forward))
        # Also when the model is dropped without close(), and at the end of the process.
        self._give_back = weakref.finalize(self, _give_back, resources.pop_all(), os.getpid())

    @property
    def closed(self) -> bool:
        return not self._give_back.alive

    @property
    def budgets(self) -> Budgets:
        return self.runtime.budgets

    def cache(self) -> TieredCache:
        """Return an empty cache on tiered KV. Raises `ConfigError` if the model has none."""
        if self.kv is None:
            raise ConfigError("this model's KV isn't tiered: load it with kv=..., or use tier_kv")
        return self.kv.cache()

    def stats(self) -> Stats:
        """Return the runtime's counts since the model was wrapped, or since `reset_stats`.

        On a device, waits for what the model was asked so far.
        """
        self.home.late.drain()
        return self.runtime.stats() - self._baseline

    def reset_stats(self) -> None:
        """Count from now on."""
        self.home.late.drain()
        self._baseline = self.runtime.stats()

    def prefetch_report(self) -> dict[str, Any]:
        """Return what was predicted and how well, by layer, and where prefetch is off and why."""
        layers = {
            layer: {"num_hints": hints, "num_right": right, "on": on}
            for layer, (hints, right, on) in self._space.precision().items()
        }
        return {"predictor": self.prefetch, "layers": layers, "notes": self.hooks.report()}

    def record(self, *, predictions: bool = True, hidden: bool = False) -> Recorder:
        """Return a context manager: what the model is asked for inside it becomes a `Trace`.

            with model.tiered_mem.record() as recorder:
                model.generate(...)
            recorder.trace().save("my.npz")

        `predictions` keeps what the next layers' gates predict, `hidden` the residual stream.
        """
        return Recorder(self, predictions=predictions, hidden=hidden)

    def fill(self, progress: Progress | None = None) -> None:
        """Read experts ahead of the first token until HBM and DRAM are full."""
        keys = [
            BlockKey(Kind.EXPERT, layer, index)
            for layer, layout in enumerate(self.layouts)
            for index in range(layout.num_experts)
        ]
        self._space.fill(keys, progress)

    def close(self) -> None:
        """Give memory, store and threads back. The model can't run afterwards.

        Calls under way in other threads end with `RuntimeClosedError`. Closing twice is fine.
        """
        if self.kv is not None:
            self.kv.close()
        self.hooks.close()
        for _, module, _ in self._experts:
            module.__dict__.pop("tiered", None)
        self.experts.clear()  # they view HBM's memory
        self._give_back()  # once, whoever comes first

    def unwrap(self) -> PreTrainedModel:
        """Bring the experts back into memory as the stock model's tensors, and close.

        A block that is damaged in the store is read from the checkpoint.

        They go to the device that the experts' layers are on.

        Raises `RuntimeClosedError` if it is closed already; `BudgetError` if they don't fit there,
        `StoreError` or `TransferError` if a block can't be read (then the model stays wrapped).
        """
        if self.closed:
            raise RuntimeClosedError("this model is closed: its experts are gone; load it again")
        self._check_room()
        parameters = [self._read_layer(layer) for layer in range(len(self.layouts))]
        self.close()
        for tensors in parameters:  # each layer's host memory goes as its turn comes
            for name in tensors:
                tensors[name] = self._move_home(tensors[name])
        for _, module, layer in self._experts:
            put_back(module, parameters[layer])
        self.model.set_experts_implementation(self._stock_implementation or "grouped_mm")
        self._overrides.undo()
        del self.model.tiered_mem
        return self.model

    def _check_room(self) -> None:
        """Raise `BudgetError` if the experts wouldn't fit in memory, on their device or on the way.

        What HBM and DRAM hold now is free then, if no other model needs it.
        """
        needed = sum(layout.num_experts * layout.nbytes for layout in self.layouts)
        backend = self.runtime.backend
        places = {"host memory": memory_to_spare()}
        if not backend.in_place:
            # A runtime of this model's own goes with it.
            given_back = self.budgets.hbm if self._owns_runtime else 0
            places[backend.name] = backend.memory()[0] + given_back
        for place, available in places.items():
            if needed > available:
                raise BudgetError(
                    f"the experts have {format_size(needed)}, and {place} has only "
                    f"{format_size(available)} for them: the model stays as it is; free memory, or "
                    "load its checkpoint where it fits"
                )

    def _move_home(self, tensor: torch.Tensor) -> torch.Tensor:
        moved = tensor.to(self.home.device)
        if isinstance(tensor, nn.Parameter):
            return nn.Parameter(moved, tensor.requires_grad)
        return moved

    def _read_layer(self, layer: int) -> dict[str, torch.Tensor]:
        origins: dict[str, Origin] = next(  # of modules that share a layer, any
            module.tiered_origins  # type: ignore[misc]
            for _, module, number in self._experts
            if number == layer
        )
        layout = self.layouts[layer]
        whole: dict[str, torch.Tensor] = {}
        block = allocate(layout.nbytes)
        with self.store.snapshot() as snapshot:
            for index in range(layout.num_experts):
                key = BlockKey(Kind.EXPERT, layer, index)
                try:
                    snapshot.read(key, block)
                except ChecksumError:
                    if self._checkpoint is None:
                        raise
                    self._checkpoint.read_expert(layer, index, torch.from_numpy(block))
                weights = layout.weights(layout.views(torch.from_numpy(block)))
                for name, weight in weights.items():
                    if name not in whole:
                        whole[name] = weight.new_empty(layout.num_experts, *weight.shape)
                    whole[name][index] = weight
        return {
            name: nn.Parameter(tensor, origin.requires_grad) if origin.is_parameter else tensor
            for name, tensor in whole.items()
            for origin in [origins[name]]
        }

    def _start_over(self) -> None:
        """Void what was noted of a forward that failed in this thread."""
        self.hooks.forget()
        for experts in self.experts:
            if experts.recorder is not None:
                experts.recorder.forget()
                break

    def _hint(self, layer: int, ranked: Sequence[int], exact: bool) -> None:
        self._space.hint(layer, ranked, exact=exact)

    def __reduce__(self) -> Any:
        raise TieredMemError(
            "a wrapped model can't be pickled or copied: its experts are in a store; unwrap() it "
            "first, or load it again in the other process"
        )


def put_back(module: nn.Module, tensors: Mapping[str, torch.Tensor]) -> None:
    """Make a hollow module a stock one again."""
    for name, tensor in tensors.items():
        delattr(module, name)  # the stand-in on meta
        if isinstance(tensor, nn.Parameter):
            module.register_parameter(name, tensor)
        else:
            module.register_buffer(name, tensor)
    del module.tiered_origins, module.tiered_layout, module.tiered_layer


def _give_back(resources: ExitStack, process: int) -> None:
    if os.getpid() == process:  # a forked child shares the store's files, but doesn't own them
        resources.close()
