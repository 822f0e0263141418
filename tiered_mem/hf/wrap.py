"""Stock transformers models with their experts on the runtime: load, wrap, unwrap, close."""

from __future__ import annotations

import tempfile
import uuid
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn
from transformers import PreTrainedModel

from tiered_mem import _core
from tiered_mem.config import Budgets, Size
from tiered_mem.errors import (
    AlreadyWrappedError,
    ConfigError,
    RuntimeClosedError,
    StoreError,
    TieredMemError,
)
from tiered_mem.hf.checkpoint import Checkpoint
from tiered_mem.hf.detect import find_experts, require_experts
from tiered_mem.hf.experts import IMPLEMENTATIONS, TieredExperts
from tiered_mem.hf.hollow import hollow_experts, hollow_model
from tiered_mem.hf.layout import ExpertLayout
from tiered_mem.hf.loading import default_model_class
from tiered_mem.hf.pack import open_packed, pack
from tiered_mem.hf.prefetch import RouterHooks
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.policies.prefetch import Predictor, make_predictor
from tiered_mem.runtime import Runtime
from tiered_mem.stats import Stats
from tiered_mem.store import Store, allocate

Progress = Callable[[int, int], None]

# What configs call the number of experts a token uses.
_TOP_K_NAMES = ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_top_k", "moe_k", "top_k")


def from_pretrained(
    path_or_id: str | Path,
    *,
    hbm: Size | None = None,
    dram: Size | None = None,
    nvme: str | Path | None = None,
    eviction: str | None = None,
    prefetch: str | Predictor = "next-gate",
    codec: str = "none",
    runtime: Runtime | None = None,
    model_class: type[Any] | None = None,
    progress: Progress | None = None,
    **hf_kwargs: Any,
) -> Any:
    """Load a Mixture-of-Experts checkpoint whose experts needn't fit in memory.

    The model is the stock one, without its expert weights; what it computes is what the unmodified
    model computes. `model.tiered_mem` is its handle (`TieredModel`).

    Args:
        path_or_id: A directory or hub id with safetensors files.
        hbm, dram: Budgets: bytes, "6GiB", "25%" (of all experts), or "auto" (the default). Without
            a GPU, host memory plays HBM's part. `dram=0` means no DRAM tier.
        nvme: Directory of the store. Packed into on first use (`tiered-mem pack` does it ahead) and
            kept; None: a temporary one that goes with the model.
        eviction: Name of the eviction policy; default "lru".
        prefetch: Name of the predictor, or a predictor of your own for this model.
        codec: "none" or "zstd", for blocks packed now.
        runtime: Put the model on this runtime, beside others; then it has the budgets and policy.
        model_class: transformers class to load with, if not the checkpoint's own.
        progress: Called with (bytes, bytes in all) while packing.
        **hf_kwargs: What `from_pretrained` of transformers takes.

    Raises:
        ConfigError, BudgetError: options that can't be used.
        UnsupportedModelError: not a Mixture of Experts, or not behind transformers' interface.
        CheckpointError: files missing, truncated or not fitting the model.
        StoreError: the store can't be used, or is another checkpoint's (`StoreMismatchError`).
    """
    _check_options(prefetch, eviction, hbm, dram, runtime)
    implementation = _implementation(hf_kwargs.pop("experts_implementation", None))
    path = str(path_or_id)
    with ExitStack() as undo:
        checkpoint = Checkpoint.open(path, model_class=model_class, **hf_kwargs)
        undo.callback(checkpoint.close)
        layouts, top_k = checkpoint.layouts, _top_k(checkpoint.config)
        budgets = _budgets(hbm, dram, runtime, layouts, top_k)
        directory = _store_directory(nvme, undo)
        store = _packed_store(checkpoint, directory, codec, progress)
        undo.callback(store.close)
        model_class = model_class or default_model_class(path, **hf_kwargs)
        with hollow_experts():
            model = model_class.from_pretrained(
                path, experts_implementation=implementation, **hf_kwargs
            )
        if runtime is None:  # "auto" again, now that the other weights have taken their part
            budgets = _budgets(hbm, dram, None, layouts, top_k)
        budgets.warn_below_cycle(_cycle_nbytes(layouts, top_k))
        _wrap(model, layouts, store, checkpoint, budgets, runtime, eviction, prefetch, undo)
    return model


def offload(
    model: PreTrainedModel,
    *,
    hbm: Size | None = None,
    dram: Size | None = None,
    nvme: str | Path | None = None,
    eviction: str | None = None,
    prefetch: str | Predictor = "next-gate",
    codec: str = "none",
    runtime: Runtime | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Move the experts of a model in memory to a store and free them; return the same model.

    Options are those of `from_pretrained`; `nvme` must not hold a store yet. If anything fails the
    model stays as it was. `model.tiered_mem.unwrap()` brings the experts back.

    Raises `AlreadyWrappedError`, and what `from_pretrained` does.
    """
    if getattr(model, "tiered_mem", None) is not None:
        raise AlreadyWrappedError(
            "this model is on a runtime already (model.tiered_mem); unwrap() it first"
        )
    _check_options(prefetch, eviction, hbm, dram, runtime)
    before = model.config._experts_implementation
    implementation = _implementation(before)
    with ExitStack() as undo:
        by_layer = {e.layer: ExpertLayout.of_module(e.module) for e in require_experts(model)}
        layouts, top_k = [by_layer[layer] for layer in sorted(by_layer)], _top_k(model.config)
        budgets = _budgets(hbm, dram, runtime, layouts, top_k)
        budgets.warn_below_cycle(_cycle_nbytes(layouts, top_k))
        directory = _store_directory(nvme, undo)
        _move_experts(model, directory, codec, progress)
        store = Store.open(directory)
        undo.callback(store.close)
        model.set_experts_implementation(implementation)
        _wrap(model, layouts, store, None, budgets, runtime, eviction, prefetch, undo)
        model.tiered_mem._stock_implementation = before
    return model


class TieredModel:
    """The handle of a wrapped model, `model.tiered_mem`."""

    def __init__(
        self,
        model: PreTrainedModel,
        layouts: Sequence[ExpertLayout],
        store: Store,
        checkpoint: Checkpoint | None,
        runtime: Runtime,
        owns_runtime: bool,
        prefetch: str | Predictor,
    ) -> None:
        self.model = model
        self.layouts = list(layouts)
        self.store = store
        self.runtime = runtime
        predictor = make_predictor(prefetch)
        self.prefetch = predictor.name
        self.closed = False
        self._owns_runtime = owns_runtime
        self._checkpoint = checkpoint
        self._resources = ExitStack()
        self._stock_implementation: str | None = None
        self._baseline = runtime.stats()
        self._space = runtime.attach(store, repair=self._reread if checkpoint else None)
        self._experts = find_experts(model)
        self._hooks = RouterHooks(
            model,
            self._experts,
            predictor,
            self._hint,
            layer_resident=self._space.layer_resident,
            worthwhile=self._space.prefetch_pays,
        )
        for _, module, layer in self._experts:
            module.tiered = TieredExperts(self._space, layer, self.layouts[layer], self._hooks)  # type: ignore[assignment]

    @property
    def budgets(self) -> Budgets:
        return self.runtime.budgets

    @property
    def nbytes(self) -> int:
        """Bytes of all experts."""
        return sum(layout.num_experts * layout.nbytes for layout in self.layouts)

    def stats(self) -> Stats:
        """Return the runtime's counts since the model was wrapped, or since `reset_stats`."""
        return self.runtime.stats() - self._baseline

    def reset_stats(self) -> None:
        """Count from now on."""
        self._baseline = self.runtime.stats()

    def prefetch_report(self) -> dict[str, Any]:
        """Return what was predicted and how well, by layer, and where prefetch is off and why."""
        layers = {
            layer: {"num_hints": hints, "num_right": right, "on": on}
            for layer, (hints, right, on) in self._space.precision().items()
        }
        return {"predictor": self.prefetch, "layers": layers, "notes": self._hooks.report()}

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
        if self.closed:
            return
        self.closed = True
        self._hooks.close()
        for _, module, _ in self._experts:
            del module.tiered
        if self._owns_runtime:
            self.runtime.close()
        self._space.close()
        self._resources.close()

    def unwrap(self) -> PreTrainedModel:
        """Bring the experts back into memory as the stock model's parameters, and close.

        Raises `RuntimeClosedError` if it is closed already; `StoreError` if a block can't be read
        (then the model stays wrapped).
        """
        if self.closed:
            raise RuntimeClosedError("this model is closed: its experts are gone; load it again")
        parameters = [self._read_layer(layer) for layer in range(len(self.layouts))]
        self.close()
        for _, module, layer in self._experts:
            for name, parameter in parameters[layer].items():
                delattr(module, name)  # the stand-in on meta
                module.register_parameter(name, parameter)
            del module.tiered_layout, module.tiered_layer
        self.model.set_experts_implementation(self._stock_implementation or "grouped_mm")
        del self.model.save_pretrained, self.model.tiered_mem
        return self.model

    def _read_layer(self, layer: int) -> dict[str, nn.Parameter]:
        layout = self.layouts[layer]
        whole = {
            field.name: torch.empty(layout.num_experts, *field.shape, dtype=field.dtype)
            for field in layout.fields
        }
        block = allocate(layout.nbytes)
        with self.store.snapshot() as snapshot:
            for index in range(layout.num_experts):
                snapshot.read(BlockKey(Kind.EXPERT, layer, index), block)
                for name, view in layout.views(torch.from_numpy(block)).items():
                    whole[name][index] = view
        return {
            name: nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
            for name, tensor in whole.items()
        }

    def _reread(self, key: BlockKey, out: npt.NDArray[np.uint8]) -> None:
        if self._checkpoint is None:
            raise StoreError(f"{key} is damaged in the store and has no other source")
        self._checkpoint.read_expert(key.layer, key.index, torch.from_numpy(out))

    def _hint(self, layer: int, ranked: Sequence[int], exact: bool) -> None:
        self._space.hint(layer, ranked, exact=exact)

    def __reduce__(self) -> Any:
        raise TieredMemError(
            "a wrapped model can't be pickled or copied: its experts are in a store; unwrap() it "
            "first, or load it again in the other process"
        )


def _wrap(
    model: PreTrainedModel,
    layouts: Sequence[ExpertLayout],
    store: Store,
    checkpoint: Checkpoint | None,
    budgets: Budgets,
    runtime: Runtime | None,
    eviction: str | None,
    prefetch: str | Predictor,
    undo: ExitStack,
) -> None:
    """Attach the handle. What `undo` holds becomes the handle's to close."""
    owns = runtime is None
    if runtime is None:
        runtime = Runtime.from_budgets(budgets, eviction=eviction or "lru")
        undo.callback(runtime.close)
    handle = TieredModel(model, layouts, store, checkpoint, runtime, owns, prefetch)
    handle._resources = undo.pop_all()
    model.tiered_mem = handle

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise TieredMemError(
            "a wrapped model has no expert weights to save; use its checkpoint, or unwrap() first"
        )

    model.save_pretrained = refuse


def _check_options(
    prefetch: str | Predictor,
    eviction: str | None,
    hbm: Size | None,
    dram: Size | None,
    runtime: Runtime | None,
) -> None:
    make_predictor(prefetch)
    if runtime is None:
        _core.check_eviction(eviction or "lru")
        return
    if runtime.closed:
        raise RuntimeClosedError("the runtime is closed: make a new one")
    if any(option is not None for option in (hbm, dram, eviction)):
        raise ConfigError("a given runtime has its budgets and policy: leave hbm, dram, eviction")


def _implementation(stock: str | None) -> str:
    if stock not in IMPLEMENTATIONS:
        raise ConfigError(
            f"experts_implementation={stock!r} computes by kernels of its own; leave it, or use "
            "one of " + ", ".join(repr(name) for name in IMPLEMENTATIONS if name)
        )
    return IMPLEMENTATIONS[stock]


def _top_k(config: Any) -> int | None:
    """Return how many experts a token uses in a layer; None if the config has no name we know."""
    text = config.get_text_config()
    values = [getattr(text, name, None) for name in _TOP_K_NAMES]
    return next((value for value in values if isinstance(value, int)), None)


def _cycle_nbytes(layouts: Sequence[ExpertLayout], top_k: int | None) -> int:
    return sum(layout.nbytes * (top_k or 1) for layout in layouts)


def _budgets(
    hbm: Size | None,
    dram: Size | None,
    runtime: Runtime | None,
    layouts: Sequence[ExpertLayout],
    top_k: int | None,
) -> Budgets:
    whole = sum(layout.num_experts * layout.slot_nbytes for layout in layouts)
    if runtime is not None:
        budgets = runtime.budgets
    else:
        budgets = Budgets.resolve(
            "auto" if hbm is None else hbm, "auto" if dram is None else dram, whole=whole
        )
    budgets.check_event(max(layout.slot_nbytes for layout in layouts) * (top_k or 1))
    return budgets


def _store_directory(nvme: str | Path | None, undo: ExitStack) -> Path:
    if nvme is not None:
        return Path(nvme)
    return Path(undo.enter_context(tempfile.TemporaryDirectory(prefix="tiered-mem-"))) / "store"


def _packed_store(
    checkpoint: Checkpoint, directory: Path, codec: str, progress: Progress | None
) -> Store:
    """Open the checkpoint's store for reading, packing what is missing first."""
    store = open_packed(checkpoint, directory)
    if store is None:
        pack(checkpoint, directory, codec=codec, progress=progress)
        store = Store.open(directory)
    return store


def _move_experts(
    model: PreTrainedModel, directory: Path, codec: str, progress: Progress | None
) -> None:
    """Write the experts of a model in memory into a new store, then drop them from the model."""
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(
            f"{directory} isn't empty: a model in memory goes into a store of its own; give a new "
            "directory"
        )
    total = sum(
        experts.module.num_experts * ExpertLayout.of_module(experts.module).nbytes
        for experts in require_experts(model)
    )
    done = 0
    with Store.open(directory, mode="w") as store:
        # Nothing else can have been packed from this very model: a name nobody else has.
        name = f"a {model.config.model_type} model in memory"
        store.set_metadata({"experts": {"checkpoint": name, "fingerprint": uuid.uuid4().hex}})
        for experts, layout in hollow_model(model):
            with store.transaction() as txn:
                for index in range(layout.num_experts):
                    block = allocate(layout.nbytes)
                    layout.copy_expert(experts.module, index, torch.from_numpy(block))
                    key = BlockKey(Kind.EXPERT, experts.layer, index)
                    txn.put(key, block, codec=codec, itemsize=layout.itemsize)
                    done += layout.nbytes
                    if progress is not None:
                        progress(done, total)
