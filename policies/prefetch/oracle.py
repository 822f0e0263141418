"""The future of a trace, with mistakes mixed in: what a predictor could be worth."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from tiered_mem.errors import ConfigError
from tiered_mem.keys import BlockKey, Kind

from .base import Predictor, Route, parse_number

_INDEX = np.uint64(0xFFFFFFFF)  # of a packed key: the block's number in its layer
_LAYER_SHIFT = np.uint64(32)


class Future(Protocol):
    """What is read of a `tiered_mem.trace.Trace`: events, and their packed keys (space 0)."""

    @property
    def header(self) -> Any: ...

    @property
    def offsets(self) -> npt.NDArray[Any]: ...

    @property
    def keys(self) -> npt.NDArray[np.uint64]: ...

    @property
    def event_layer(self) -> npt.NDArray[Any]: ...

    @property
    def event_sequence(self) -> npt.NDArray[Any]: ...


class Oracle(Predictor):
    """Names the keys of events to come, each right with a set probability. Simulator only.

    At an event it guesses the one `lookahead` events later in the same sequence: as many keys as
    that will use, each true one kept with probability `recall`, each other replaced by a wrong
    block of the same layer (while there are such). So its precision is its recall. The order says
    nothing of which are right.

    Args:
        recall: 0 to 1.
        lookahead: Events; at most as many as the trace has layers.
    """

    name = "oracle"
    summary = "the trace's own future, with a set share of mistakes (simulator only)"
    source = "clairvoyance with errors, as a bound for all other predictors"
    arguments = "RECALL[,LOOKAHEAD]"
    simulator_only = True

    def __init__(self, recall: float = 1.0, lookahead: int = 1) -> None:
        self.recall, self.lookahead = recall, lookahead
        self._guesses: list[list[int]] = []
        self._layers: list[int] = []
        self._targets: list[list[int]] = []

    @classmethod
    def from_arguments(cls, arguments: Sequence[str]) -> Oracle:
        """Raises `ConfigError` for anything but a recall of 0 to 1 and a whole number from 1."""
        if len(arguments) > 2:
            raise ConfigError(f"prefetch={cls.name!r} takes a recall and a lookahead, no more")
        recall = parse_number(cls.name, "the recall", arguments[0], 0, 1) if arguments else 1.0
        if len(arguments) < 2:
            return cls(recall)
        ahead = parse_number(cls.name, "the lookahead", arguments[1], 1, 65536, whole=True)
        return cls(recall, int(ahead))

    def foresee(self, trace: Future, seed: int = 0) -> None:
        """Read a trace and make all guesses: the same ones for the same seed.

        Raises `ConfigError` if it is to look further than the layers go: a layer's next event but
        one can't be hinted before its next one has come.
        """
        layers = np.asarray(trace.event_layer)
        num_layers = len(np.unique(layers))
        if num_layers and self.lookahead > num_layers:
            raise ConfigError(
                f"prefetch='oracle': a lookahead of {self.lookahead} events goes beyond a token: "
                f"the trace has {num_layers} layers; set one of 1 to {num_layers}"
            )
        self._layers = layers.tolist()
        self._targets = _targets(np.asarray(trace.event_sequence), self.lookahead)
        self._guesses = self._guess(trace, np.random.default_rng(seed))

    def hints(self, event: int) -> list[tuple[int, Sequence[int]]]:
        """Return (layer, ranked block numbers) for each event that is to be hinted at this one.

        At a sequence's first event these are all up to `lookahead`; then one, until the end.
        """
        return [(self._layers[to], self._guesses[to]) for to in self._targets[event]]

    def predict(self, route: Route) -> Sequence[int]:
        """Raises `ConfigError`: no running model's future is known."""
        raise ConfigError(
            "prefetch='oracle' knows the future of a recorded trace alone: use it in tiered-mem "
            "compare, and next-gate with a running model"
        )

    def _guess(self, trace: Future, generator: np.random.Generator) -> list[list[int]]:
        keys, offsets = np.asarray(trace.keys, np.uint64), np.asarray(trace.offsets)
        pools = _blocks_by_layer(keys, trace.header.num_experts)
        indices = (keys & _INDEX).tolist()
        kept = (generator.random(len(keys)) < self.recall).tolist()
        guesses: list[list[int]] = []
        for first, end in zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True):
            if first == end:
                guesses.append([])
                continue
            ids = indices[first:end]
            right = [index for index, keep in zip(ids, kept[first:end], strict=True) if keep]
            pool = pools[int(keys[first] >> _LAYER_SHIFT)]
            wrong = _wrong(pool, ids, len(ids) - len(right), generator)
            guesses.append(generator.permutation(right + wrong).tolist())
        return guesses


def _targets(sequences: npt.NDArray[Any], lookahead: int) -> list[list[int]]:
    """Return, for each event, the later events of its sequence that it is to hint."""
    targets: list[list[int]] = [[] for _ in range(len(sequences))]
    by_sequence = np.argsort(sequences, kind="stable")
    cuts = np.flatnonzero(np.diff(sequences[by_sequence])) + 1
    for events in np.split(by_sequence, cuts):
        mine = events.tolist()
        if mine:
            targets[mine[0]] = mine[1 : lookahead + 1]
        for position in range(1, len(mine) - lookahead):
            targets[mine[position]] = [mine[position + lookahead]]
    return targets


def _blocks_by_layer(
    keys: npt.NDArray[np.uint64], num_experts: int | None
) -> dict[int, npt.NDArray[np.int64]]:
    """Return the block numbers of each (kind, layer): all experts, or what the trace names."""
    found = np.unique(keys)
    partitions = found >> _LAYER_SHIFT
    pools = {}
    for partition in np.unique(partitions).tolist():
        seen = (found[partitions == partition] & _INDEX).astype(np.int64)
        is_expert = BlockKey.unpack(partition << _LAYER_SHIFT).kind is Kind.EXPERT
        everyone = np.arange(num_experts) if is_expert and num_experts else seen
        pools[partition] = np.union1d(seen, everyone)
    return pools


def _wrong(
    pool: npt.NDArray[np.int64], ids: Sequence[int], count: int, generator: np.random.Generator
) -> list[int]:
    """Draw `count` different blocks of the pool that aren't in `ids`, or all there are."""
    if count == 0:
        return []
    # Enough of them whichever of `ids` are drawn too.
    drawn = generator.choice(pool, min(len(pool), count + len(ids)), replace=False).tolist()
    right = set(ids)
    return [index for index in drawn if index not in right][:count]
