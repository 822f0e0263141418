"""Stock transformers models with their experts on the runtime: load, wrap, unwrap, close."""

from __future__ import annotations

import re
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from tiered_mem.catalogue import Codec
from tiered_mem.config import Budgets, Size, WorkingSet
from tiered_mem.device import Backend
from tiered_mem.environment import FILE_NAMES
from tiered_mem.errors import (
    AlreadyWrappedError,
    ConfigError,
    NoExpertsError,
    RuntimeClosedError,
    StoreBusyError,
)
from tiered_mem.hf.checkpoint import Checkpoint
from tiered_mem.hf.detect import require_experts
from tiered_mem.hf.device import (
    choose_device,
    home_in_map,
    home_of,
    require_one_device,
    usable,
    warn_of_unused_gpu,
)
from tiered_mem.hf.experts import IMPLEMENTATIONS
from tiered_mem.hf.handle import Progress, TieredModel, put_back
from tiered_mem.hf.hollow import hollow_experts, hollow_model
from tiered_mem.hf.kv import tier_kv
from tiered_mem.hf.layout import ExpertLayout, per_expert_tensors
from tiered_mem.hf.loading import default_model_class
from tiered_mem.hf.pack import open_packed, pack
from tiered_mem.hf.room import room_for
from tiered_mem.hf.route import model_info
from tiered_mem.hf.working_set import working_set
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.policies.prefetch import Predictor, make_predictor
from tiered_mem.policy import DEFAULT_EVICTION, EvictionPolicy, resolve_eviction
from tiered_mem.runtime import Runtime
from tiered_mem.space import Repair
from tiered_mem.store import Store, allocate


def from_pretrained(
    path_or_id: str | Path,
    *,
    device: str | torch.device | None = None,
    hbm: Size | None = None,
    dram: Size | None = None,
    nvme: str | Path | None = None,
    eviction: str | type[EvictionPolicy] | None = None,
    prefetch: str | Predictor = "next-gate",
    codec: str = "none",
    runtime: Runtime | None = None,
    kv: Size | None = None,
    kv_dram: Size | None = None,
    prefixes: str | Path | None = None,
    model_class: type[Any] | None = None,
    progress: Progress | None = None,
    **hf_kwargs: Any,
) -> Any:
    """Load a checkpoint whose experts, and with `kv` its keys and values, needn't fit in memory.

    With `kv` it may be a dense model, too.

    The model is the stock one, without its expert weights; what it computes is what the unmodified
    model computes. `model.tiered_mem` is its handle (`TieredModel`).

    Args:
        path_or_id: A directory or hub id with safetensors files.
        device: Where the model goes, its experts' HBM with it: "cuda:0", "cpu", or "auto" (torch's
            accelerator if there is one). transformers' `device_map` may say it instead: all layers
            with experts on one device, and "auto" means the same as here. Default: torch's default
            device, the CPU unless it was set, where host memory plays HBM's part.
        hbm, dram: Budgets: bytes, "6GiB", "25%" (of all experts), or "auto" (the default): on a
            device, HBM then leaves room for activations and KV (`tiered_mem.hf.room`). `dram=0`
            means no DRAM tier.
        nvme: Directory of the store. Packed into on first use (`tiered-mem pack` does it ahead) and
            kept; None: a temporary one that goes with the model.
        eviction: Name of an eviction policy, or a class derived from
            `tiered_mem.policy.EvictionPolicy`; default "adaptive".
        prefetch: Name of the predictor, or a predictor of your own for this model.
        codec: "none" or "zstd", for blocks packed now.
        runtime: Put the model on this runtime, beside others; then it has the budgets and policy.
        kv, kv_dram: Budgets of keys and values in HBM and in DRAM (default: none), apart from the
            experts'; what doesn't fit goes to `nvme`. Default: transformers' own cache, all in
            memory. See `tiered_mem.tier_kv`.
        prefixes: With `kv`: a directory where prompts and answers are kept, so that one that starts
            with the same tokens computes only the rest, after a restart as well.
        model_class: transformers class to load with, if not the checkpoint's own.
        progress: Called with (bytes, bytes in all) while packing.
        **hf_kwargs: What `from_pretrained` of transformers takes.

    Raises:
        ConfigError, BudgetError: options that can't be used.
        DeviceError: a device that isn't there or can't be used.
        UnsupportedModelError: not a Mixture of Experts, or not behind transformers' interface.
        CheckpointError: files missing, truncated or not fitting the model.
        StoreError: the store can't be used, or is another checkpoint's (`StoreMismatchError`).
    """
    experts: dict[str, Any] = {
        "hbm": hbm,
        "dram": dram,
        "eviction": eviction,
        "prefetch": prefetch,
        "codec": codec,
        "runtime": runtime,
    }
    if kv is None and kv_dram is not None:
        raise ConfigError("kv_dram is a second tier for what kv=... holds: give kv, too")
    if kv is None and prefixes is not None:
        raise ConfigError("prefixes are stored from what kv=... holds: give kv, too")
    path = str(path_or_id)
    try:
        model = _load(path, device, nvme, model_class, progress, dict(hf_kwargs), **experts)
    except NoExpertsError:
        if kv is None:
            raise
        model = _load_dense(path, device, model_class, hf_kwargs)
    if kv is not None:
        try:
            tier_kv(model, kv, dram=kv_dram or 0, nvme=nvme, prefixes=prefixes)
        except BaseException:
            if hasattr(model, "tiered_mem"):
                model.tiered_mem.close()
            raise
    return model


def _load_dense(
    path: str,
    device: str | torch.device | None,
    model_class: type[Any] | None,
    hf_kwargs: dict[str, Any],
) -> Any:
    """Load a model without experts, all of it in memory of its device."""
    chosen, device_map = choose_device(device, hf_kwargs.pop("device_map", None))
    if device_map is not None:
        hf_kwargs["device_map"] = device_map
    model_class = model_class or default_model_class(path, **hf_kwargs)
    model = model_class.from_pretrained(path, **hf_kwargs)
    return model if chosen is None or device_map is not None else model.to(chosen)


def _load(
    path: str,
    device: str | torch.device | None,
    nvme: str | Path | None,
    model_class: type[Any] | None,
    progress: Progress | None,
    hf_kwargs: dict[str, Any],
    *,
    hbm: Size | None,
    dram: Size | None,
    eviction: str | type[EvictionPolicy] | None,
    prefetch: str | Predictor,
    codec: str,
    runtime: Runtime | None,
) -> Any:
    """Load a model with its experts on a runtime: see `from_pretrained`."""
    predictor = _check_options(prefetch, eviction, codec, hbm, dram, runtime)
    stock = hf_kwargs.pop("experts_implementation", None)
    implementation = _implementation(stock)
    chosen, device_map = choose_device(device, hf_kwargs.pop("device_map", None))
    if device_map is not None:
        hf_kwargs["device_map"] = device_map
    backend = None if chosen is None else _backend(chosen, runtime)
    with ExitStack() as undo:
        checkpoint = _open_checkpoint(path, model_class, hf_kwargs)
        undo.callback(checkpoint.close)
        if backend is None:
            backend = _backend(home_in_map(checkpoint.layer_of, device_map), runtime)
        if backend.name == "cpu" and device is None and device_map is None:
            warn_of_unused_gpu()
        layouts, needs = checkpoint.layouts, working_set(checkpoint.layouts, checkpoint.config)
        predictor.check(model_info(checkpoint.config, layouts[0].num_experts))
        policy = (
            runtime.eviction
            if runtime is not None
            else resolve_eviction(eviction or DEFAULT_EVICTION)
        )
        budgets = _budgets(hbm, dram, runtime, needs, backend)
        budgets.check(needs, policy)
        directory = _store_directory(nvme, undo)
        store = _packed_store(checkpoint, directory, codec, progress)
        undo.callback(store.close)
        model_class = model_class or default_model_class(path, **hf_kwargs)
        with hollow_experts(keep_stored=checkpoint.keeps_stored):
            model = model_class.from_pretrained(
                path, experts_implementation=implementation, **checkpoint.loading_options
            )
        owns_runtime = runtime is None
        if runtime is None:  # "auto" again, now that the other weights have taken their part
            had_cycle = budgets.hbm >= needs.cycle_nbytes
            room = room_for(model.config, layouts, model.dtype).nbytes
            budgets = _budgets(hbm, dram, None, needs, backend, room)
            budgets.check(needs, policy, warn=had_cycle)
            runtime = _new_runtime(budgets, policy, backend, undo)
        _wrap(model, layouts, store, checkpoint, runtime, predictor, stock, undo, owns_runtime)
    return model


def offload(
    model: PreTrainedModel,
    *,
    hbm: Size | None = None,
    dram: Size | None = None,
    nvme: str | Path | None = None,
    eviction: str | type[EvictionPolicy] | None = None,
    prefetch: str | Predictor = "next-gate",
    codec: str = "none",
    runtime: Runtime | None = None,
    progress: Progress | None = None,
) -> PreTrainedModel:
    """Move the experts of a model in memory to a store and free them; return the same model.

    They come back to HBM of the device that the model is on.

    Options are those of `from_pretrained`; `nvme` must not hold a store yet. If anything fails the
    model stays as it was. `model.tiered_mem.unwrap()` brings the experts back.

    Raises `AlreadyWrappedError`, and what `from_pretrained` does.
    """
    if any(hasattr(module, "tiered_layout") for module in model.modules()):
        raise AlreadyWrappedError(
            "this model is on a runtime already (model.tiered_mem); unwrap() it first"
        )
    predictor = _check_options(prefetch, eviction, codec, hbm, dram, runtime)
    before = model.config._experts_implementation
    implementation = _implementation(before)
    home = home_of(model, require_experts(model))
    require_one_device(model, home)
    backend = _backend(home, runtime)
    with ExitStack() as undo:
        by_layer = {e.layer: ExpertLayout.of_module(e.module) for e in require_experts(model)}
        layouts = [by_layer[layer] for layer in sorted(by_layer)]
        needs = working_set(layouts, model.config)
        predictor.check(model_info(model.config, layouts[0].num_experts))
        policy = (
            runtime.eviction
            if runtime is not None
            else resolve_eviction(eviction or DEFAULT_EVICTION)
        )
        room = room_for(model.config, layouts, model.dtype).nbytes
        # What the experts take on the device now is HBM's soon.
        freed = 0 if backend.in_place else needs.experts_nbytes
        budgets = _budgets(hbm, dram, runtime, needs, backend, room - freed)
        budgets.check(needs, policy)
        directory = _store_directory(nvme, undo)
        _require_empty(directory)
        with _removed_if_it_fails(directory), _put_back_if_it_fails(model):
            _move_experts(model, directory, codec, progress)
            store = Store.open(directory)
            undo.callback(store.close)
            model.set_experts_implementation(implementation)
            owns_runtime = runtime is None
            if runtime is None:
                runtime = _new_runtime(budgets, policy, backend, undo)
            _wrap(model, layouts, store, None, runtime, predictor, before, undo, owns_runtime)
    return model


def _wrap(
    model: PreTrainedModel,
    layouts: Sequence[ExpertLayout],
    store: Store,
    checkpoint: Checkpoint | None,
    runtime: Runtime,
    prefetch: Predictor,
    stock: str | None,
    undo: ExitStack,
    owns_runtime: bool,
) -> None:
    """Attach the handle. What `undo` holds becomes the handle's to close."""
    repair = None if checkpoint is None else _repair_from(checkpoint)
    space = runtime.attach(store, repair=repair)
    undo.callback(space.close)
    model.tiered_mem = TieredModel(
        model,
        layouts,
        store,
        checkpoint,
        space,
        prefetch,
        undo,
        stock,
        owns_runtime=owns_runtime,
    )


def _new_runtime(
    budgets: Budgets, eviction: str | type[EvictionPolicy], backend: Backend, undo: ExitStack
) -> Runtime:
    """Return a runtime of this model's own, closed with it."""
    runtime = Runtime.from_budgets(budgets, eviction=eviction, device=backend)
    undo.callback(runtime.close)
    return runtime


def _backend(device: torch.device, runtime: Runtime | None) -> Backend:
    """Return the backend of the device that experts are on, the given runtime's if there is one."""
    backend = usable(device) if runtime is None else runtime.backend
    if backend.device != device:
        raise ConfigError(
            f"the runtime is on {backend.device}, the layers with experts go to {device}: give a "
            "runtime of that device, or load the model to the runtime's by device="
        )
    return backend


def _repair_from(checkpoint: Checkpoint) -> Repair:
    # Doesn't refer to the handle: what the runtime holds must not keep a dropped model alive.
    def reread(key: BlockKey, out: npt.NDArray[np.uint8]) -> None:
        checkpoint.read_expert(key.layer, key.index, torch.from_numpy(out))

    return reread


@contextmanager
def _put_back_if_it_fails(model: PreTrainedModel) -> Iterator[None]:
    """Put the experts back into the model if the block fails."""
    before = model.config._experts_implementation
    kept = [(e.module, per_expert_tensors(e.module)) for e in require_experts(model)]
    try:
        yield
    except BaseException:
        for module, tensors in kept:
            if hasattr(module, "tiered_layout"):
                module.__dict__.pop("tiered", None)
                put_back(module, tensors)
        if model.config._experts_implementation != before:
            model.set_experts_implementation(before or "grouped_mm")
        raise


@contextmanager
def _removed_if_it_fails(directory: Path) -> Iterator[None]:
    """Remove the store that the block makes in `directory`, new or empty, if the block fails."""
    made = not directory.exists()
    try:
        yield
    except StoreBusyError:
        raise  # what lies there is another process's
    except BaseException:
        with suppress(OSError):  # such as a disk that became read-only: the first error tells
            for name in FILE_NAMES:
                (directory / name).unlink(missing_ok=True)
            if made:
                directory.rmdir()
        raise


def _open_checkpoint(
    path: str, model_class: type[Any] | None, hf_kwargs: dict[str, Any]
) -> Checkpoint:
    try:
        return Checkpoint.open(path, model_class=model_class, **hf_kwargs)
    except TypeError as error:
        # What from_pretrained of transformers doesn't know it passes on to the model's class.
        found = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if found is None or found[1] not in hf_kwargs:
            raise
        raise ConfigError(
            f"unknown option {found[1]!r}: neither tiered_mem.from_pretrained nor the model's own "
            "from_pretrained takes it"
        ) from error


def _check_options(
    prefetch: str | Predictor,
    eviction: str | type[EvictionPolicy] | None,
    codec: str,
    hbm: Size | None,
    dram: Size | None,
    runtime: Runtime | None,
) -> Predictor:
    """Refuse what needs no look at the model. Returns the predictor."""
    predictor = make_predictor(prefetch)
    Codec.choose(codec, itemsize=1)
    if runtime is None:
        resolve_eviction(eviction or DEFAULT_EVICTION)
        return predictor
    if not isinstance(runtime, Runtime):
        raise ConfigError(f"runtime is a tiered_mem.Runtime, not {runtime!r}")
    if runtime.closed:
        raise RuntimeClosedError("the runtime is closed: make a new one")
    if any(option is not None for option in (hbm, dram, eviction)):
        raise ConfigError("a given runtime has its budgets and policy: leave hbm, dram, eviction")
    return predictor


def _implementation(stock: str | None) -> str:
    if not isinstance(stock, str | None) or stock not in IMPLEMENTATIONS:
        raise ConfigError(
            f"experts_implementation={stock!r} isn't known to compute as tiered experts can; leave "
            "it, or use one of " + ", ".join(repr(name) for name in IMPLEMENTATIONS if name)
        )
    return IMPLEMENTATIONS[stock]


def _budgets(
    hbm: Size | None,
    dram: Size | None,
    runtime: Runtime | None,
    needs: WorkingSet,
    backend: Backend,
    room: int = 0,
) -> Budgets:
    if runtime is not None:
        return runtime.budgets
    return Budgets.for_backend(
        "auto" if hbm is None else hbm,
        "auto" if dram is None else dram,
        whole=needs.experts_nbytes,
        backend=backend,
        room=room,
    )


def _store_directory(nvme: str | Path | None, undo: ExitStack) -> Path:
    if nvme is not None:
        return Path(nvme)
    temporary = tempfile.mkdtemp(prefix="tiered-mem-")
    undo.callback(shutil.rmtree, temporary, ignore_errors=True)
    return Path(temporary) / "store"


def _packed_store(
    checkpoint: Checkpoint, directory: Path, codec: str, progress: Progress | None
) -> Store:
    """Open the checkpoint's store for reading, packing what is missing first."""
    store = open_packed(checkpoint, directory)
    if store is None:
        pack(checkpoint, directory, codec=codec, progress=progress)
        store = Store.open(directory)
    return store


def _require_empty(directory: Path) -> None:
    if directory.exists() and not directory.is_dir():
        raise ConfigError(f"{directory} is a file; a store is a directory: give a new one")
    if directory.exists() and any(directory.iterdir()):
        raise ConfigError(
            f"{directory} isn't empty: a model in memory goes into a store of its own; give a new "
            "directory"
        )


def _move_experts(
    model: PreTrainedModel, directory: Path, codec: str, progress: Progress | None
) -> None:
    """Write the experts of a model in memory into a new store, then drop them from the model."""
    layouts = [ExpertLayout.of_module(experts.module) for experts in require_experts(model)]
    total = sum(layout.num_experts * layout.nbytes for layout in layouts)
    done = 0
    with Store.open(directory, mode="w") as store:
        if store.metadata:
            raise StoreBusyError(f"another process has packed into {directory}: give a new one")
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
