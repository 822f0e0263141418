"""What a trace asks of a cache, before any policy is tried on it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tiered_mem.keys import Kind, unpack_keys
from tiered_mem.trace import Action, Form, Phase, Trace

PERCENTILES = (10, 25, 50, 75, 90, 99)
EXACT_NUM_ACCESSES = 1_000_000
_OPTIONAL = ("row_token", "gap_seconds", "compute_seconds", "ahead_index", "hidden")

Counts = npt.NDArray[np.int64]


@dataclass(frozen=True)
class TraceInfo:
    """The figures of one trace. Shares are of 1; None where a figure makes no sense or is unknown.

    An access is one block of one event. A cycle is what one token asks for: top-k experts in every
    layer. Below that many slots a global LRU, which always evicts what the next token needs first,
    hits next to nothing. A reuse distance is the number of other blocks that were asked for since
    the last access to the same one, so an LRU of that many slots and one would hit.
    """

    name: str
    model: str
    form: str
    source: str
    note: str
    recorded: tuple[str, ...]  # which of the optional columns it has
    num_rows: int
    num_events: int
    num_accesses: int
    num_tokens: int
    num_sequences: int
    accesses_by_kind: dict[str, int]
    accesses_by_phase: dict[str, int]
    num_blocks: int  # distinct ones seen
    nbytes: int  # of those
    total_nbytes: int  # of all blocks of the model, seen or not
    accessed_nbytes: int  # of all accesses: what a run without a cache would move
    num_layers: int
    num_experts: int | None
    top_k: int | None
    largest_event_num_blocks: int
    largest_event_nbytes: int
    cycle_num_slots: int | None
    cycle_nbytes: int | None
    num_created: int  # blocks that came into being, and so are no compulsory misses
    num_removed: int
    num_compulsory_misses: int
    ceiling: float  # the hit rate of an endless cache; in prefix traces of contiguous prefixes
    reuse_distances: dict[int, int]  # by percentile of PERCENTILES
    sampled_share: float  # the share of blocks that the distances are of; 1 if they are exact
    top_tenth_share: float  # of the accesses, by the tenth of the blocks that is asked for most
    layer_entropy: float | None  # mean over layers, 1 if all blocks of a layer are asked for alike
    previous_token_recall: float | None  # of a decode event in the one before of its layer

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def examine(trace: Trace, *, exact_num_accesses: int = EXACT_NUM_ACCESSES) -> TraceInfo:
    """Return the figures of a trace.

    With more than `exact_num_accesses`, reuse distances are estimated from a sample of the blocks.
    Where blocks come and go, accesses are reads alone; reuse counts from the creation on.
    """
    whole, trace, header = trace, trace.reads, trace.header
    sizes, created = np.diff(trace.offsets), np.isin(trace.blocks[0], whole.created)
    kinds, layers, _ = unpack_keys(trace.blocks[0])
    counts = np.bincount(trace.block_ids, minlength=len(trace.blocks[0]))
    cycle = _cycle(trace, sizes)
    used = whole.only(Action.READ, Action.CREATE)
    distances, sampled = reuse_distances(used.block_ids, exact_num_accesses)
    phases = np.bincount(np.repeat(trace.event_phase, sizes), minlength=2)
    event_nbytes = np.add.reduceat(trace.nbytes, trace.offsets[:-1])
    return TraceInfo(
        name=trace.name,
        model=header.model,
        form=header.form.value,
        source=header.source,
        note=header.note,
        recorded=tuple(c for c in _OPTIONAL if getattr(trace, c) is not None),
        num_rows=trace.num_rows,
        num_events=trace.num_events,
        num_accesses=trace.num_accesses,
        num_tokens=whole.num_tokens,
        num_sequences=len(np.unique(trace.event_sequence)),
        accesses_by_kind={k.name: n for k in Kind if (n := int(counts[kinds == k].sum()))},
        accesses_by_phase={phase.name: int(phases[phase]) for phase in Phase},
        num_blocks=len(counts),
        nbytes=int(trace.blocks[1].sum()),
        total_nbytes=whole.total_nbytes,
        accessed_nbytes=int(trace.nbytes.sum()),
        num_layers=header.num_layers or int(layers.max()) + 1,
        num_experts=header.num_experts,
        top_k=header.top_k,
        largest_event_num_blocks=int(sizes.max()),
        largest_event_nbytes=int(event_nbytes.max()),
        cycle_num_slots=cycle and cycle[0],
        cycle_nbytes=cycle and cycle[1],
        num_created=len(whole.created),
        num_removed=int(whole.event_num_rows[whole.event_action == Action.REMOVE].sum()),
        num_compulsory_misses=int((~created).sum()),
        ceiling=_ceiling(trace, sizes, created),
        reuse_distances=_percentiles(distances),
        sampled_share=sampled,
        top_tenth_share=_top_share(counts, 0.1),
        layer_entropy=_entropy(counts, kinds, layers, header.num_experts),
        previous_token_recall=_previous_token_recall(trace, sizes),
    )


def reuse_distances(block_ids: Counts, exact_num_accesses: int) -> tuple[Counts, float]:
    """Return the reuse distances of all accesses but the first ones, and the share of blocks used.

    Above `exact_num_accesses`, a share of the blocks, chosen by a hash of their number, stands for
    all, and distances are scaled up (SHARDS, Waldspurger et al., FAST '15).
    """
    share = min(1.0, exact_num_accesses / len(block_ids))
    if share == 1.0:
        return _exact_distances(block_ids), share
    hashes = block_ids.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) >> np.uint64(40)
    chosen = block_ids[hashes < np.uint64(share * (1 << 24))]
    distances = np.sort(np.rint(_exact_distances(chosen) / share).astype(np.int64))
    # How many of the few busiest blocks were drawn decides how many accesses: what is over or
    # missing is theirs, at the shortest distances (SHARDS-adj).
    over = len(chosen) - round(share * len(block_ids))
    return np.append(np.zeros(max(0, -over), np.int64), distances[max(0, over) :]), share


def _exact_distances(block_ids: Counts) -> Counts:
    """Count, for each access to a block that came before, the distinct blocks since then.

    Between access i and the one before it, p, lie i - p - 1 accesses; of those, each whose own
    predecessor lies after p too repeats a block. They are the accesses j < i with a predecessor
    above p, so the repeats are the inversions of the predecessors, counted for each element.
    """
    order = np.argsort(block_ids, kind="stable")
    again = block_ids[order[1:]] == block_ids[order[:-1]]
    accesses, before = order[1:][again], order[:-1][again]
    in_time = np.argsort(accesses)
    accesses, before = accesses[in_time], before[in_time]
    ranks = np.empty(len(before), np.int64)
    ranks[np.argsort(before)] = np.arange(len(before))
    distances: Counts = accesses - before - 1 - _larger_before(ranks)
    return distances


def _larger_before(ranks: Counts) -> Counts:
    """Count, for each element of a permutation of 0 to n-1, the larger ones that stand before it.

    A radix sort from the highest bit on: where two elements part, those with the bit set that
    stand before one without it in the same group are larger. O(n log n), vectorised.
    """
    counts = np.zeros(len(ranks), np.int64)  # by rank
    values = ranks.copy()
    places = np.arange(len(ranks))
    for bit in reversed(range(max(len(ranks) - 1, 0).bit_length())):
        has = values >> bit & 1
        group = values >> (bit + 1) << (bit + 1)  # where the group of equal higher bits starts
        ones = np.append(0, has.cumsum())
        before = ones[places] - ones[group]
        clear = has == 0
        counts[values[clear]] += before[clear]
        target = np.where(clear, places - before, group + (1 << bit) + before)
        sorted_values = np.empty_like(values)
        sorted_values[target] = values
        values = sorted_values
    of_elements: Counts = counts[ranks]
    return of_elements


def _percentiles(distances: Counts) -> dict[int, int]:
    if not len(distances):
        return {}
    values = np.percentile(distances, PERCENTILES, method="inverted_cdf")
    return {percent: int(value) for percent, value in zip(PERCENTILES, values, strict=True)}


def _cycle(trace: Trace, sizes: Counts) -> tuple[int, int] | None:
    """Slots and bytes of one token: top-k of the largest experts in every layer that has some."""
    expert_events = trace.event_kind == Kind.EXPERT
    if trace.header.form is not Form.EVENTS or not expert_events.any():
        return None
    decode = expert_events & (trace.event_phase == Phase.DECODE)
    top_k = trace.header.top_k or int(sizes[decode if decode.any() else expert_events].max())
    kinds, layers, _ = unpack_keys(trace.blocks[0])
    largest = np.zeros(int(layers.max()) + 1, np.uint64)
    np.maximum.at(largest, layers[kinds == Kind.EXPERT], trace.blocks[1][kinds == Kind.EXPERT])
    return top_k * int((largest > 0).sum()), top_k * int(largest.sum())


def _ceiling(trace: Trace, sizes: Counts, created: npt.NDArray[np.bool_]) -> float:
    first = np.zeros(trace.num_accesses, np.int64)
    first[np.unique(trace.block_ids, return_index=True)[1]] = ~created
    if trace.header.form is Form.PREFIX:
        # Behind a block that misses nothing of the chain can be used.
        seen = first.cumsum()
        starts = trace.offsets[:-1]
        missed = seen - np.repeat(seen[starts] - first[starts], sizes)
        return float((missed == 0).mean())
    return float(1 - first.mean())


def _top_share(counts: Counts, share: float) -> float:
    num_top = max(1, round(share * len(counts)))
    return float(np.sort(counts)[-num_top:].sum() / counts.sum())


def _entropy(
    counts: Counts,
    kinds: npt.NDArray[np.uint8],
    layers: npt.NDArray[np.uint16],
    num_experts: int | None,
) -> float | None:
    entropies = []
    for partition in np.unique(partitions := kinds.astype(np.int64) << 16 | layers):
        of_layer = counts[partitions == partition]
        is_expert = partition >> 16 == Kind.EXPERT
        num_blocks = num_experts if num_experts and is_expert else len(of_layer)
        if num_blocks > 1:
            shares = of_layer / of_layer.sum()
            entropies.append(-(shares * np.log2(shares)).sum() / np.log2(num_blocks))
    return float(np.mean(entropies)) if entropies else None


def _previous_token_recall(trace: Trace, sizes: Counts) -> float | None:
    """The share of decode accesses to blocks of the event before in that sequence and layer."""
    if trace.header.form is not Form.EVENTS:
        return None
    decode = np.flatnonzero(trace.event_phase == Phase.DECODE)
    stream = trace.event_sequence[decode].astype(np.uint64) << np.uint64(24)
    stream |= trace.event_kind[decode].astype(np.uint64) << np.uint64(16)
    stream |= trace.event_layer[decode].astype(np.uint64)
    _, stream_ids, lengths = np.unique(stream, return_inverse=True, return_counts=True)
    order = np.argsort(stream_ids, kind="stable")
    turn = np.empty(len(decode), np.int64)  # the event's number in its stream
    turn[order] = np.arange(len(decode)) - np.repeat(np.append(0, lengths.cumsum()[:-1]), lengths)
    accesses = np.flatnonzero(np.repeat(trace.event_phase == Phase.DECODE, sizes))
    turns = np.repeat(turn, sizes[decode])
    streams = np.repeat(stream_ids, sizes[decode])
    blocks = trace.block_ids[accesses]
    order = np.lexsort((turns, blocks, streams))
    turns_sorted, same = turns[order], np.zeros(len(order), bool)
    same[1:] = (streams[order][1:] == streams[order][:-1]) & (
        blocks[order][1:] == blocks[order][:-1]
    )
    same[1:] &= turns_sorted[1:] == turns_sorted[:-1] + 1
    num_with_a_past = int((turns > 0).sum())
    return float(same.sum() / num_with_a_past) if num_with_a_past else None
