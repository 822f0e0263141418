"""Prefixes are matched by whole groups, kept whole, and evicted from their ends."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_mem import errors
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.prefixes import Group, PrefixStore
from tiered_mem.store import Store, allocate

LAYOUT = {"block_tokens": 2, "dtype": "bfloat16"}


def open_at(path, *, fingerprint="a", capacity=1 << 24, **options):
    return PrefixStore.open(
        path, fingerprint=fingerprint, layout=LAYOUT, capacity=capacity, **options
    )


def content(name: bytes, layer: int, nbytes: int = 5000) -> np.ndarray:
    return np.random.default_rng([*name, layer]).integers(0, 256, nbytes, np.uint8)


def groups_of(store, ids, nbytes=5000):
    groups, parent = [], store.root
    for start in range(0, len(ids) // 2 * 2, 2):
        bare = Group(parent, np.array(ids[start : start + 2], np.int64), [])
        name = bare.hash
        blocks = [(layer, content(name, layer, nbytes)) for layer in range(2)]
        groups.append(Group(parent, bare.token_ids, blocks, {0: content(name, 9, 100)}))
        parent = name
    return groups


def tokens(*ids):
    return np.array(ids, np.int64)


def check_whole(store):
    with store.store.snapshot() as snapshot:
        for record in store.index.records.values():
            for layer in range(2):
                out = allocate(5000)
                snapshot.read(BlockKey(Kind.KV, layer, record.index), out)
                assert np.array_equal(out, content(record.hash, layer))
            assert np.array_equal(store.read_state(record, 0), content(record.hash, 9, 100))


PROMPTS = st.lists(st.integers(0, 2), max_size=9)


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.booleans(), PROMPTS), max_size=12))
def test_matches_like_a_set_of_tuples(tmp_path_factory, steps):
    path, model = tmp_path_factory.mktemp("kv"), set()
    for is_save, ids in steps:
        with open_at(path) as store:
            if is_save:
                store.save(groups_of(store, ids))
                model |= {tuple(ids[:end]) for end in range(2, len(ids) + 1, 2)}
            whole = [e for e in range(2, len(ids) + 1, 2) if tuple(ids[:e]) in model]
            assert len(store.match(tokens(*ids))) == len(whole)
            assert len(store.index.records) == len(model)
            check_whole(store)


def test_a_stored_group_is_not_written_again(tmp_path):
    with open_at(tmp_path) as store:
        first = store.save(groups_of(store, [1, 2, 3, 4]))
        assert store.save(groups_of(store, [1, 2, 3, 4])) == first


def test_another_model_finds_nothing(tmp_path):
    with open_at(tmp_path) as store:
        store.save(groups_of(store, [1, 2]))
    with open_at(tmp_path, fingerprint="b") as store:
        assert store.match(tokens(1, 2)) == []
    with open_at(tmp_path) as store:
        assert len(store.match(tokens(1, 2, 3))) == 1


def test_the_least_recently_used_end_goes_first_and_the_file_stays_below_capacity(tmp_path):
    capacity = 1 << 20
    with open_at(tmp_path, capacity=capacity) as store:
        store.save(groups_of(store, [0, 0, 0, 1]))
        for number in range(1, 60):
            store.match(tokens(0, 0))
            store.save(groups_of(store, [number, 0, number, 1]))
            assert (tmp_path / "data.mdb").stat().st_size <= capacity
            assert not store.index.headless()
        assert len(store.match(tokens(0, 0, 0, 1))) == 1
        assert store.match(tokens(1, 0)) == []
        check_whole(store)


def test_what_is_held_stays_and_a_full_store_is_a_named_error(tmp_path):
    with open_at(tmp_path, capacity=1 << 20) as store:
        held = store.save(groups_of(store, [1, 2], nbytes=150_000))
        with store.hold(held), pytest.raises(errors.StoreFullError):
            store.save(groups_of(store, [3, 4], nbytes=300_000))
        assert len(store.match(tokens(1, 2))) == 1
        assert store.match(tokens(3, 4)) == []


def test_damage_cuts_the_chain(tmp_path):
    with open_at(tmp_path) as store:
        records = store.save(groups_of(store, [1, 2, 3, 4, 5, 6]))
        with store.store.snapshot() as snapshot:
            offset = snapshot.extent(records[1].keys[0]).offset
    with open(tmp_path / "payload.bin", "r+b") as file:
        file.seek(offset + 7)
        byte = file.read(1)[0]
        file.seek(offset + 7)
        file.write(bytes([byte ^ 1]))
    with open_at(tmp_path) as store:
        assert [r.index for r in store.verify()] == [records[1].index]
        assert store.damaged(store.verify()[0]) == 2
        assert len(store.match(tokens(1, 2, 3, 4))) == 1
        assert store.verify() == []


def test_old_prefixes_go(tmp_path):
    with open_at(tmp_path) as store:
        store.save(groups_of(store, [1, 2, 3, 4]))
    with open_at(tmp_path, max_age=1000) as store:
        assert len(store.match(tokens(1, 2, 3, 4))) == 2
    with open_at(tmp_path, max_age=0) as store:
        assert store.match(tokens(1, 2)) == []


def test_a_directory_of_experts_and_a_second_writer_are_named_errors(tmp_path):
    with Store.open(tmp_path / "experts", mode="w") as store, store.transaction() as txn:
        txn.put(BlockKey(Kind.EXPERT, 0, 0), b"x")
    with pytest.raises(errors.StoreMismatchError):
        open_at(tmp_path / "experts")
    with open_at(tmp_path / "kv"), pytest.raises(errors.StoreBusyError):
        open_at(tmp_path / "kv")
