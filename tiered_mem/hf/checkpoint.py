"""A transformers checkpoint as a source of experts: one expert at a time, read by its bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel

from tiered_mem.errors import CheckpointError, UnsupportedModelError
from tiered_mem.hf.detect import require_experts
from tiered_mem.hf.expert_layer import ExpertLayer
from tiered_mem.hf.layout import ExpertLayout, per_expert_tensors
from tiered_mem.hf.loading import Loading, default_model_class, intercept_loading, load_config
from tiered_mem.hf.quantised import asks_to_dequantise, loading_options
from tiered_mem.hf.recipe import Recipe, group_keys
from tiered_mem.hf.tensor_file import TensorFile, TensorInfo


class Checkpoint:
    """The experts of a safetensors checkpoint, in the layout and dtype the model will run with.

    `layouts[layer]` describes the blocks of each Experts module, `names[layer]` is its name in the
    model; layers count Experts modules in forward order, those with tied weights once (`layer_of`
    maps every module's name to its layer). Everything that can be checked without reading tensors
    is checked on opening: files, sizes, names, shapes, dtypes.
    """

    def __init__(self, loading: Loading, *, keep_stored: bool = True) -> None:
        """Take over what transformers resolved for a load. Reads file headers only.

        Experts that transformers dequantises as it loads them stay quantised in their blocks and
        are dequantised when used (`ExpertLayout.weights`), unless `keep_stored` is false.

        Raises:
            UnsupportedModelError: no experts, or experts outside transformers' experts interface.
            CheckpointError: not safetensors; a file missing or truncated; an expert tensor missing
                or of a shape the model can't take.
        """
        self.model_type: str = loading.model.config.model_type
        self.name = str(loading.config.pretrained_model_name_or_path)
        self.dtype: torch.dtype = loading.config.dtype
        experts = require_experts(loading.model)
        _refuse_quantizing(loading, [module_name for module_name, _, _ in experts])
        self._files = _open_files(loading)
        self._where = {key: file for file in self._files for key in file.tensors}
        infos: dict[str, TensorInfo] = {k: f.tensors[k] for k, f in self._where.items()}
        _check_index(loading, infos)
        self.config = loading.model.config
        self._quantizer = loading.config.hf_quantizer
        recipes = {t: r for r in group_keys(loading, infos).values() for t in r.targets}

        self._layers: list[ExpertLayer] = []
        self.names: list[str] = []
        self.layer_of: dict[str, int] = {}
        for name, module, _ in experts:
            root = _weights_of(name, module, loading.model, recipes)
            if root not in self.names:
                self.names.append(root)
                self._layers.append(ExpertLayer(root, loading.model.get_submodule(root), recipes))
            self.layer_of[name] = self.names.index(root)
        self.keeps_stored = keep_stored
        self.loading_options: dict[str, Any] = {}
        self.layouts = [
            layer.lay_out(infos, self.config, self._quantizer, keep_stored)
            for layer in self._layers
        ]
        self.expert_keys = frozenset(
            key for layer in self._layers for recipe in layer.recipes for key in recipe.keys
        )
        self.fingerprint = self._fingerprint()

    @classmethod
    def open(
        cls,
        path_or_id: str | os.PathLike[str],
        *,
        dtype: str | torch.dtype | None = None,
        model_class: type[Any] | None = None,
        dequantise: bool = False,
        **hf_kwargs: Any,
    ) -> Checkpoint:
        """Open a local directory or hub id as `model_class.from_pretrained` would, reading headers.

        `dtype` and `hf_kwargs` mean what they mean there (None and "auto": the checkpoint's own).
        `model_class` defaults to what `default_model_class` finds. Quantised experts stay so in
        their blocks, unless `dequantise` or `quantization_config` (`dequantize=True`) says
        otherwise; `loading_options` are those to load the rest with. A model that can't be wrapped
        is refused before a file of weights is fetched or opened. Raises what `Checkpoint()` does,
        and `UnsupportedModelError` for quantisation whose package isn't installed.
        """
        path = os.fspath(path_or_id)
        _require_local(path)
        try:
            model_class = model_class or default_model_class(path, **hf_kwargs)
            _refuse_by_config(path, model_class, hf_kwargs)
            keep_stored = not (dequantise or asks_to_dequantise(hf_kwargs))
            given = {**hf_kwargs, "dtype": dtype}
            options = loading_options(load_config(path, **hf_kwargs), given)
            taken: list[Checkpoint] = []

            def take(loading: Loading, resume: Any) -> Any:
                taken.append(cls(loading, keep_stored=keep_stored))
                raise _Taken

            with intercept_loading(take):
                model_class.from_pretrained(path, **options)
        except _Taken:
            taken[0].loading_options = options
            return taken[0]
        except ImportError as error:
            raise UnsupportedModelError(f"transformers can't load {path} here: {error}") from error
        except (OSError, ValueError, SafetensorError) as error:
            raise CheckpointError(f"can't open the checkpoint {path}: {error}") from error
        raise CheckpointError(
            f"transformers loaded {path} without reading safetensors files; save the model with "
            "save_pretrained() and use that directory"
        )

    @property
    def num_layers(self) -> int:
        """Number of Experts modules."""
        return len(self.layouts)

    def num_experts(self, layer: int) -> int:
        """Number of experts of a layer."""
        return self.layouts[layer].num_experts

    @property
    def num_blocks(self) -> int:
        """Number of experts of all layers."""
        return sum(layout.num_experts for layout in self.layouts)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks of all layers."""
        return sum(layout.num_experts * layout.nbytes for layout in self.layouts)

    @property
    def other_files(self) -> dict[str, str]:
        """The path of the file of each tensor that isn't part of an expert, by file key."""
        return {k: f.path for k, f in self._where.items() if k not in self.expert_keys}

    def read_expert(self, layer: int, index: int, out: torch.Tensor) -> None:
        """Read one expert into `out`, a uint8 tensor of at least `layouts[layer].nbytes` elements.

        Reads only that expert's bytes, unless the layer has to be converted whole (`reads_whole`).
        Safe from several threads. Raises `CheckpointError` if the file changed or became shorter.
        """
        with self.reader(layer) as reader:
            reader.read(index, out)

    @contextmanager
    def reader(self, layer: int) -> Iterator[LayerReader]:
        """Read several experts of a layer; a layer that must be converted whole is so only once.

        Holds one expert at a time, or one layer where `reads_whole(layer)`.
        """
        reader = LayerReader(self, self._layers[layer], self.layouts[layer])
        try:
            yield reader
        finally:
            reader.close()

    def reads_whole(self, layer: int) -> bool:
        """Whether an expert of this layer can only be made from the whole layer's tensors."""
        return not all(recipe.by_expert for recipe in self._layers[layer].recipes)

    def close(self) -> None:
        """Close the files. Closing twice is fine."""
        for file in self._files:
            file.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def _read(self, key: str, begin: int, end: int | None) -> torch.Tensor:
        return self._where[key].read(key, begin, end)

    def _fingerprint(self) -> str:
        """Name what the blocks are made of: model type, recipes, file headers, a page per expert.

        The dtype is no part of it: it is compared by itself, and told apart in the message. Nor is
        the config: what of it touches the experts shows in the recipes and layouts.
        """
        digest = hashlib.sha256(self.model_type.encode())
        pieces: dict[str, int] = {}
        for layer in self._layers:
            for recipe in layer.recipes:
                digest.update(recipe.describe().encode())
                for keys in recipe.sources.values():
                    # One tensor of all experts, or a tensor for each.
                    fused = recipe.by_expert and len(keys) == 1
                    pieces |= dict.fromkeys(keys, layer.num_experts if fused else 1)
        for file in self._files:
            file.add_to_digest(digest, {k: pieces[k] for k in file.tensors if k in pieces})
        return digest.hexdigest()


class LayerReader:
    """Reads experts of one layer. Made by `Checkpoint.reader`."""

    def __init__(self, checkpoint: Checkpoint, layer: ExpertLayer, layout: ExpertLayout) -> None:
        self._checkpoint, self._layer, self._layout = checkpoint, layer, layout
        self._whole: dict[str, torch.Tensor] = {}

    def read(self, index: int, out: torch.Tensor) -> None:
        """Read expert `index` into `out`, uint8 [>= layout.nbytes]."""
        if not 0 <= index < self._layout.num_experts:
            raise IndexError(f"expert {index} of a layer of {self._layout.num_experts}")
        views = self._layout.views(out)
        self._layout.clear_padding(out)
        for recipe in self._layer.recipes:
            for name, tensor in self._fields(recipe, index).items():
                view = views.get(name)
                if view is not None:
                    if tensor.shape != view.shape or tensor.dtype != view.dtype:
                        raise CheckpointError(
                            f"{name} of expert {index} of {self._layer.name} became {tensor.dtype} "
                            f"{list(tensor.shape)}, not {view.dtype} {list(view.shape)}"
                        )
                    view.copy_(tensor)

    def close(self) -> None:
        """Let go of a layer that was converted whole."""
        self._whole.clear()

    def _fields(self, recipe: Recipe, index: int) -> dict[str, torch.Tensor]:
        """What the recipe gives to a block: the file's tensors, or the parameters they make."""
        layer, read, config = self._layer, self._checkpoint._read, self._checkpoint.config
        quantizer = self._checkpoint._quantizer
        if recipe.target in layer.kept:
            return recipe.read_one(index, read)
        if recipe.by_expert:
            made = recipe.make_one(index, read, layer.one, config, quantizer)
            return {layer.field(target): tensor[0] for target, tensor in made.items()}
        if recipe.target not in self._whole:
            self._whole |= recipe.make(read, layer.all, config, quantizer)
        return {layer.field(t): self._whole[t][index] for t in recipe.targets if layer.field(t)}


def _weights_of(
    name: str, module: nn.Module, model: PreTrainedModel, recipes: dict[str, Recipe]
) -> str:
    """The name of the module whose tensors the file has for this one: itself, or one tied to it."""
    ties: dict[str, str] = getattr(model, "all_tied_weights_keys", {})
    parameter = f"{name}.{next(iter(per_expert_tensors(module)))}"
    if parameter not in recipes:
        tied = [ties.get(parameter), *(k for k, source in ties.items() if source == parameter)]
        for other in tied:
            if other in recipes:
                return other.rpartition(".")[0]
    return name


def _require_local(path: str) -> None:
    """Refuse a path that isn't there by that name; transformers would take it for a hub id."""
    is_path = path.startswith(("/", ".", "~")) or path.count("/") > 1
    if is_path and not os.path.exists(path):
        raise CheckpointError(
            f"there is no checkpoint at {path}: name a directory, or a hub id such as owner/model"
        )


class _Taken(Exception):
    """No error: ends a load that was only looked at."""


def _refuse_by_config(path: str, model_class: type[Any], hf_kwargs: dict[str, Any]) -> None:
    """Build the model on meta from its config alone, and refuse it if it can't be wrapped."""
    build = getattr(model_class, "from_config", None) or model_class._from_config
    trust = {k: v for k, v in hf_kwargs.items() if k == "trust_remote_code"}
    with torch.device("meta"):
        require_experts(build(load_config(path, **hf_kwargs), **trust))


def _refuse_quantizing(loading: Loading, names: list[str]) -> None:
    """Refuse experts that would be quantised while loading: their bytes aren't in the files."""
    quantizer = loading.config.hf_quantizer
    if quantizer is None or quantizer.pre_quantized:
        return
    for name in names:
        module = loading.model.get_submodule(name)
        for parameter in per_expert_tensors(module):
            if quantizer.param_needs_quantization(loading.model, f"{name}.{parameter}"):
                raise UnsupportedModelError(
                    f"{type(quantizer).__name__} would quantise the experts of "
                    f"{loading.model.config.model_type!r} while loading; experts are packed as the "
                    "checkpoint has them: load without quantization_config, or save the quantised "
                    "model and use that checkpoint"
                )


def _open_files(loading: Loading) -> list[TensorFile]:
    paths = loading.files
    name = loading.config.pretrained_model_name_or_path
    if loading.state_dict is not None or not paths:
        raise CheckpointError(
            f"{name}: experts are read from safetensors files, not from a state_dict; "
            "for a model in memory use tiered_mem.offload(model)"
        )
    others = [path for path in paths if not path.endswith(".safetensors")]
    if others:
        raise CheckpointError(
            f"{others[0]} isn't a safetensors file, so single experts can't be read from it; "
            "convert the checkpoint once: from_pretrained(...).save_pretrained(new_directory)"
        )
    files: list[TensorFile] = []
    try:
        for path in paths:
            files.append(TensorFile(path))
    except CheckpointError:
        for file in files:
            file.close()
        raise
    return files


def _check_index(loading: Loading, infos: dict[str, TensorInfo]) -> None:
    """Raise `CheckpointError` if the index names tensors that its files don't hold."""
    metadata = loading.config.sharded_metadata or {}
    missing = [key for key in metadata.get("weight_map", {}) if key not in infos]
    if missing:
        raise CheckpointError(
            f"the index of {loading.config.pretrained_model_name_or_path} names "
            f"{len(missing)} tensors its files don't hold ({missing[0]}, ...); "
            "the checkpoint is incomplete, fetch it again"
        )
