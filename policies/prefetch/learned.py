"""A small head, trained on recorded hidden states, in place of the next layer's gate."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt

from tiered_mem.errors import ConfigError

from .base import Floats, ModelInfo, Predictor, Route

FORMAT = 1
EPSILON = 1e-6


# What numpy and zipfile raise on files that hold no head, by measure.
_NOT_A_HEAD = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    TypeError,
    NotImplementedError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
)


class Head(NamedTuple):
    """What is in a head's file: one linear map or tiny MLP for each pair of layers.

    Its scores are `weight @ x + bias`, or `weight @ relu(inner_weight @ x + inner_bias) + bias`,
    of the residual x divided by its root mean square.
    """

    model: str
    num_experts: int
    hidden_size: int
    pairs: npt.NDArray[np.int64]
    """[pairs, 2]: the layer that the residual is of, the layer whose experts are scored."""
    weight: Floats
    """[pairs, experts, hidden], or [pairs, experts, units]."""
    bias: Floats
    """[pairs, experts]"""
    inner_weight: Floats | None = None
    """[pairs, units, hidden]"""
    inner_bias: Floats | None = None
    """[pairs, units]"""

    def save(self, file: BinaryIO) -> None:
        """Write an npz, weights as float16."""
        facts = {
            "format": FORMAT,
            "model": self.model,
            "num_experts": self.num_experts,
            "hidden_size": self.hidden_size,
        }
        arrays: dict[str, npt.NDArray[Any]] = {
            "pairs": self.pairs,
            "weight": self.weight.astype(np.float16),
            "bias": self.bias,
        }
        if self.inner_weight is not None and self.inner_bias is not None:
            arrays["inner_weight"] = self.inner_weight.astype(np.float16)
            arrays["inner_bias"] = self.inner_bias
        np.savez_compressed(file, header=np.array(json.dumps(facts)), **arrays)  # type: ignore[arg-type]

    @classmethod
    def load(cls, path: str | Path) -> Head:
        """Raises `ConfigError` if there is no head in that file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                return cls._of(dict(file))
        except FileNotFoundError:
            raise ConfigError(f"there is no head {path}: tiered-mem train-head makes one") from None
        except _NOT_A_HEAD as error:
            raise ConfigError(
                f"{path} is no head ({error}): make one with tiered-mem train-head"
            ) from error

    @classmethod
    def _of(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Head:
        facts = json.loads(str(arrays["header"]))
        if facts["format"] != FORMAT:
            raise ValueError(f"its format is {facts['format']}, this version reads {FORMAT}")

        def floats(name: str) -> Floats:
            return arrays[name].astype(np.float32)

        is_mlp = "inner_weight" in arrays
        head = cls(
            str(facts["model"]),
            int(facts["num_experts"]),
            int(facts["hidden_size"]),
            arrays["pairs"].astype(np.int64),
            floats("weight"),
            floats("bias"),
            floats("inner_weight") if is_mlp else None,
            floats("inner_bias") if is_mlp else None,
        )
        head._check_shapes()
        return head

    def _check_shapes(self) -> None:
        num_pairs, inside = len(self.pairs), self.hidden_size
        shapes: list[tuple[npt.NDArray[Any], tuple[int, ...]]] = [
            (self.pairs, (num_pairs, 2)),
            (self.bias, (num_pairs, self.num_experts)),
        ]
        if self.inner_weight is not None and self.inner_bias is not None:
            inside = self.inner_bias.shape[-1]
            shapes.append((self.inner_weight, (num_pairs, inside, self.hidden_size)))
            shapes.append((self.inner_bias, (num_pairs, inside)))
        shapes.append((self.weight, (num_pairs, self.num_experts, inside)))
        for array, shape in shapes:
            if array.shape != shape:
                raise ValueError(f"an array is {array.shape}, not {shape}")


class Learned(Predictor):
    """Scores the next layer's experts from this layer's residual, by a head trained beforehand.

    Unlike next-gate it has learned what the layers between add, it predicts across the end of a
    token too, and it needs nothing of the model's code. Of a prompt it sees the last token alone.
    """

    name = "learned"
    summary = "a linear or tiny MLP head on the residual stream; tiered-mem train-head trains it"
    source = "trained predictors: Pre-gated MoE (Hwang et al. 2024), ProMoE (Song et al. 2024)"
    arguments = "PATH.npz"
    uses_residual = True
    learns = False

    def __init__(self, head: Head, path: str = "the head") -> None:
        self._head, self._path = head, path
        self._pairs = {(int(a), int(b)): i for i, (a, b) in enumerate(head.pairs)}

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> Learned:
        """Raises `ConfigError` if no head's file is named."""
        path = ",".join(arguments)
        if not path:
            raise ConfigError(
                "prefetch='learned' needs its head: learned(PATH.npz), made by tiered-mem "
                "train-head from a recorded trace"
            )
        return cls(Head.load(path), path)

    def check(self, model: ModelInfo) -> None:
        """Refuse the head of another model."""
        head = self._head
        if _last_part(model.name) != _last_part(head.model):
            raise ConfigError(
                f"{self._path} is a head for {head.model!r}, this model is {model.name!r}: train "
                "one for it with tiered-mem train-head"
            )
        shapes = (head.num_experts, head.hidden_size or model.hidden_size)
        if shapes != (model.num_experts, model.hidden_size or head.hidden_size):
            raise ConfigError(
                f"{self._path} is a head for a {head.model!r} of {head.num_experts} experts and "
                f"hidden size {head.hidden_size}; this one has {model.num_experts} and "
                f"{model.hidden_size}: train one for it with tiered-mem train-head"
            )

    def predict(self, route: Route) -> Sequence[int]:
        """Return the 2k best of the last token's scores."""
        pair = self._pairs.get((route.layer, route.next_layer))
        if pair is None:
            return ()
        residual = route.residual()
        if residual is None or not residual.any():  # a trace holds zeros where it wasn't known
            return ()
        head = self._head
        inside = residual / np.sqrt(residual.dot(residual) / len(residual) + EPSILON)
        if head.inner_weight is not None and head.inner_bias is not None:
            inside = np.maximum(head.inner_weight[pair] @ inside + head.inner_bias[pair], 0)
        scores = head.weight[pair] @ inside + head.bias[pair]
        ranked: list[int] = (-scores).argsort(kind="stable")[: 2 * route.top_k].tolist()
        return ranked


def _last_part(name: str) -> str:
    """A model's name without the folder or organisation it was loaded from."""
    return name.rstrip("/").rpartition("/")[2]
