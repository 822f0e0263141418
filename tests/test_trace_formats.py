"""Importers against small files written here, the exporter both ways, and malformed input."""

from __future__ import annotations

import csv
import io
import json
import re
import struct
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_mem.errors import ConfigError, TraceError
from tiered_mem.keys import BlockKey, Kind, unpack_keys
from tiered_mem.trace import Form, Phase, Trace, TraceHeader
from tiered_mem.trace_formats import FORMATS, export_trace, import_trace
from tiered_mem.trace_formats.oracle_general import NEVER, RECORD
from tiered_mem.trace_info import reuse_distances


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*objects: Any) -> str:
    return "".join(json.dumps(fields) + "\n" for fields in objects)


def events(trace: Trace) -> list[tuple[int, list[int]]]:
    """The layer and the indices of each event."""
    indices = [unpack_keys(trace.event(i))[2].tolist() for i in range(trace.num_events)]
    return list(zip(trace.event_layer.tolist(), indices, strict=True))


# --- route CSV ---

HEAD = """\
# route_trace v1
# model=/data/my models/Toy-3B-Q4.gguf arch=toy n_layer=3 n_expert=8 n_expert_used=2
# layer=1 expert_bytes=1000 dense_bytes=70
# layer=2 expert_bytes=2000 dense_bytes=80
turn,phase,step,layer,slot,expert,weight,residency,expert_bytes
"""
# Layer 0 is dense. Two tokens of prefill, of which the last layer computes only the last one.
BODY = """\
0,0,0,1,0,5,0.75,0,1000
0,0,0,1,1,2,0.25,0,1000
0,0,1,1,0,5,0.5,0,0
0,0,1,1,1,7,0.5,0,1000
0,0,1,2,0,0,0.9,0,2000
0,0,1,2,1,1,0.1,0,2000
0,1,2,1,0,2,0.6,1,0
0,1,2,1,1,3,0.4,0,1000
0,1,2,2,0,1,0.6,1,0
0,1,2,2,1,4,0.4,0,2000
0,1,3,1,0,2,0.6,1,0
0,1,3,1,1,3,0.4,1,0
0,1,3,2,0,6,0.5,0,2000
0,1,3,2,1,1,0.5,1,0
1,0,4,1,0,2,1e-1,0,0
1,0,4,1,1,3,0.9,0,0
"""


def test_route_csv(tmp_path: Path) -> None:
    trace = import_trace(write(tmp_path / "toy.route.csv", HEAD + BODY))
    assert trace.name == "toy"
    assert trace.header == TraceHeader(
        Form.EVENTS,
        model="Toy-3B-Q4",
        source="toy.route.csv",
        num_layers=3,
        num_experts=8,
        top_k=2,
        expert_nbytes=(0, 1000, 2000),
        dense_nbytes=(0, 70, 80),
    )
    assert events(trace) == [
        (1, [5, 2, 7]),
        (2, [0, 1]),
        (1, [2, 3]),
        (2, [1, 4]),
        (1, [2, 3]),
        (2, [6, 1]),
        (1, [2, 3]),
    ]
    assert trace.event_phase.tolist() == [0, 0, 1, 1, 1, 1, 0]
    assert trace.event_sequence.tolist() == [0] * 6 + [1]
    assert trace.weight[:3].tolist() == [1.25, 0.25, 0.5]
    assert trace.total_nbytes == 8 * 3000
    assert trace.num_tokens == 5
    # The same facts, counted in another way.
    rows = list(csv.DictReader(io.StringIO(BODY), HEAD.splitlines()[-1].split(",")))
    sizes = {"1": 1000, "2": 2000}
    distinct = {(row["layer"], row["expert"]) for row in rows}
    assert trace.num_rows == len(rows)
    assert trace.blocks[1].sum() == sum(sizes[layer] for layer, _ in distinct)
    counts = Counter((int(row["layer"]), int(row["expert"])) for row in rows)
    kinds, layers, indices = unpack_keys(trace.flat_keys)
    assert set(kinds) == {Kind.EXPERT}
    assert Counter(zip(layers.tolist(), indices.tolist(), strict=True)) == counts
    assert trace.row_weight.tolist() == [float(np.float32(row["weight"])) for row in rows]


def test_route_csv_without_sizes_takes_those_of_the_rows(tmp_path: Path) -> None:
    names, *rows = (HEAD + BODY).splitlines()[4:]
    trace = import_trace(write(tmp_path / "x.csv", "\n".join([names, "", *rows, "", "  "])))
    assert trace.header.expert_nbytes == (0, 1000, 2000)
    assert (trace.header.num_experts, trace.header.top_k, trace.header.model) == (None, None, "")
    assert trace.total_nbytes == 1000 * 4 + 2000 * 4


BAD_ROUTES = {
    "text": ("0,1,4,1,0,two,0.5,0,0", "line 22: 'two' is not a number"),
    "fraction": ("0,1,4,1,0,2.5,0.5,0,0", "line 22: expert is 2.5, not a whole number of 0 to 7"),
    "negative": ("0,1,4,1,0,-2,0.5,0,0", "line 22: expert is -2"),
    "expert": ("0,1,4,1,0,8,0.5,0,0", "line 22: expert is 8, not a whole number of 0 to 7"),
    "layer": ("0,1,4,3,0,1,0.5,0,0", "line 22: layer is 3, not a whole number of 0 to 2"),
    "dense layer": ("0,1,4,0,0,1,0.5,0,0", "line 22: no line gives the expert_bytes of layer 0"),
    "slot": ("0,1,4,1,2,1,0.5,0,0", "line 22: slot is 2, not a whole number of 0 to 1"),
    "phase": ("0,2,4,1,0,1,0.5,0,0", "line 22: phase is 2"),
    "weight": ("0,1,4,1,0,1,nan,0,0", "line 22: weight is nan, not a finite number"),
    "NaN expert": ("0,1,4,1,0,nan,0.5,0,0", "line 22: expert is nan"),
    "huge step": ("0,1,4294967296,1,0,1,0.5,0,0", "line 22: step is 4.29497e+09"),
    "few columns": ("0,1,4,1,0,1,0.5,0", "line 22: 8 columns, where there are 9 names"),
    "many columns": ("0,1,4,1,0,1,0.5,0,0,0", "line 22: 10 columns"),
    "empty cell": ("0,1,4,1,0,,0.5,0,0", "line 22: '' is not a number"),
    "late comment": ("# layer=0", "line 22: 1 columns"),
    "binary": ("0,1,4,1,0,1,\xff", "line 22: not text in UTF-8"),
}


@pytest.mark.parametrize(("row", "message"), BAD_ROUTES.values(), ids=BAD_ROUTES)
def test_bad_routes_name_the_line(tmp_path: Path, row: str, message: str) -> None:
    path = write(tmp_path / "bad.csv", (HEAD + BODY + row + "\n" + BODY).encode("latin-1"))
    with pytest.raises(TraceError, match=f"^{re.escape(str(path))}, {re.escape(message)}"):
        import_trace(path)


BAD_HEADS = {
    "no rows": (HEAD, "it has no rows"),
    "only a head": (HEAD.rsplit("\n", 2)[0], "it has no rows"),
    "no names": (HEAD.replace("turn,phase", "# turn,phase") + BODY, "line 6: the columns are not"),
    "missing name": ((HEAD + BODY).replace("expert,weight", "weight"), "route CSV: no expert"),
    "unknown name": ((HEAD + BODY).replace(",slot", ",seat"), "route CSV: no slot"),
    "double name": ((HEAD + BODY).replace(",residency", ",weight"), "not those of a route CSV"),
    "bad count": ((HEAD + BODY).replace("n_layer=3", "n_layer=x"), "line 2: n_layer is 'x'"),
    "bad size": ((HEAD + BODY).replace("=2000", "=-1"), "line 4: expert_bytes is '-1'"),
    "layer": ((HEAD + BODY).replace("n_layer=3", "n_layer=2"), "line 4: layer 2 is beyond"),
}


@pytest.mark.parametrize(("content", "message"), BAD_HEADS.values(), ids=BAD_HEADS)
def test_bad_heads_are_named(tmp_path: Path, content: str, message: str) -> None:
    with pytest.raises(TraceError, match=re.escape(message)):
        import_trace(write(tmp_path / "bad.csv", content))


# --- prefix chains ---


def mooncake(*chains: list[int]) -> list[dict[str, Any]]:
    request = {"timestamp": 0, "input_length": 600, "output_length": 10}
    return [request | {"hash_ids": chain} for chain in chains]


def bailian(chat: int, parent: int, chain: list[int]) -> dict[str, Any]:
    request = {"chat_id": chat, "parent_chat_id": parent, "timestamp": 61.114, "turn": 1}
    return request | {"input_length": 9, "output_length": 1, "type": "text", "hash_ids": chain}


def test_mooncake(tmp_path: Path) -> None:
    path = write(tmp_path / "talk.jsonl", lines(*mooncake([0, 1, 2], [], [0, 1, 3], [9])))
    trace = import_trace(path, token_nbytes="1KiB")
    assert events(trace) == [(0, [0, 1, 2]), (0, [0, 1, 3]), (0, [9])]
    assert set(trace.nbytes.tolist()) == {512 * 1024}
    assert trace.event_sequence.tolist() == trace.event_step.tolist() == [0, 2, 3]
    assert set(trace.event_kind) == {Kind.KV}
    assert set(trace.event_phase) == {Phase.PREFILL}
    assert trace.header.form is Form.PREFIX
    assert trace.header.block_num_tokens == 512
    assert trace.header.note == "1024 bytes a token; 1 requests without a block left out"
    assert import_trace(path).nbytes[0] == 512 * 128 * 1024


def test_bailian_turns_of_a_chat_are_one_sequence(tmp_path: Path) -> None:
    turns = [bailian(5, -1, [1]), bailian(7, -1, [2]), bailian(8, 5, [1, 3]), bailian(9, 8, [1])]
    trace = import_trace(write(tmp_path / "x.jsonl", lines(*turns, bailian(3, 99, [4]))))
    assert trace.event_sequence.tolist() == [1, 2, 1, 1, 5]  # the lines of their first turns
    assert trace.header.block_num_tokens == 16
    assert events(trace)[2] == (0, [1, 3])


def test_hashes_of_64_bits_are_numbered(tmp_path: Path) -> None:
    large = 2**64 - 1
    trace = import_trace(write(tmp_path / "x.jsonl", lines(*mooncake([large, 7], [large, 5, 7]))))
    assert events(trace) == [(0, [0, 1]), (0, [0, 2, 1])]


BAD_REQUESTS: dict[str, tuple[str, str]] = {
    "not JSON": ('{"hash_ids": [1,', "line 2: not JSON"),
    "a list": ("[1, 2]", "line 2: not a JSON object"),
    "deep": ("[" * 100_000, "line 2: not JSON"),
    "no hashes": ('{"timestamp": 0, "input_length": 1, "output_length": 1}', "line 2: no hash_ids"),
    "no time": ('{"hash_ids": [1]}', "line 2: no timestamp"),
    "time": (lines(mooncake([1])[0] | {"timestamp": float("nan")}), "line 2: timestamp is nan"),
    "length": (lines(mooncake([1])[0] | {"input_length": -4}), "line 2: input_length is -4"),
    "number": (lines(mooncake([1])[0] | {"hash_ids": 3}), "line 2: hash_ids is 3, not a list"),
    "fraction": (lines(mooncake([1])[0] | {"hash_ids": [1, 1.5]}), "not a list of whole numbers"),
    "truth": (lines(mooncake([1])[0] | {"hash_ids": [True]}), "not a list of whole numbers"),
    "negative": (lines(mooncake([1])[0] | {"hash_ids": [-1]}), "line 2: hash_ids holds -1"),
    "huge": (lines(mooncake([1])[0] | {"hash_ids": [2**64]}), f"line 2: hash_ids holds {2**64}"),
}


@pytest.mark.parametrize(("line", "message"), BAD_REQUESTS.values(), ids=BAD_REQUESTS)
def test_bad_requests_name_the_line(tmp_path: Path, line: str, message: str) -> None:
    path = write(
        tmp_path / "bad.jsonl", lines(*mooncake([1])) + line + "\n" + lines(*mooncake([2]))
    )
    with pytest.raises(TraceError, match=re.escape(message)) as raised:
        import_trace(path)
    assert str(raised.value).startswith(f"{path}, line 2: ")


def test_requests_without_any_block_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="no request has a block"):
        import_trace(write(tmp_path / "x.jsonl", lines(*mooncake([], []))))


# --- MoE loggers ---

META = {"type": "meta", "model_id": "some/Toy-MoE", "layers_logged": [0], "top_k": 2, "seed": 1}


def route(token: int, experts: list[int], layer: int = 0, **fields: Any) -> dict[str, Any]:
    weights = [0.5] * len(experts)
    record = {"type": "route", "req_id": "r1", "token_idx": token, "layer": layer}
    return record | {"topk_ids": experts, "topk_weights": weights} | fields


def test_moe_logger_with_passes(tmp_path: Path) -> None:
    warm_up = [route(i, [6, 7]) for i in range(20)] + [route(i, [6, 7]) for i in range(3)]
    passes = [route(0, [1, 2]), route(1, [2, 3]), route(0, [1, 2]), route(0, [6, 7])]
    log = lines(META | {"num_experts": 8}, *warm_up, *passes)
    trace = import_trace(write(tmp_path / "moe_routes.jsonl", log), expert_nbytes=4096)
    assert events(trace) == [(0, [1, 2, 3]), (0, [1, 2]), (0, [6, 7])]
    assert trace.weight.tolist() == [0.5, 1, 0.5, 0.5, 0.5, 0.5, 0.5]
    assert trace.header.note == "4096 bytes an expert; 23 rows of warm-up dropped"
    header = trace.header
    assert (header.model, header.num_experts, header.top_k) == ("some/Toy-MoE", 8, 2)


def test_moe_logger_with_tokens_that_only_count_up(tmp_path: Path) -> None:
    log = lines(META, *(route(100 + i, [i % 3, 5]) for i in range(5)))
    trace = import_trace(write(tmp_path / "x.jsonl", log))
    assert [indices for _, indices in events(trace)] == [[0, 5], [1, 5], [2, 5], [0, 5], [1, 5]]
    assert trace.num_tokens == 5
    assert set(trace.nbytes) == {1 << 20}


def test_moe_logger_with_layers_and_requests(tmp_path: Path) -> None:
    one = [route(0, [1, 2]), route(1, [2, 3]), route(0, [4, 5], 1), route(1, [4, 6], 1)]
    two = [route(2, [1, 3]), route(2, [5, 4], 1), route(0, [0, 1], req_id=7)]
    bare = [{k: v for k, v in r.items() if k != "type"} for r in one]
    trace = import_trace(write(tmp_path / "x.jsonl", lines(*bare, *two)))
    assert events(trace) == [
        (0, [1, 2, 3]),
        (1, [4, 5, 6]),
        (0, [1, 3]),
        (1, [5, 4]),
        (0, [0, 1]),
    ]
    assert trace.event_sequence.tolist() == [0, 0, 0, 0, 1]


def test_warm_up_of_a_second_run_in_the_same_log_is_dropped(tmp_path: Path) -> None:
    run = [META, *(route(i, [6, 7]) for i in range(64)), route(0, [1, 2]), route(0, [3, 4])]
    trace = import_trace(write(tmp_path / "x.jsonl", lines(*run, *run)))
    assert [indices for _, indices in events(trace)] == [[1, 2], [3, 4], [1, 2], [3, 4]]


def test_short_repeats_in_the_text_are_kept(tmp_path: Path) -> None:
    tokens = [[1, 2], [3, 4], *[[5, 6]] * 10, [1, 2]]
    log = lines(META, *(route(i, experts) for i, experts in enumerate(tokens)))
    assert import_trace(write(tmp_path / "x.jsonl", log)).num_events == 13


BAD_LOGS: dict[str, tuple[dict[str, Any], str]] = {
    "type": (route(0, [1, 2], type="note"), "line 2: type is 'note', neither meta nor route"),
    "layer": (route(0, [1, 2], layer=70000), "line 2: layer is 70000"),
    "text layer": (route(0, [1, 2]) | {"layer": "0"}, "line 2: layer is '0'"),
    "token": (route(-1, [1, 2]), "line 2: token_idx is -1"),
    "expert": (route(0, [1, 8]), "line 2: topk_ids holds 8, not in 0 to 7"),
    "fraction": (route(0, [1]) | {"topk_ids": [1.0]}, "not a list of whole numbers"),
    "weights": (route(0, [1, 2], topk_weights=[1.0]), "line 2: 2 topk_ids, but 1 topk_weights"),
    "NaN": (route(0, [1], topk_weights=[float("nan")]), "topk_weights holds a number that isn't"),
    "no experts": (route(0, []), "line 2: 0 topk_ids, but 0 topk_weights"),
    "request": (route(0, [1], req_id=None), "line 2: req_id is None"),
}


@pytest.mark.parametrize(("record", "message"), BAD_LOGS.values(), ids=BAD_LOGS)
def test_bad_logs_name_the_line(tmp_path: Path, record: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "bad.jsonl", lines(META | {"num_experts": 8}, record))
    with pytest.raises(TraceError, match=re.escape(message)):
        import_trace(path)


def test_logs_of_nothing_else_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TraceError, match="it has no routes"):
        import_trace(write(tmp_path / "x.jsonl", lines(META)))
    with pytest.raises(TraceError, match="nothing but the warm-up"):
        import_trace(write(tmp_path / "x.jsonl", lines(META, *[route(0, [1, 2])] * 30)))


# --- oracleGeneral ---


def pack(*records: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<IQIq", *record) for record in records)


def test_oracle_general_is_read(tmp_path: Path) -> None:
    content = pack((10, 5, 64, 2), (11, 900, 32, -1), (12, 5, 64, NEVER))
    trace = import_trace(write(tmp_path / "web.oracleGeneral.bin", content))
    assert trace.name == "web"
    assert trace.header.form is Form.REQUESTS
    assert events(trace) == [(0, [5]), (0, [900]), (0, [5])]
    assert trace.nbytes.tolist() == [64, 32, 64]
    assert trace.event_step.tolist() == [0, 1, 2]
    assert trace.event_kind.tolist() == [Kind.KV] * 3


def test_objects_of_no_size_or_two_sizes(tmp_path: Path) -> None:
    content = pack((0, 1, 0, -1), (0, 2**63, 10, 2), (0, 2**63, 99, -1), (0, 4, 7, -1))
    path = write(tmp_path / "x.bin", content)
    with pytest.warns(UserWarning) as warned:
        trace = import_trace(path)
    assert [str(w.message).split(": ")[1][:36] for w in warned] == [
        "1 requests of 0 bytes left out",
        "1 requests name another size than th",
    ]
    assert events(trace) == [(0, [0]), (0, [0]), (0, [1])]
    assert trace.nbytes.tolist() == [10, 10, 7]


def test_export_flattens_and_names_the_next_access(tmp_path: Path) -> None:
    trace = import_trace(write(tmp_path / "toy.csv", HEAD + BODY))
    export_trace(trace, tmp_path / "toy.bin")
    records = np.fromfile(tmp_path / "toy.bin", RECORD)
    assert records["id"].tolist() == trace.flat_keys.tolist()
    assert records["time"].tolist() == trace.row_step.tolist()
    for i, record in enumerate(records):
        later = [j for j in range(i + 1, len(records)) if records["id"][j] == record["id"]]
        assert record["next"] == (later[0] if later else NEVER)
        assert record["nbytes"] == {1: 1000, 2: 2000}[int(record["id"]) >> 32 & 0xFFFF]


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.sampled_from(Kind), st.integers(0, 3), st.integers(0, 9)), min_size=1),
    st.sampled_from(["x.bin", "x.oracleGeneral.zst"]),
)
def test_a_round_trip_keeps_every_block(
    tmp_path_factory: pytest.TempPathFactory, blocks: list[tuple[Kind, int, int]], name: str
) -> None:
    kind, layer, index = zip(*blocks, strict=True)
    keys = [BlockKey(*block).pack() for block in blocks]
    trace = Trace.from_rows(
        TraceHeader(Form.REQUESTS),
        step=np.arange(len(blocks)),
        kind=kind,
        layer=layer,
        index=index,
        nbytes=[key % 13 + 1 for key in keys],
    )
    path = tmp_path_factory.mktemp("oracle") / name
    export_trace(trace, path)
    back = import_trace(path, format="oracle-general")
    for column in ("flat_keys", "keys", "nbytes", "row_step", "offsets"):
        assert np.array_equal(getattr(back, column), getattr(trace, column))


def test_export_of_what_a_record_cannot_hold(tmp_path: Path) -> None:
    trace = Trace.from_rows(TraceHeader(Form.REQUESTS), index=[3], nbytes=1 << 32)
    with pytest.raises(TraceError, match="expert 3 of layer 0 has 4294967296 bytes"):
        export_trace(trace, tmp_path / "x.bin")
    assert list(tmp_path.iterdir()) == []


BAD_RECORDS = {
    "cut off": (pack((0, 1, 8, 1), (1, 1, 8, -1))[:-5], "cut off after record 0"),
    "next before": (pack((0, 1, 8, 1), (1, 1, 8, 1)), "record 1: its next access is 1"),
    "next negative": (pack((0, 1, 8, -2)), "record 0: its next access is -2"),
    "no size": (pack((0, 1, 0, -1)), "no request has a size"),
}


@pytest.mark.filterwarnings("ignore:.*left out")
@pytest.mark.parametrize(("content", "message"), BAD_RECORDS.values(), ids=BAD_RECORDS)
def test_bad_records_are_named(tmp_path: Path, content: bytes, message: str) -> None:
    with pytest.raises(TraceError, match=message):
        import_trace(write(tmp_path / "bad.bin", content), format="oracle-general")


# --- telling formats apart ---

SAMPLES: dict[str, str | bytes] = {
    "route-csv": HEAD + BODY,
    "moe-logger": lines(META, route(0, [1, 2]), route(1, [3, 2])),
    "bailian": lines(bailian(1, -1, [1])),
    "mooncake": lines(*mooncake([1, 2])),
    "oracle-general": pack((0, 1, 8, 1), (1, 1, 8, -1)),
}


@pytest.mark.parametrize("name", SAMPLES)
def test_formats_are_told_by_their_content(tmp_path: Path, name: str) -> None:
    assert [format.name for format in FORMATS if format.name in SAMPLES] == list(SAMPLES)
    path = write(tmp_path / "some.file", SAMPLES[name])
    told, named = import_trace(path), import_trace(path, format=name)
    assert told.header == named.header
    assert np.array_equal(told.flat_keys, named.flat_keys)
    # zstd, in two frames as well
    content = path.read_bytes()
    compress = zstandard.ZstdCompressor().compress
    for packed in (compress(content), compress(content[:30]) + compress(content[30:])):
        again = import_trace(write(tmp_path / "some.zst", packed))
        assert np.array_equal(again.flat_keys, told.flat_keys)
    for other in set(SAMPLES) - {name}:
        if {name, other} != {"bailian", "mooncake"}:  # bailian's are mooncake's fields and more
            with pytest.raises(TraceError):
                import_trace(path, format=other)


def test_what_is_no_trace_is_refused(tmp_path: Path) -> None:
    junk = bytes(np.random.default_rng(0).integers(128, 256, 240, dtype=np.uint8))
    for content, message in (
        (b"", "is empty"),
        (b" \n\n", "is empty"),
        (b"hello, world\n", "in no format known here"),
        (junk, "in no format known here"),
        (b"PK\x03\x04 and so on", "imported already"),
        (zstandard.ZstdCompressor().compress(junk)[:-4], "is damaged: .* cut off"),
    ):
        with pytest.raises(TraceError, match=message):
            import_trace(write(tmp_path / "x", content))
    with pytest.raises(FileNotFoundError):
        import_trace(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="no such format: 'tape'; there are route-csv, "):
        import_trace(tmp_path / "x", format="tape")


def test_sizes_where_the_file_has_them_are_refused(tmp_path: Path) -> None:
    routes = write(tmp_path / "x.csv", HEAD + BODY)
    with pytest.raises(ConfigError, match="route-csv has no use for expert_nbytes"):
        import_trace(routes, expert_nbytes=3)
    requests = write(tmp_path / "x.jsonl", lines(*mooncake([1])))
    with pytest.raises(ConfigError, match="token_nbytes is 0"):
        import_trace(requests, token_nbytes=0)
    with pytest.raises(ConfigError, match="not a size"):
        import_trace(requests, token_nbytes="many")


@pytest.mark.parametrize("name", ["x.oracleGeneral", "x.oracleGeneral.zst"])
def test_libcachesim_reads_the_export(tmp_path: Path, name: str) -> None:
    """Its LRU misses are those that our reuse distances foretell."""
    libcachesim = pytest.importorskip("libcachesim", reason="optional cross-check (GPL-3)")
    indices = np.random.default_rng(3).zipf(1.2, 20_000) % 3_000
    trace = Trace.from_rows(TraceHeader(Form.REQUESTS), index=indices, layer=2, nbytes=4096)
    export_trace(trace, tmp_path / name)
    distances, _ = reuse_distances(trace.block_ids, trace.num_rows)
    for num_slots in (8, 300):
        reader = libcachesim.TraceReader(
            trace=str(tmp_path / name),
            trace_type=libcachesim.TraceType.ORACLE_GENERAL_TRACE,
            reader_init_params=libcachesim.ReaderInitParam(ignore_obj_size=True),
        )
        miss_ratio, _ = libcachesim.LRU(cache_size=num_slots).process_trace(reader)
        num_misses = trace.num_rows - int((distances < num_slots).sum())
        assert round(miss_ratio * trace.num_rows) == num_misses
