"""A pack puts every expert into the store, once, whatever happens on the way."""

from __future__ import annotations

import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import checkpoints
import families
import lmdb
import pytest
import torch
from transformers import AutoModelForCausalLM

from tiered_mem import catalogue
from tiered_mem.errors import (
    ConfigError,
    StoreError,
    StoreFullError,
    StoreMismatchError,
    StoreMissingError,
    StoreReadOnlyError,
)
from tiered_mem.hf import pack as pack_module
from tiered_mem.hf.checkpoint import Checkpoint
from tiered_mem.hf.pack import block_keys, describe, open_packed, pack, require_match
from tiered_mem.store import Store, allocate

# `kill -9` of a pack at random moments: fifty here; TIERED_MEM_KILLS=1000 for more.
NUM_KILLS = int(os.environ.get("TIERED_MEM_KILLS", "50"))
TRANSACTION_NBYTES = 200_000


def assert_packed(checkpoint: Checkpoint, path: Path) -> None:
    """The store verifies and holds the checkpoint's experts, byte for byte, and nothing else."""
    with Store.open(path) as store, store.snapshot() as snapshot:
        require_match(store, checkpoint)
        assert store.verify() == []
        assert snapshot.keys().tolist() == [key.pack() for key in block_keys(checkpoint)]
        assert_blocks(checkpoint, snapshot, block_keys(checkpoint))


def assert_blocks(checkpoint: Checkpoint, snapshot: Any, keys: Any) -> None:
    for key in keys:
        nbytes = checkpoint.layouts[key.layer].nbytes
        stored, expected = allocate(nbytes), torch.empty(nbytes, dtype=torch.uint8)
        snapshot.read(key, stored)
        checkpoint.read_expert(key.layer, key.index, expected)
        assert torch.equal(torch.from_numpy(stored), expected), key


@pytest.fixture(scope="module")
def middling(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 36 experts and 3.5 MB: some twenty transactions."""
    config = families.tiny_config("mixtral")
    config.hidden_size, config.intermediate_size, config.num_local_experts = 64, 128, 12
    folder = tmp_path_factory.mktemp("middling")
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def some_blocks(path: Path) -> int:
    with Store.open(path) as store, store.snapshot() as snapshot:
        return len(snapshot)


@pytest.mark.parametrize("codec", ["none", "zstd"])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "ernie4_5_vl_moe"])
def test_every_expert_is_packed_once(name: str, codec: str, tmp_path: Path) -> None:
    folder, path = checkpoints.save(name, tmp_path / "model"), tmp_path / "store"
    checkpoint = Checkpoint.open(
        folder, model_class=families.model_class(name), dtype=torch.bfloat16
    )
    steps: list[tuple[int, int]] = []
    report = pack(
        checkpoint, path, codec=codec, progress=lambda *step: steps.append(step),
        transaction_nbytes=10_000,
    )  # fmt: skip
    assert_packed(checkpoint, path)
    assert report.num_blocks == report.num_packed == checkpoint.num_blocks
    assert report.nbytes == report.nbytes_packed == checkpoint.nbytes
    whole = name == "ernie4_5_vl_moe"
    assert report.layers_read_whole == (tuple(range(checkpoint.num_layers)) if whole else ())
    assert steps[0] == (0, checkpoint.nbytes) and steps[-1] == (checkpoint.nbytes,) * 2
    assert steps == sorted(steps) and len(steps) > 3

    steps.clear()
    again = pack(checkpoint, path, codec=codec, progress=lambda *step: steps.append(step))
    assert steps == [(checkpoint.nbytes,) * 2]
    assert (again.num_blocks, again.num_packed, again.nbytes_packed) == (report.num_blocks, 0, 0)


def test_what_is_there_is_kept(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(checkpoints.save("mixtral", tmp_path / "model"))
    path = tmp_path / "store"
    pack(checkpoint, path)
    lost = list(block_keys(checkpoint))[3:7]
    with Store.open(path, mode="w") as store, store.transaction() as txn:
        for key in lost:
            txn.delete(key)
    assert pack(checkpoint, path).num_packed == len(lost)
    assert_packed(checkpoint, path)


def test_a_complete_store_need_not_be_written(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(checkpoints.save("mixtral", tmp_path / "model"))
    assert open_packed(checkpoint, tmp_path / "store") is None
    pack(checkpoint, tmp_path / "store")
    with Store.open(tmp_path / "store"):  # in this process it can't be opened for writing now
        assert pack(checkpoint, tmp_path / "store").num_packed == 0
        opened = open_packed(checkpoint, tmp_path / "store")
        assert opened is not None
        with pytest.raises(StoreReadOnlyError):
            opened.set_metadata({})
        opened.close()


@pytest.mark.parametrize("what", ["truncated", "no store", "foreign"])
def test_a_damaged_store_is_not_taken_for_an_empty_one(what: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(checkpoints.save("mixtral", tmp_path / "model"))
    path = tmp_path / "store"
    pack(checkpoint, path)
    data = path / "data.mdb"
    if what == "truncated":
        os.truncate(data, 5 * 4096)
    elif what == "no store":
        data.write_bytes(b"hello" * 5000)
    else:
        data.unlink()
        with lmdb.open(str(path), max_dbs=1) as foreign, foreign.begin(write=True) as txn:
            txn.put(b"key", b"value")
    for attempt in (open_packed, pack):
        with pytest.raises(StoreError, match=re.escape(str(path))) as raised:
            attempt(checkpoint, path)
        assert not isinstance(raised.value, StoreMissingError)


@pytest.mark.parametrize("what", ["no bytes", "no databases"])
def test_a_store_cut_short_before_its_first_commit_is_packed(what: str, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(checkpoints.save("mixtral", tmp_path / "model"))
    path = tmp_path / "store"
    path.mkdir()
    if what == "no bytes":
        (path / "data.mdb").touch()
    else:
        lmdb.open(str(path)).close()
    with pytest.raises(StoreMissingError, match="cut short"):
        Store.open(path)
    assert open_packed(checkpoint, path) is None
    pack(checkpoint, path)
    assert_packed(checkpoint, path)


def test_other_metadata_of_the_store_is_kept(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(checkpoints.save("mixtral", tmp_path / "model"))
    with Store.open(tmp_path / "store", mode="w") as store:
        store.set_metadata({"owner": "someone"})
    pack(checkpoint, tmp_path / "store")
    with Store.open(tmp_path / "store") as store:
        assert store.metadata == {"owner": "someone", "experts": describe(checkpoint)}


def test_memory_stays_at_an_expert_and_a_transaction(tmp_path: Path) -> None:
    config = families.tiny_config("mixtral")
    config.hidden_size, config.intermediate_size, config.num_local_experts = 256, 1024, 16
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    small = Checkpoint.open(checkpoints.save("mixtral", tmp_path / "small"))
    pack(small, tmp_path / "small store")  # what is imported and set up on first use
    checkpoint = Checkpoint.open(tmp_path / "model")
    transaction_nbytes = 8 << 20

    anonymous = [checkpoints.memory_nbytes("RssAnon")]
    pack(
        checkpoint, tmp_path / "store", transaction_nbytes=transaction_nbytes,
        progress=lambda done, total: anonymous.append(checkpoints.memory_nbytes("RssAnon")),
    )  # fmt: skip
    # Three copies of an expert (as read, converted, in the block), the transaction, and LMDB's.
    allowed = 3 * checkpoint.layouts[0].nbytes + 2 * transaction_nbytes + (16 << 20)
    assert checkpoint.nbytes > 140 << 20 > 3 * allowed
    assert max(anonymous) - anonymous[0] < allowed


# --- another store ---


def test_a_store_of_other_weights_is_refused(tmp_path: Path) -> None:
    folder, path = checkpoints.save("mixtral", tmp_path / "model"), tmp_path / "store"
    other = shutil.copytree(folder, tmp_path / "other")
    checkpoints.edit_tensors(other, lambda tensors: {k: t + 1 for k, t in tensors.items()})
    pack(Checkpoint.open(folder), path)
    with pytest.raises(StoreMismatchError, match=r"model .*not from .*other .*fingerprint"):
        pack(Checkpoint.open(other), path)
    with pytest.raises(StoreMismatchError, match=r"float32.*not from .*bfloat16.*dtype"):
        pack(Checkpoint.open(folder, dtype=torch.bfloat16), path)
    assert_packed(Checkpoint.open(folder), path)


@pytest.mark.parametrize(
    "change",
    [{"format": 99}, {"layouts": [{"num_experts": 8, "fields": []}]}, {"model_type": "other"}],
)
def test_a_store_of_another_version_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(checkpoints.save("mixtral", tmp_path / "model"))
    with Store.open(tmp_path / "store", mode="w") as store:
        store.set_metadata({"experts": describe(checkpoint) | change})
    with pytest.raises(StoreMismatchError, match=f"differ in {next(iter(change))}"):
        pack(checkpoint, tmp_path / "store")
    assert some_blocks(tmp_path / "store") == 0


def test_a_store_without_experts_is_told_apart(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(checkpoints.save("mixtral", tmp_path / "model"))
    with (
        Store.open(tmp_path / "store", mode="w") as store,
        pytest.raises(StoreMismatchError, match="no experts"),
    ):
        require_match(store, checkpoint)


def test_an_unknown_codec_is_refused_before_there_is_a_store(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(checkpoints.save("mixtral", tmp_path / "model"))
    with pytest.raises(ConfigError, match="lz77"):
        pack(checkpoint, tmp_path / "store", codec="lz77")
    assert not (tmp_path / "store").exists()


# --- no room ---


def test_too_little_room_is_found_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(checkpoints.save("mixtral", tmp_path / "model"))
    usage = shutil.disk_usage(tmp_path)._replace(free=12345)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(StoreFullError, match=r"take .* in a store, 12\.1 KiB are free"):
        pack(checkpoint, tmp_path / "store")
    with pytest.raises(StoreFullError, match=r"take .* in a store, its capacity is 48\.8 KiB"):
        pack(checkpoint, tmp_path / "store", capacity=50_000)
    assert not (tmp_path / "store").exists()


def test_the_estimate_of_room_holds(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(checkpoints.save("mixtral", tmp_path / "model"))
    needed = pack_module._stored_nbytes(checkpoint, block_keys(checkpoint), ratio=1.0)
    pack(checkpoint, tmp_path / "store", capacity=needed)
    taken = sum(file.stat().st_blocks * 512 for file in (tmp_path / "store").iterdir())
    assert checkpoint.nbytes < taken <= needed


@contextmanager
def disk_that_ends_at(nbytes: int) -> Iterator[None]:
    """No file of this process can grow beyond `nbytes`: to a writer, a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("what", ["disk", "capacity"])
def test_room_that_runs_out_leaves_a_store_to_go_on_from(
    what: str, middling: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(middling)
    path = tmp_path / "store"
    # Enough at first sight, then not. The store's file is some 5 MB longer than what is in it.
    room = checkpoint.nbytes // 2 + (5 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(pack_module, "_require_space", lambda *_: None)
        full = pytest.raises(StoreFullError, match="pack again")
        if what == "disk":
            with disk_that_ends_at(room), full:
                pack(checkpoint, path, transaction_nbytes=TRANSACTION_NBYTES)
        else:
            with full:
                pack(
                    checkpoint, path, transaction_nbytes=TRANSACTION_NBYTES,
                    capacity=checkpoint.nbytes // 2,
                )  # fmt: skip
    committed = some_blocks(path)
    assert 0 < committed < checkpoint.num_blocks
    with Store.open(path) as store, store.snapshot() as snapshot:
        assert store.verify() == []
        assert_blocks(checkpoint, snapshot, list(block_keys(checkpoint))[:committed])
    assert pack(checkpoint, path).num_packed == checkpoint.num_blocks - committed
    assert_packed(checkpoint, path)


def test_a_checkpoint_that_breaks_on_the_way_leaves_a_store_to_go_on_from(tmp_path: Path) -> None:
    folder, path = checkpoints.save("mixtral", tmp_path / "model"), tmp_path / "store"
    whole = (folder / "model.safetensors").read_bytes()
    checkpoint = Checkpoint.open(folder)

    def truncate(done: int, total: int) -> None:
        if done > total // 3:
            os.truncate(folder / "model.safetensors", len(whole) // 4)

    with pytest.raises(Exception, match="not a whole"):
        pack(checkpoint, path, progress=truncate, transaction_nbytes=20_000)
    committed = some_blocks(path)
    assert 0 < committed < checkpoint.num_blocks
    (folder / "model.safetensors").write_bytes(whole)
    assert pack(checkpoint, path).num_packed == checkpoint.num_blocks - committed
    assert_packed(checkpoint, path)


def test_a_codec_that_can_not_be_read_here_is_refused_before_a_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(catalogue, "_can_read_zstd", lambda: False)
    checkpoint = Checkpoint.open(checkpoints.save("mixtral", tmp_path / "model"))
    with pytest.raises(ConfigError, match=r"libzstd\.so\.1.*use 'none'"):
        pack(checkpoint, tmp_path / "store", codec="zstd")
    assert not (tmp_path / "store").exists()
    pack(checkpoint, tmp_path / "store", codec="none")


# --- kill -9 ---


def pack_in_child(folder: Path, path: Path, told: Connection) -> None:
    torch.set_num_threads(1)  # a forked thread pool has no threads
    checkpoint = Checkpoint.open(folder)

    def tell(done: int, total: int) -> None:
        told.send(done)

    pack(checkpoint, path, transaction_nbytes=TRANSACTION_NBYTES, progress=tell)


def killed(folder: Path, path: Path, num_reports: int, delay: float) -> bool:
    """Pack in another process, kill it `delay` seconds after a report. Whether it was in time."""
    context = multiprocessing.get_context("fork")  # a fresh interpreter would import for seconds
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=pack_in_child, args=(folder, path, sender))
    child.start()
    sender.close()
    with suppress(EOFError):  # it has ended
        for _ in range(num_reports):
            assert receiver.poll(60), "the child never went on packing"
            receiver.recv()
    child.join(delay)
    child.kill()
    child.join()
    receiver.close()
    assert child.exitcode in (0, -signal.SIGKILL)
    return bool(child.exitcode)


def whole_blocks(checkpoint: Checkpoint, path: Path) -> int:
    """How many blocks a killed pack left, after checking each. None before there was a store."""
    try:
        store = Store.open(path)
    except StoreError:
        return 0
    with store, store.snapshot() as snapshot:
        keys = list(block_keys(checkpoint))[: len(snapshot)]
        assert snapshot.keys().tolist() == [key.pack() for key in keys]
        assert store.verify() == []
        assert_blocks(checkpoint, snapshot, keys)
    return len(keys)


def test_kill_at_random_moments(middling: Path, tmp_path: Path) -> None:
    """Whenever it is killed, the store holds whole experts, and the next pack goes on from them."""
    checkpoint = Checkpoint.open(middling)
    rng = random.Random(0)
    reports: list[int] = []
    start = time.perf_counter()
    pack(
        checkpoint,
        tmp_path / "timed",
        transaction_nbytes=TRANSACTION_NBYTES,
        progress=lambda done, total: reports.append(done),
    )
    step = (time.perf_counter() - start) / len(reports)

    path = tmp_path / "store"
    kills = stores = resumed = before = 0
    while kills < NUM_KILLS:
        in_time = killed(middling, path, rng.randrange(len(reports) // 2), rng.uniform(0, step))
        kills += in_time
        blocks = whole_blocks(checkpoint, path)
        assert blocks >= before, "a kill lost blocks that were committed"
        resumed += 0 < before < blocks
        before = blocks
        if blocks == checkpoint.num_blocks or kills == NUM_KILLS:
            pack(checkpoint, path)
            assert_packed(checkpoint, path)
            shutil.rmtree(path)
            stores, before = stores + 1, 0
    assert kills == NUM_KILLS and stores > 0
    assert resumed > 0, "no pack went on from a killed one"
