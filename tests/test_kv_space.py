"""KV blocks that are made while running: written once, shared, evicted, read back, forgotten."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_mem import Runtime
from tiered_mem.errors import BudgetError, ConfigError, RuntimeClosedError, StoreFullError
from tiered_mem.kv_space import KvSpace
from tiered_mem.store import Store

NBYTES = 8192
ACTIONS = ("make", "share", "release", "read")


def block(seed: int, nbytes: int = NBYTES) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (nbytes,), dtype=torch.uint8, generator=generator)


def read(space: KvSpace, layer: int, indices: list[int]) -> list[torch.Tensor]:
    found: dict[int, torch.Tensor] = {}
    with space.begin(layer, indices) as reading:
        for positions, slots in reading.batches():
            for position, slot in zip(positions, slots, strict=True):
                found[position] = space.view(slot, space.block_nbytes(layer)).clone()
    return [found[i] for i in range(len(indices))]


@pytest.fixture(params=[0, 3 * NBYTES], ids=["nvme", "dram"])
def space(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[KvSpace]:
    with (
        Store.open(tmp_path, mode="w", durable=False) as store,
        Runtime(4 * NBYTES, request.param, eviction="lru") as runtime,
    ):
        space = runtime.attach_kv(store)
        space.add_layer(0, NBYTES)
        space.add_layer(1, 4096)
        yield space


def test_blocks_come_back_from_every_tier(space: KvSpace) -> None:
    blocks = [block(i) for i in range(20)]
    indices = [space.create(0, [each])[0] for each in blocks[:10]]
    indices += space.create(0, blocks[10:])  # more than HBM holds at once
    assert space.num_blocks == 20
    for chosen in ([0], [19, 3], list(range(20))):
        got = read(space, 0, [indices[i] for i in chosen])
        assert all(torch.equal(a, blocks[i]) for a, i in zip(got, chosen, strict=True))
    stats = space.runtime.stats()
    assert stats.num_nvme_reads > 0
    assert space.runtime.nbytes_used()["hbm"] <= 4 * NBYTES


def test_what_was_just_made_is_in_hbm(space: KvSpace) -> None:
    indices = space.create(1, [block(1, 4096), block(2, 4096)])
    read(space, 1, indices)
    stats = space.runtime.stats()
    assert (stats.num_hbm_hits, stats.num_nvme_reads, stats.num_repaired) == (2, 0, 0)


def test_the_last_user_takes_the_block_along(space: KvSpace) -> None:
    (index,) = space.create(0, [block(1)])
    space.share(0, [index])
    space.release(0, [index])
    assert torch.equal(read(space, 0, [index])[0], block(1))
    space.release(0, [index])
    assert space.num_blocks == 0
    assert space.runtime.nbytes_used() == {"hbm": 0, "dram": 0}
    with space.store.snapshot() as snapshot:
        assert len(snapshot) == 0
    with pytest.raises(ConfigError, match="unknown"):
        space.begin(0, [index])


def test_the_abandoned_go_with_the_next(space: KvSpace) -> None:
    old = space.create(0, [block(1), block(2)])
    space.abandon(0, old)
    assert space.num_blocks == 2
    space.create(0, [block(3)])
    assert space.num_blocks == 1


def test_bad_input(space: KvSpace, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="8192 bytes, not 4096"):
        space.create(0, [block(0, 4096)])
    assert space.num_blocks == 0
    with (
        Runtime(4096, eviction="lru") as runtime,
        pytest.raises(BudgetError, match=r"hbm is 4\.0 KiB, but a block of layer 3 has 8\.0 KiB"),
    ):
        runtime.attach_kv(space.store).add_layer(3, NBYTES)
    with pytest.raises(ConfigError, match="8192 bytes, not 5"):
        space.add_layer(0, 5)
    with pytest.raises(ConfigError, match="65536"):
        space.add_layer(1 << 16, NBYTES)
    space.close()
    with pytest.raises(RuntimeClosedError):
        space.create(0, [block(0)])
    with pytest.raises(RuntimeClosedError):
        space.begin(0, [0])


def test_a_full_store_keeps_what_it_has(tmp_path: Path) -> None:
    with (
        Store.open(tmp_path, mode="w", capacity=1 << 20, durable=False) as store,
        Runtime(4 * NBYTES, eviction="lru") as runtime,
    ):
        space = runtime.attach_kv(store)
        space.add_layer(0, NBYTES)
        kept: list[int] = []
        with pytest.raises(StoreFullError):
            for i in range(200):
                kept += space.create(0, [block(i)])
        assert 0 < len(kept) < 200
        assert space.num_blocks == len(kept)
        assert torch.equal(read(space, 0, kept)[-1], block(len(kept) - 1))
        for index in kept[:20]:  # LMDB reuses pages from the second transaction on
            space.release(0, [index])
        (index,) = space.create(0, [block(7)])
        assert torch.equal(read(space, 0, [index])[0], block(7))


def test_threads(space: KvSpace) -> None:
    failures: list[BaseException] = []

    def work(seed: int) -> None:
        try:
            mine: list[tuple[int, torch.Tensor]] = []
            for i in range(25):
                each = block(seed * 100 + i)
                mine.append((space.create(0, [each])[0], each))
                if i % 3 == 2:
                    space.release(0, [mine.pop(0)[0]])
                got = read(space, 0, [mine[i // 2 % len(mine)][0]])
                assert torch.equal(got[0], mine[i // 2 % len(mine)][1])
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_closing_while_threads_make_blocks(tmp_path: Path) -> None:
    errors: list[BaseException] = []
    blocks = [block(1)] * 9

    def work(space: KvSpace, begun: threading.Barrier) -> None:
        begun.wait()
        try:
            while True:
                space.release(0, space.create(0, blocks))
        except BaseException as error:
            errors.append(error)

    for i in range(15):
        store = Store.open(tmp_path / str(i), mode="w", durable=False)
        runtime = Runtime(4 * NBYTES)
        space, begun = runtime.attach_kv(store), threading.Barrier(4)
        space.add_layer(0, NBYTES)
        threads = [threading.Thread(target=work, args=(space, begun)) for _ in range(3)]
        for thread in threads:
            thread.start()
        begun.wait()
        for _ in range(i % 3):
            space.release(0, space.create(0, blocks))
        for part in (space, runtime, store):  # whoever writes to the store ends before it closes
            part.close()
        for thread in threads:
            thread.join()
    assert {type(error) for error in errors} == {RuntimeClosedError}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(ACTIONS), st.integers(0, 9))))
def test_it_is_a_dictionary_with_counts(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    with (
        Store.open(tmp_path_factory.mktemp("kv"), mode="w", durable=False) as store,
        Runtime(2 * NBYTES, 2 * NBYTES, eviction="lru") as runtime,
    ):
        space = runtime.attach_kv(store)
        space.add_layer(0, NBYTES)
        model: dict[int, tuple[int, int]] = {}  # index -> (seed, users)
        for action, number in steps:
            if action == "make":
                (index,) = space.create(0, [block(number)])
                model[index] = (number, 1)
                continue
            if not model:
                continue
            index = sorted(model)[number % len(model)]
            seed, users = model[index]
            if action == "read":
                assert torch.equal(read(space, 0, [index])[0], block(seed))
            elif action == "share":
                space.share(0, [index])
                model[index] = (seed, users + 1)
            else:
                space.release(0, [index])
                model[index] = (seed, users - 1)
                if users == 1:
                    del model[index]
        assert space.num_blocks == len(model)
        with store.snapshot() as snapshot:
            assert len(snapshot) == len(model)
