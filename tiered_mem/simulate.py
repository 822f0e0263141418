"""The simulator: the runtime without bytes.

A trace's events go through the same tiers, residency, policies, hints and waves as a model's; only
the links are virtual. They carry their bytes per second on a clock that goes on while events
compute and while they wait. What is demanded overtakes what is prefetched at the next piece, what
leaves HBM for DRAM takes the link's other direction, and a prediction becomes a transfer only
where the runtime would let it.

Events come in the trace's order, those of several sequences interleaved as they were, on one
device: while one computes or waits, no other does. An event's compute time is spread evenly over
its blocks, in the order in which they arrive.

Where blocks come and go, an event that creates some puts them into HBM unread, as many as fit, and
removed ones leave all tiers. Neither is an access: those are reads.

Traces of prefixes and of single requests have no compute and no predictions; for prefixes see
`tiered_mem.simulate_prefixes`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from tiered_mem import _core
from tiered_mem.device.host import HOST
from tiered_mem.errors import ChecksumError, ConfigError
from tiered_mem.keys import BlockKey, KeyArray, Kind, unpack_keys
from tiered_mem.policies.prefetch import Decision, ModelInfo, Oracle, Predictor, make_predictor
from tiered_mem.policy import DEFAULT_EVICTION, EvictionPolicy, resolve_eviction
from tiered_mem.reading import Reading, blocks_of_wave
from tiered_mem.simulate_prefixes import run_prefixes
from tiered_mem.stats import Log
from tiered_mem.trace import Action, Form, Phase, Trace

_LAYER_SHIFT = np.uint64(32)


@dataclass(frozen=True)
class LinkSpeed:
    """What a link carries, and the seconds until a chunk's last byte has arrived."""

    bytes_per_second: float
    latency: float = 0.0

    def __post_init__(self) -> None:
        if not (self.bytes_per_second > 0 and self.latency >= 0):
            raise ConfigError(
                f"a link of {self.bytes_per_second} bytes/s and {self.latency} s latency can't be: "
                "give a speed above 0 and a latency from 0 on"
            )

    def seconds(self, nbytes: int) -> float:
        """Return how long `nbytes` take, alone on the link."""
        return self.latency + nbytes / self.bytes_per_second


@dataclass(frozen=True)
class Machine:
    """The links, and how fast a device computes.

    `hbm` is the link between DRAM and HBM, the same in both directions at once. `compute` is the
    bytes per second at which the device reads weights: an event whose time wasn't recorded computes
    for as long as its blocks and its layer's dense weights take to be read.
    """

    nvme: LinkSpeed
    hbm: LinkSpeed
    compute: float

    def __post_init__(self) -> None:
        if not self.compute > 0:
            raise ConfigError(f"compute is {self.compute} bytes/s; it must be above 0")

    def virtual_links(self) -> dict[str, tuple[float, float]]:
        nvme, hbm = ((link.bytes_per_second, link.latency) for link in (self.nvme, self.hbm))
        return {"nvme_to_hbm": nvme, "dram_to_hbm": hbm, "hbm_to_dram": hbm}

    def event_seconds(self, trace: Trace) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        """Return the compute before each event and inside it: float64 seconds [num_events] each."""
        before = np.zeros(trace.num_events)
        if trace.compute_seconds is not None:
            if trace.gap_seconds is not None:
                before = trace.gap_seconds.astype(np.float64)
            return before, trace.compute_seconds.astype(np.float64)
        if trace.header.form is not Form.EVENTS:
            return before, before
        if trace.header.dense_nbytes:
            dense = np.array(trace.header.dense_nbytes, np.float64)
            before = dense[trace.event_layer] / self.compute
        blocks = np.add.reduceat(trace.nbytes.astype(np.float64), trace.offsets[:-1])
        blocks[trace.event_action != Action.READ] = 0
        return before, blocks / self.compute


@dataclass
class Run:
    """What a simulation counted. Accesses are keys of events; a key in flight is a miss."""

    trace: str
    eviction: str
    prefetch: str
    hbm_nbytes: int
    dram_nbytes: int
    num_events: int = 0
    num_tokens: int = 0
    num_accesses: int = 0
    num_hits: int = 0
    num_misses: int = 0
    num_in_flight: int = 0  # of the misses
    num_dram_hits: int = 0  # of the misses
    hits_by_kind: dict[str, dict[str, int]] = field(default_factory=dict)
    nbytes_accessed: int = 0
    byte_miss_ratio: float = 0.0
    nbytes_moved: dict[str, int] = field(default_factory=dict)
    compute_seconds: float = 0.0
    stall_seconds: float = 0.0
    total_seconds: float = 0.0
    stall_per_token_seconds: float = 0.0
    num_evictions: int = 0
    num_hints: int = 0
    num_prefetched: int = 0
    num_prefetched_used: int = 0
    wasted_prefetch_nbytes: int = 0
    prefill: dict[str, float] = field(default_factory=dict)
    decode: dict[str, float] = field(default_factory=dict)

    @property
    def hit_rate(self) -> float:
        return self.num_hits / self.num_accesses if self.num_accesses else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Return counts and derived figures as plain JSON values."""
        return asdict(self) | {"hit_rate": self.hit_rate}


def simulate(
    trace: Trace,
    *,
    hbm: int,
    dram: int = 0,
    eviction: str | type[EvictionPolicy] = DEFAULT_EVICTION,
    prefetch: str | Predictor = "none",
    machine: Machine,
    on_log: Callable[[Log], None] | None = None,
) -> Run:
    """Replay a trace against HBM and DRAM of so many bytes.

    `on_log` is called once with all decisions.

    Raises:
        ConfigError: an unknown policy or predictor, one that needs what the trace doesn't hold, a
            tier or a predictor for a trace that can't have it.
        EventTooLargeError: HBM holds not even one block.
        PolicyError: a plug-in misbehaved.
    """
    predictor = require_predictor(trace, prefetch)
    policy = resolve_simulated(trace, eviction, dram)
    name = prefetch if isinstance(prefetch, str) else predictor.name
    run = Run(trace.name, policy, name, hbm, dram)
    run.num_events, run.num_tokens = trace.reads.num_events, trace.num_tokens
    run.num_accesses = trace.reads.num_accesses
    run.nbytes_accessed = int(trace.reads.nbytes.sum())
    if trace.header.form is Form.PREFIX:
        if on_log is not None:
            raise ConfigError(f"{trace.name} is a trace of prefixes: its runs keep no log")
        run_prefixes(trace, run, machine)
    else:
        _EventRun(trace, run, machine, predictor, on_log).go()
    run.num_misses = run.num_accesses - run.num_hits
    run.total_seconds = run.compute_seconds + run.stall_seconds
    run.stall_per_token_seconds = run.stall_seconds / max(run.num_tokens, 1)
    return run


def resolve_simulated(trace: Trace, eviction: str | type[EvictionPolicy], dram: int = 0) -> str:
    """Return a policy's name as the core knows it. Raises `ConfigError` if it can't run here."""
    if eviction == "belady":
        if trace.header.form is Form.PREFIX:
            raise ConfigError(
                f"{trace.name} is a trace of prefixes: eviction='belady' doesn't run there; its "
                "misses are among the bounds"
            )
        if dram:
            raise ConfigError("eviction='belady' knows the future of one tier: leave dram at 0")
        return "belady"
    if dram and trace.header.form is not Form.EVENTS:
        raise ConfigError(f"{trace.name} is a trace of {trace.header.form}: it runs without DRAM")
    return resolve_eviction(eviction)


def require_predictor(trace: Trace, prefetch: str | Predictor) -> Predictor:
    """Return a predictor that this trace can feed. Raises `ConfigError` if it can't."""
    predictor = make_predictor(prefetch, simulator=True)
    what = f"{trace.name} can't run prefetch={prefetch!r}: "
    if predictor.name != "none" and trace.header.form is not Form.EVENTS:
        raise ConfigError(what + f"a trace of {trace.header.form} has no layers to predict")
    if predictor.looks_ahead and trace.ahead_index is None:
        raise ConfigError(
            what + "it holds no predictions of gates; record it from a model "
            "(tiered-mem trace record), or choose another predictor"
        )
    if predictor.uses_residual and trace.hidden is None:
        raise ConfigError(
            what + "it holds no hidden states; record it with tiered-mem trace record --hidden"
        )
    if predictor.name == "hash-exact":
        raise ConfigError(what + "traces hold no tables of token ids; use oracle(1)")
    hidden_size = 0 if trace.hidden is None else trace.hidden.shape[1]
    predictor.check(ModelInfo(trace.header.model, trace.header.num_experts or 0, hidden_size))
    return predictor


class _EventRun:
    """A trace's events on virtual tiers."""

    given_back = False  # see tiered_mem.reading.Owner
    backend = HOST

    def __init__(
        self,
        trace: Trace,
        run: Run,
        machine: Machine,
        predictor: Predictor,
        on_log: Callable[[Log], None] | None,
    ) -> None:
        self._trace, self._run, self._predictor, self._on_log = trace, run, predictor, on_log
        self._reads = trace.reads
        # A created block that finds no room is no use, which makes this Belady a little less good.
        future = trace.only(Action.READ, Action.CREATE).keys if run.eviction == "belady" else None
        self.tiers = _core.Tiers(
            hbm=run.hbm_nbytes,
            dram=run.dram_nbytes,
            eviction=run.eviction,
            virtual_links=machine.virtual_links(),
            future=future,
        )
        keys, sizes = self._all_blocks()
        there = ~np.isin(keys, trace.created)
        self._known = set(keys[there].tolist())
        self.tiers.add_virtual_blocks(keys[there], sizes[there])
        self._before, self._inside = machine.event_seconds(trace)
        self._layers = self._layers_in_order()
        self._largest = np.maximum.reduceat(trace.nbytes, trace.offsets[:-1]).tolist()
        self._streams, self._kinds = trace.event_sequence.tolist(), trace.event_kind.tolist()
        self._num_experts = trace.header.num_experts or 1 + int(
            unpack_keys(trace.blocks[0])[2].max(initial=0)
        )

    def mend(self, key: BlockKey, slot: int, error: ChecksumError) -> None:
        raise error  # virtual blocks have no bytes that could be damaged

    def _all_blocks(self) -> tuple[KeyArray, npt.NDArray[np.uint64]]:
        """Return what a prediction may name: all experts of known size, else the blocks seen."""
        keys, sizes = self._trace.blocks
        header = self._trace.header
        if header.num_experts is None or not header.expert_nbytes:
            return keys, sizes
        known = dict(zip(keys.tolist(), sizes.tolist(), strict=True))
        for layer, nbytes in enumerate(header.expert_nbytes):
            if nbytes:
                first = BlockKey(Kind.EXPERT, layer, 0).pack()
                known |= dict.fromkeys(range(first, first + header.num_experts), nbytes)
        return np.array(list(known), np.uint64), np.array(list(known.values()), np.uint64)

    def _layers_in_order(self) -> dict[int, int]:
        """Return which partition (kind and layer) follows which; after the last comes the first."""
        partitions = np.unique(self._trace.blocks[0] >> _LAYER_SHIFT).tolist()
        return dict(zip(partitions, partitions[1:] + partitions[:1], strict=True))

    def go(self) -> None:
        trace, tiers, run = self._trace, self.tiers, self._run
        if self._on_log is not None:
            tiers.keep_log(True)
        if isinstance(self._predictor, Oracle):
            self._predictor.foresee(self._reads)
        is_read = trace.event_action == Action.READ
        # How many of the events and of the accesses before each event are reads.
        events = np.append(0, is_read.cumsum()).tolist()
        accesses = np.append(0, (np.diff(trace.offsets) * is_read).cumsum()).tolist()
        for first, end in itertools.pairwise(self._parts()):
            before = tiers.stats()
            for i in range(first, end):
                if self._before[i]:
                    tiers.advance(self._before[i])
                if is_read[i]:
                    self._read(i, events[i])
                else:
                    self._create_or_remove(i)
            self._account(first, before, tiers.stats(), accesses[end] - accesses[first])
        counted = tiers.stats()
        run.nbytes_moved = counted["nbytes_moved"]
        run.num_evictions = counted["num_evictions"]
        run.num_hints, run.num_prefetched = counted["num_hints"], counted["num_prefetched"]
        run.num_prefetched_used = counted["num_prefetched_used"]
        run.wasted_prefetch_nbytes = counted["nbytes_prefetch_wasted"]
        run.num_in_flight, run.num_dram_hits = counted["num_in_flight"], counted["num_dram_hits"]
        run.byte_miss_ratio = 1 - self._hit_nbytes / max(run.nbytes_accessed, 1)
        run.stall_seconds = counted["stall_ns"] / 1e9
        run.compute_seconds = float(self._before.sum() + self._inside.sum())
        if self._on_log is not None:
            self._on_log(Log(*tiers.take_log()))
        tiers.close()

    def _read(self, i: int, number: int) -> None:
        """Run event `i`, which is the trace's read `number`."""
        tiers, keys, stream = self.tiers, self._trace.event(i), self._streams[i]
        share, nbytes = self._inside[i] / len(keys), self._largest[i]
        most = blocks_of_wave(tiers, nbytes) if self._kinds[i] == Kind.KV else None
        with Reading(self, keys, nbytes, stream, most) as reading:
            if self._predictor.follows_routes:
                self._predict(number, keys, stream)
            for _ in reading:
                if share:
                    tiers.advance(share)

    def _create_or_remove(self, i: int) -> None:
        """Do what `KvSpace` does: of what it makes, it puts into HBM what an event can hold."""
        tiers, keys, nbytes = self.tiers, self._trace.event(i), self._largest[i]
        if self._inside[i]:
            tiers.advance(self._inside[i])
        if self._trace.event_action[i] == Action.REMOVE:
            self._known.difference_update(keys.tolist())
            tiers.remove_blocks(keys)
            return
        self._known.update(keys.tolist())
        tiers.add_virtual_blocks(keys, np.full(len(keys), nbytes, np.uint64))
        most = int(tiers.max_event(nbytes))
        if most == 0:
            return
        event = tiers.create(keys[-most:], self._streams[i])
        for position in range(len(event.slots)):
            event.repaired(position)
        event.release()

    def _predict(self, i: int, keys: KeyArray, stream: int) -> None:
        """Hint what the predictor says right after read `i` has asked for its own blocks."""
        partition = int(keys[0] >> _LAYER_SHIFT)
        if isinstance(self._predictor, Oracle):
            kind = partition >> 24 << 24
            for layer, ids in self._predictor.hints(i):
                self._hint(kind | layer, ids, stream)
            return
        trace = self._reads
        following = self._layers[partition]
        decision = Decision(
            layer=partition & 0xFFFF,
            next_layer=following & 0xFFFF,
            ids=(keys & np.uint64(0xFFFFFFFF)).tolist(),
            num_experts=self._num_experts,
            top_k=trace.header.top_k or len(keys),
            stream=stream,
            ahead=() if trace.ahead_index is None else trace.ahead(i).tolist(),
            state=None if trace.hidden is None else trace.hidden[i].astype(np.float32),
        )
        self._hint(following, self._predictor.predict(decision), stream)

    def _hint(self, partition: int, ids: Sequence[int], stream: int) -> None:
        base = partition << 32
        keys = [key for index in ids if (key := base | index) in self._known]
        if keys:
            self.tiers.hint(np.array(keys, np.uint64), stream)

    # --- accounts ---

    def _parts(self) -> list[int]:
        """Return where phase or kind changes, and both ends: what is counted apart."""
        phase, kind = self._trace.event_phase, self._trace.event_kind
        changes = np.flatnonzero((phase[1:] != phase[:-1]) | (kind[1:] != kind[:-1])) + 1
        self._hit_nbytes = 0
        return [0, *changes.tolist(), self._trace.num_events]

    def _account(
        self, first: int, before: dict[str, Any], after: dict[str, Any], num_accesses: int
    ) -> None:
        run, trace = self._run, self._trace
        hits = after["num_hbm_hits"] - before["num_hbm_hits"]
        run.num_hits += hits
        self._hit_nbytes += after["nbytes_hit"] - before["nbytes_hit"]
        kind = Kind(int(trace.event_kind[first])).name.lower()
        empty = {"num_accesses": 0, "num_hits": 0}
        counts: dict[str, Any] = run.hits_by_kind.setdefault(kind, empty)
        prefill = trace.event_phase[first] == Phase.PREFILL
        phase: dict[str, Any] = run.prefill if prefill else run.decode
        for part in (counts, phase):
            part["num_accesses"] = part.get("num_accesses", 0) + num_accesses
            part["num_hits"] = part.get("num_hits", 0) + hits
        stall = (after["stall_ns"] - before["stall_ns"]) / 1e9
        phase["stall_seconds"] = phase.get("stall_seconds", 0.0) + stall
