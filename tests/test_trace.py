"""Traces in memory and on disk: what an event is, round trips, and what is refused."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_mem.errors import TraceError
from tiered_mem.keys import BlockKey, Kind, pack_keys, unpack_keys
from tiered_mem.trace import Form, Phase, Trace, TraceHeader

HEADER = TraceHeader(Form.EVENTS, model="toy", num_layers=3, num_experts=8, top_k=2)


def expert(layer: int, index: int) -> int:
    return BlockKey(Kind.EXPERT, layer, index).pack()


def toy(**changes: Any) -> Trace:
    """One prefill of two tokens over two layers, then two tokens of decode."""
    columns: dict[str, Any] = {
        "step": [0, 0, 1, 1, 0, 1, 2, 2, 2, 3],
        "layer": [0, 0, 0, 0, 1, 1, 0, 0, 1, 1],
        "index": [5, 2, 5, 1, 3, 3, 5, 2, 3, 4],
        "weight": [0.5, 0.25, 0.125, 1, 1, 1, 0.5, 0.5, 1, 1],
        "phase": [0, 0, 0, 0, 0, 0, 1, 1, 1, 1],
        "nbytes": [10, 10, 10, 10, 20, 20, 10, 10, 20, 20],
    }
    return Trace.from_rows(HEADER, **columns | changes)


def events(trace: Trace) -> list[list[int]]:
    return [trace.event(i).tolist() for i in range(trace.num_events)]


def assert_same(one: Trace, other: Trace) -> None:
    assert one.header == other.header
    names = ["flat_keys", "row_step", "row_weight", "row_phase", "row_sequence", "row_token"]
    names += ["keys", "nbytes", "weight", "offsets", "block_ids", "event_layer", "event_kind"]
    names += ["event_phase", "event_sequence", "event_step", "gap_seconds", "compute_seconds"]
    names += ["ahead_offset", "ahead_index", "hidden"]
    for name in names:
        a, b = getattr(one, name), getattr(other, name)
        assert (a is None) == (b is None)
        if a is not None:
            assert a.dtype == b.dtype, name
            assert np.array_equal(a, b), name
    for a, b in zip(one.blocks, other.blocks, strict=True):
        assert np.array_equal(a, b)


def test_rows_become_events() -> None:
    trace = toy()
    # The prefill of a layer is one event, in which expert 5, chosen by both tokens, is one access.
    assert events(trace) == [
        [expert(0, 5), expert(0, 2), expert(0, 1)],
        [expert(1, 3)],
        [expert(0, 5), expert(0, 2)],
        [expert(1, 3)],
        [expert(1, 4)],
    ]
    assert trace.weight.tolist() == [0.625, 0.25, 1, 2, 0.5, 0.5, 1, 1]
    assert trace.nbytes.tolist() == [10, 10, 10, 20, 10, 10, 20, 20]
    assert trace.event_layer.tolist() == [0, 1, 0, 1, 1]
    assert trace.event_phase.tolist() == [0, 0, 1, 1, 1]
    assert trace.event_step.tolist() == [0, 0, 2, 2, 3]
    assert (trace.num_rows, trace.num_accesses, trace.num_tokens) == (10, 8, 4)
    keys, nbytes = trace.blocks
    assert keys.tolist() == [expert(0, i) for i in (1, 2, 5)] + [expert(1, i) for i in (3, 4)]
    assert nbytes.tolist() == [10, 10, 10, 20, 20]
    assert np.array_equal(keys[trace.block_ids], trace.keys)
    assert trace.total_nbytes == 70
    assert len(trace.flat_keys) == 10


def test_all_experts_count_where_the_header_knows_them() -> None:
    sizes = TraceHeader(Form.EVENTS, num_layers=3, num_experts=8, expert_nbytes=(10, 20, 0))
    rows: dict[str, Any] = {"index": [1, 2, 7], "layer": [0, 1, 2], "nbytes": [10, 20, 5]}
    trace = Trace.from_rows(sizes, **rows, kind=[1, 1, Kind.KV])
    assert trace.total_nbytes == 8 * 30 + 5


def test_a_prefill_in_pieces_is_one_event_a_piece() -> None:
    trace = toy(step=[0, 0, 1, 1, 0, 1, 0, 0, 1, 1], layer=0, nbytes=1, phase=Phase.PREFILL)
    assert [len(event) for event in events(trace)] == [3, 1, 4]


def test_sequences_and_kinds_part_events() -> None:
    trace = toy(layer=0, step=0, nbytes=1, sequence=[0] * 5 + [1] * 5, phase=1)
    assert [len(event) for event in events(trace)] == [4, 4]
    trace = toy(layer=0, step=0, nbytes=1, kind=[1] * 4 + [3] * 6, phase=1)
    assert [len(event) for event in events(trace)] == [3, 4]
    assert trace.event_kind.tolist() == [Kind.EXPERT, Kind.ENGRAM]


def test_one_event_a_request_in_prefix_traces() -> None:
    header = TraceHeader(Form.PREFIX, block_num_tokens=16)
    rows: dict[str, Any] = {"kind": Kind.KV, "nbytes": 64, "phase": Phase.PREFILL}
    trace = Trace.from_rows(header, index=[0, 1, 2, 0, 3, 0], step=[0, 0, 0, 1, 1, 2], **rows)
    assert [unpack_keys(np.array(event, np.uint64))[2].tolist() for event in events(trace)] == [
        [0, 1, 2],
        [0, 3],
        [0],
    ]
    assert trace.num_tokens == 6 * 16


def test_one_event_a_row_in_flat_traces() -> None:
    trace = Trace.from_rows(TraceHeader(Form.REQUESTS), index=[4, 4, 9], nbytes=[1, 1, 3])
    assert events(trace) == [[expert(0, 4)], [expert(0, 4)], [expert(0, 9)]]
    assert trace.offsets.tolist() == [0, 1, 2, 3]
    assert trace.nbytes.tolist() == [1, 1, 3]


PER_EVENT: dict[str, Any] = {
    "gap_seconds": np.arange(5) / 8,
    "compute_seconds": np.arange(5) / 16,
    "hidden": np.arange(10, dtype=np.float32).reshape(5, 2),
    "ahead_offset": [0, 2, 2, 3, 3, 4],
    "ahead_index": [1, 2, 3, 4],
}


def test_columns_of_events_come_back(tmp_path: Path) -> None:
    trace = toy(**PER_EVENT, token=range(10))
    assert trace.ahead(0).tolist() == [1, 2]
    trace.save(tmp_path / "x.npz")
    assert_same(Trace.load(tmp_path / "x.npz"), trace)
    with pytest.raises(TraceError, match="holds no predictions"):
        toy().ahead(0)


rows = st.integers(1, 40).flatmap(
    lambda n: st.fixed_dictionaries(
        {
            "step": st.lists(st.integers(0, 5), min_size=n, max_size=n),
            "layer": st.lists(st.integers(0, 2), min_size=n, max_size=n),
            "kind": st.lists(st.sampled_from(list(Kind)), min_size=n, max_size=n),
            "index": st.lists(st.integers(0, 7), min_size=n, max_size=n),
            "weight": st.lists(st.floats(0, 1, width=32), min_size=n, max_size=n),
            "phase": st.lists(st.integers(0, 1), min_size=n, max_size=n),
            "sequence": st.lists(st.integers(0, 2), min_size=n, max_size=n),
        }
    )
)


@settings(max_examples=60, deadline=None)
@given(rows, st.sampled_from(list(Form)), st.booleans())
def test_any_trace_comes_back(
    tmp_path_factory: pytest.TempPathFactory, rows: dict[str, Any], form: Form, constant: bool
) -> None:
    if constant:
        rows |= {"layer": 2, "weight": 0.5}
    keys = pack_keys(rows["kind"], rows["layer"], rows["index"])
    trace = Trace.from_rows(TraceHeader(form, num_layers=3), nbytes=keys % 97 + 1, **rows)
    path = tmp_path_factory.mktemp("trace") / "x.npz"
    trace.save(path)
    assert_same(Trace.load(path), trace)
    # Merging loses no block and no weight, and doubles nothing inside an event.
    assert np.isclose(trace.weight.sum(), np.broadcast_to(rows["weight"], len(keys)).sum())
    assert np.array_equal(trace.nbytes, trace.keys % 97 + 1)
    if form is not Form.REQUESTS:
        assert all(len(set(event)) == len(event) for event in events(trace))
    flat = [key for start in events(trace) for key in start]
    assert list(dict.fromkeys(flat)) == list(dict.fromkeys(keys.tolist()))


def test_arrays_cannot_be_written() -> None:
    trace = toy(**PER_EVENT)
    for array in (trace.keys, trace.flat_keys, trace.weight, trace.row_weight, trace.hidden):
        assert array is not None
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


# --- what is refused ---

BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "negative": ({"index": [-1] + [0] * 9}, "row 0: index is -1, not in 0 to"),
    "fraction": ({"index": [0.5] * 10}, "index holds float64"),
    "truth": ({"phase": [True] * 10}, "phase holds bool"),
    "layer": ({"layer": [0] * 9 + [70000]}, "row 9: layer is 70000, not in 0 to 65535"),
    "layer of model": ({"layer": 3, "nbytes": 1}, "layer is 3, but the header says there are 3"),
    "expert of model": ({"index": 8 * [0] + [9, 8]}, "row 8: index is 9, but .* there are 8"),
    "kind": ({"kind": [1] * 4 + [0] * 6}, "row 4: kind is 0, not in 1 to 3"),
    "phase": ({"phase": 2}, "phase is 2"),
    "weight": ({"weight": [0.5] * 3 + [np.nan] * 7}, "row 3: weight is nan, not a finite number"),
    "infinite weight": ({"weight": np.inf}, "weight is inf"),
    "text": ({"weight": ["a"] * 10}, "weight holds <U1"),
    "length": ({"step": [1, 2, 3]}, "step has 3 rows, but index has 10"),
    "empty": ({"index": []}, "holds no access"),
    "square": ({"index": [[1, 2], [3, 4]]}, "index has 2 dimensions"),
    "no size": ({"nbytes": None}, "either nbytes or block_nbytes"),
    "two sizes": ({"nbytes": range(1, 11)}, "a block has one size"),
    "size 0": ({"nbytes": [10] * 9 + [0]}, "row 9: nbytes is 0"),
    "short table": ({"nbytes": None, "block_nbytes": [1]}, r"block_nbytes is int64 \[1\], not one"),
    "gaps": ({"gap_seconds": [0.5]}, "there are 5 events"),
    "negative gap": ({"gap_seconds": [0.5] * 4 + [-1.0]}, "row 4: gap_seconds is -1.0, not a time"),
    "hidden": ({"hidden": np.full((5, 2), np.nan)}, "hidden is .*, not finite"),
    "ahead": ({"ahead_offset": [0, 1, 0, 1, 1, 1], "ahead_index": [1]}, "must rise"),
    "half of ahead": ({"ahead_index": [1]}, "must rise"),
    "unknown": ({"colour": [1] * 10}, "unknown columns: colour"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_bad_rows_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        toy(**changes)


BAD_HEADERS: dict[str, tuple[dict[str, Any], str]] = {
    "form": ({"form": "poem"}, "form is 'poem', not one of events, prefix, requests"),
    "negative": ({"num_layers": -1}, "num_layers is -1"),
    "fraction": ({"num_experts": 1.5}, "num_experts is 1.5"),
    "truth": ({"top_k": True}, "top_k is True"),
    "too many": ({"top_k": 9, "num_experts": 8}, "top_k 9 is above 8 experts"),
    "length": ({"num_layers": 2, "expert_nbytes": (1,)}, "of 1 layers, but num_layers is 2"),
    "sizes": ({"num_layers": 1, "dense_nbytes": (-1,)}, "not all sizes"),
    "model": ({"model": 3}, "model is not text"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_HEADERS.values(), ids=BAD_HEADERS)
def test_bad_headers_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TraceError, match=message):
        TraceHeader(**{"form": "events"} | changes)


def test_sizes_must_be_those_of_the_header() -> None:
    header = TraceHeader(Form.EVENTS, num_layers=2, expert_nbytes=(10, 20))
    with pytest.raises(TraceError, match="expert 1 of layer 1 has 10 bytes, but"):
        Trace.from_rows(header, index=[0, 1], layer=[0, 1], nbytes=10)


def saved(path: Path, **changes: Any) -> Path:
    """A trace file with columns replaced, or left out where None."""
    toy().save(path)
    with np.load(path) as arrays:
        columns = dict(arrays) | changes
    arguments: dict[str, Any] = {name: a for name, a in columns.items() if a is not None}
    np.savez(path, **arguments)
    return path


def header(**fields: Any) -> Any:
    text = json.dumps(json.loads(HEADER.to_json()) | fields)
    return np.frombuffer(text.encode(), np.uint8)


BAD_FILES: dict[str, tuple[dict[str, Any], str]] = {
    "no header": ({"header": None}, "has no header"),
    "header of text": ({"header": np.array("{}")}, "has no header"),
    "header not JSON": ({"header": np.frombuffer(b"{", np.uint8)}, "is not JSON"),
    "header a list": ({"header": np.frombuffer(b"[]", np.uint8)}, "not that of a trace"),
    "other version": ({"header": header(version=2)}, "format version 2; .* reads version 1"),
    "unknown field": ({"header": header(flavour=1)}, "unknown fields: flavour"),
    "sizes a number": ({"header": header(expert_nbytes=4)}, "expert_nbytes is not a list"),
    "missing columns": ({"step": None, "phase": None}, "lacks the columns step, phase"),
    "unknown column": ({"colour": np.arange(3)}, "unknown columns: colour"),
    "NaN weights": ({"weight": np.full(10, np.nan)}, "row 0: weight is nan"),
    "pickles": ({"token": np.array([{}] * 10)}, "Object arrays cannot be loaded"),
    "mixed lengths": ({"sequence": np.arange(4)}, "sequence has 4 rows"),
}


@pytest.mark.parametrize(("changes", "message"), BAD_FILES.values(), ids=BAD_FILES)
def test_bad_files_are_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    path = saved(tmp_path / "bad.npz", **changes)
    with pytest.raises(TraceError, match=message) as raised:
        Trace.load(path)
    assert str(raised.value).startswith(str(path))


def test_files_that_are_no_archive_are_named(tmp_path: Path) -> None:
    path = tmp_path / "bad.npz"
    toy().save(path)
    whole = path.read_bytes()
    np.save(tmp_path / "lone.npy", np.arange(3))
    lone = (tmp_path / "lone.npy").read_bytes()
    for content in (b"", b"step,layer\n1,2\n", whole[: len(whole) // 2], whole[100:], lone):
        path.write_bytes(content)
        with pytest.raises(TraceError, match="is not a trace"):
            Trace.load(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(TraceError, match="other things than arrays"):
        Trace.load(path)
    with pytest.raises(FileNotFoundError):
        Trace.load(tmp_path / "nothing.npz")


def test_any_damage_is_an_error_or_harmless(tmp_path: Path) -> None:
    path = tmp_path / "x.npz"
    trace = toy()
    trace.save(path)
    whole = path.read_bytes()
    num_refused = 0
    for at in range(0, len(whole), 7):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x41]) + whole[at + 1 :])
        try:
            loaded = Trace.load(path)
        except TraceError:
            num_refused += 1
        else:
            assert np.array_equal(loaded.flat_keys, trace.flat_keys)
    assert num_refused > 100


def test_saving_never_leaves_half_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "x.npz"
    toy().save(path)
    before = path.read_bytes()
    with pytest.raises(FileExistsError, match="there already"):
        toy(weight=0.5).save(path)

    def fail(file: Any, *_: Any, **__: Any) -> None:
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np.lib.format, "write_array", fail)
    with pytest.raises(OSError, match="disk full"):
        toy(weight=0.5).save(path, overwrite=True)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    toy(weight=0.5).save(path, overwrite=True)
    assert Trace.load(path).row_weight.tolist() == [0.5] * 10
    with pytest.raises(FileNotFoundError, match="no directory"):
        toy().save(tmp_path / "nowhere" / "x.npz")


# --- blocks that come and go ---

GOING = {"kind": Kind.KV, "nbytes": 8, "layer": 0, "step": 0, "phase": 0}


def going(index: list[int], start: list[int], action: list[int], **columns: Any) -> Trace:
    header = TraceHeader(Form.EVENTS)
    given = GOING | columns
    return Trace.from_rows(header, index=index, event_start=start, action=action, **given)


def test_events_say_what_they_do(tmp_path: Path) -> None:
    trace = going([1, 2, 1, 2, 1, 3], [0, 2, 4, 5], [1, 0, 2, 1])
    assert trace.num_events == 4 and trace.offsets.tolist() == [0, 2, 4, 5, 6]
    assert trace.reads.num_accesses == 2 and trace.reads.num_events == 1
    assert trace.total_nbytes == 16, "block 1 had gone when block 3 came"
    trace.save(tmp_path / "x.npz")
    again = Trace.load(tmp_path / "x.npz")
    assert again.event_action.tolist() == [1, 0, 2, 1]
    assert again.offsets.tolist() == trace.offsets.tolist()


@pytest.mark.parametrize(
    ("index", "start", "action", "columns", "message"),
    [
        ([1, 1], [0, 1], [0, 1], {}, "row 1: .*created after it was there"),
        ([1, 1], [0, 1], [2, 0], {}, "row 0: .*asked for after it was removed"),
        ([1, 1], [0, 1], [0, 3], {}, "action is 3"),
        ([1, 1], [0, 1], [0], {}, "there are 2 events"),
        ([1, 1], [1], [0], {}, "event_start must rise from 0"),
        ([1, 1], [0, 2], [0, 0], {}, "event_start must rise from 0"),
        ([1, 2], [0], [0], {"layer": [0, 1]}, "row 1: no event starts here"),
    ],
)
def test_events_that_cannot_be(
    index: list[int], start: list[int], action: list[int], columns: dict[str, Any], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        going(index, start, action, **columns)


def test_a_trace_without_reads_has_none() -> None:
    with pytest.raises(TraceError, match="none of its events does READ"):
        _ = going([1], [0], [1]).reads
