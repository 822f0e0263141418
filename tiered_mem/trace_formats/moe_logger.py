"""Expert routes as the MoE loggers for vLLM write them (patches switched on by VLLM_LOG_MOE).

One JSON object a line: {"type": "meta", "model_id", "top_k", "layers_logged", ...} first (some
add num_experts), then {"type": "route", "req_id", "token_idx", "layer", "topk_ids",
"topk_weights"} for every token and layer; type and req_id may be left out. Read in logs of four of
these patches, for vLLM 0.6 to 0.16 (KennethWang1221/vllm-expert-profiler,
TotaniYash/vllm_moe_routelogging_patch, KaxitPandya/cerebras-assesment2,
weiran0129/vLLM-MoE-Logger):

- vLLM profiles itself at start with thousands of equal dummy tokens, which all go to the same
  experts. They are the constant block at the start of the log, and again wherever a second run
  was appended to it. Dropped, and the header says how many.
- token_idx restarts with every forward pass in some, which makes a pass, with all requests in it,
  one step; in others it only ever rises, which leaves each token a step of its own.
- Nothing says what is prefill: every step counts as decode. Sizes aren't logged either.
"""

from __future__ import annotations

from itertools import groupby, pairwise
from typing import NamedTuple

import numpy as np

from tiered_mem.keys import Kind
from tiered_mem.trace import Form, Phase, Trace, TraceHeader
from tiered_mem.trace_formats.source import Record, Source

DEFAULT_EXPERT_NBYTES = 1 << 20

# The longest run of equal routes seen in real text was 7 tokens; warm-ups had 2048 and more.
_MIN_HEAD_RUN, _MIN_RUN = 4, 64


class _Route(NamedTuple):
    request: object
    token: int
    layer: int
    experts: list[int]
    weights: list[float]


def recognise(start: bytes) -> bool:
    return start.startswith(b"{") and (b'"topk_ids"' in start or b'"layers_logged"' in start)


def read(source: Source, *, expert_nbytes: int = DEFAULT_EXPERT_NBYTES) -> Trace:
    """Return the trace. Raises `TraceError`, naming the line, on anything malformed."""
    records = list(source.records())
    meta = records.pop(0) if records and records[0].fields.get("type") == "meta" else None
    num_experts = _optional(meta, "num_experts")
    routes = [_read_route(record, num_experts) for record in records if not _is_meta(record)]
    if not routes:
        raise source.error("it has no routes")
    kept = _drop_warm_up(routes)
    if not kept:
        raise source.error("all tokens go to the same experts: it holds nothing but the warm-up")
    top_ks = [len(route.experts) for route in kept]
    requests = {request: i for i, request in enumerate(dict.fromkeys(r.request for r in kept))}
    model = meta.fields.get("model_id", "") if meta else ""
    header = TraceHeader(
        Form.EVENTS,
        model=model if isinstance(model, str) else "",
        source=source.path.name,
        num_experts=num_experts,
        top_k=max(top_ks),
        note=f"{expert_nbytes} bytes an expert; {len(routes) - len(kept)} rows of warm-up dropped",
    )
    return Trace.from_rows(
        header,
        step=np.repeat(_number_steps(kept), top_ks),
        layer=np.repeat([route.layer for route in kept], top_ks),
        kind=Kind.EXPERT,
        index=np.array([expert for route in kept for expert in route.experts]),
        weight=np.array([weight for route in kept for weight in route.weights], np.float32),
        phase=Phase.DECODE,
        sequence=np.repeat([requests[route.request] for route in kept], top_ks),
        nbytes=expert_nbytes,
        name=source.name,
    )


def _is_meta(record: Record) -> bool:
    return record.fields.get("type") == "meta"


def _optional(meta: Record | None, name: str) -> int | None:
    if meta is None or meta.fields.get(name) is None:
        return None
    return meta.whole(name, lowest=1, highest=1 << 16)


def _read_route(record: Record, num_experts: int | None) -> _Route:
    if (kind := record.fields.get("type", "route")) != "route":
        raise record.error(f"type is {kind!r:.40}, neither meta nor route")
    experts = record.whole_list("topk_ids", (num_experts or 1 << 32) - 1)
    weights = record.number_list("topk_weights")
    if not experts or len(weights) != len(experts):
        raise record.error(f"{len(experts)} topk_ids, but {len(weights)} topk_weights")
    request = record.fields.get("req_id", "")
    if not isinstance(request, str | int):
        raise record.error(f"req_id is {request!r:.40}, neither text nor a number")
    layer = record.whole("layer", highest=(1 << 16) - 1)
    return _Route(request, record.whole("token_idx"), layer, experts, weights)


def _drop_warm_up(routes: list[_Route]) -> list[_Route]:
    """Leave out long runs of tokens of a layer that all go to the same experts."""
    dropped: set[int] = set()
    places: dict[int, list[int]] = {}
    for place, route in enumerate(routes):
        places.setdefault(route.layer, []).append(place)
    for of_layer in places.values():
        for _, group in groupby(of_layer, key=lambda place: routes[place].experts):
            run = list(group)
            if len(run) >= (_MIN_HEAD_RUN if run[0] == of_layer[0] else _MIN_RUN):
                dropped.update(run)
    return [route for place, route in enumerate(routes) if place not in dropped]


def _number_steps(routes: list[_Route]) -> list[int]:
    """Number the forward passes; if none shows, the tokens."""
    steps = [0]
    for before, route in pairwise(routes):
        same_layer = route.layer == before.layer and route.request == before.request
        restarts = same_layer and route.token <= before.token
        steps.append(steps[-1] + (restarts or route.layer < before.layer))
    if steps[-1] == 0 and len({route.layer for route in routes}) == 1:
        return list(range(len(routes)))
    return steps
