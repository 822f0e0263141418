"""What a store keeps, gives back, and refuses."""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import pickle
import resource
import stat
import subprocess
import tempfile
import threading
from pathlib import Path

import lmdb
import numpy as np
import pytest

from tiered_mem import _core, environment, errors
from tiered_mem.keys import BlockKey, Kind
from tiered_mem.store import Store, allocate

MIB = 1 << 20
SIZES = [0, 1, 4095, 4096, 4097, MIB - 1, MIB, MIB + 1, 3 * MIB + 12345]


def key(index: int, layer: int = 0) -> BlockKey:
    return BlockKey(Kind.EXPERT, layer, index)


def random_bytes(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def bf16_weights(nbytes: int) -> np.ndarray:
    """Bytes of normally distributed bfloat16 numbers: random mantissas, few exponents."""
    weights = np.random.default_rng(1).normal(0, 0.02, nbytes // 2 + 1).astype(np.float32)
    return (weights.view(np.uint32) >> 16).astype(np.uint16).view(np.uint8)[:nbytes].copy()


def put(store: Store, blocks: dict[BlockKey, np.ndarray], **options) -> None:
    with store.transaction() as txn:
        for block_key, data in blocks.items():
            txn.put(block_key, data, **options)


def read(store: Store, block_key: BlockKey) -> np.ndarray:
    with store.snapshot() as snapshot:
        out = np.empty(snapshot.nbytes(block_key), np.uint8)
        snapshot.read(block_key, out)
        return out


@pytest.fixture
def store(tmp_path):
    with Store.open(tmp_path / "store", mode="w", capacity=256 * MIB) as opened:
        yield opened


# --- what goes in comes out ---


@pytest.mark.parametrize(("codec", "itemsize"), [("none", 1), ("zstd", 1), ("zstd", 2)])
@pytest.mark.parametrize("make", [random_bytes, bf16_weights, lambda n: np.zeros(n, np.uint8)])
def test_round_trip(store, codec, itemsize, make):
    blocks = {key(i): make(nbytes) for i, nbytes in enumerate(SIZES)}
    put(store, blocks, codec=codec, itemsize=itemsize)
    with store.snapshot() as snapshot:
        for block_key, data in blocks.items():
            aligned = allocate(data.nbytes)
            snapshot.read(block_key, aligned)
            assert np.array_equal(aligned, data)
            unaligned = np.full(data.nbytes + 9, 0xA5, np.uint8)
            snapshot.read(block_key, unaligned[1:-8])
            assert np.array_equal(unaligned[1:-8], data)
            assert unaligned[0] == 0xA5 and (unaligned[-8:] == 0xA5).all()


def test_blocks_past_the_read_window(store):
    # More pieces than are in flight at once, plain and compressed.
    data = bf16_weights(21 * MIB + 777)
    put(store, {key(0): data})
    put(store, {key(1): data}, codec="zstd", itemsize=2)
    assert np.array_equal(read(store, key(0)), data)
    assert np.array_equal(read(store, key(1)), data)


def test_an_allocated_block_is_written_as_it_is(store):
    block = allocate(MIB + 5)
    assert block.ctypes.data % 4096 == 0
    block[:] = random_bytes(block.nbytes)
    put(store, {key(0): block, key(1): block[7:], key(2): block.copy()})
    assert np.array_equal(read(store, key(0)), block)
    assert np.array_equal(read(store, key(1)), block[7:])
    assert np.array_equal(read(store, key(2)), block)


def test_byte_planes_shrink_bf16_weights(store):
    weights = bf16_weights(2 * MIB)
    put(store, {key(0): weights}, codec="zstd", itemsize=1)
    put(store, {key(1): weights}, codec="zstd", itemsize=2)
    with store.snapshot() as snapshot:
        whole, planes = (snapshot.extent(key(i)).stored_nbytes for i in (0, 1))
    assert planes < 0.75 * weights.nbytes
    assert planes < 0.95 * whole


def test_payloads_lie_where_o_direct_can_fetch_them(store):
    put(store, {key(i): random_bytes(n) for i, n in enumerate(SIZES)})
    with store.snapshot() as snapshot:
        assert all(extent.offset % 4096 == 0 for extent in snapshot.extents(snapshot.keys()))


def test_keys_metadata_and_membership(store):
    assert store.metadata == {}
    with store.transaction() as txn:
        txn.put(key(2, layer=1), b"two")
        txn.put(key(1, layer=1), b"one")
        txn.put(key(9), b"nine")
        txn.set_metadata({"dtype": "bfloat16", "layers": [1, 2]})
    assert store.metadata == {"dtype": "bfloat16", "layers": [1, 2]}
    store.set_metadata({"dtype": "float16"})
    assert store.metadata == {"dtype": "float16"}
    with store.snapshot() as snapshot:
        assert snapshot.keys().dtype == np.uint64
        expected = [key(9).pack(), key(1, layer=1).pack(), key(2, layer=1).pack()]
        assert snapshot.keys().tolist() == expected
        assert len(snapshot) == 3
        assert key(9) in snapshot and snapshot.keys()[0] in snapshot
        assert key(8) not in snapshot
        with pytest.raises(errors.StoreError, match="no block expert 8 of layer 0"):
            snapshot.nbytes(key(8))


def test_a_transaction_is_all_or_nothing(store):
    put(store, {key(0): b"old"})
    with pytest.raises(ZeroDivisionError), store.transaction() as txn:
        txn.put(key(0), b"new")
        txn.put(key(1), b"more")
        raise ZeroDivisionError
    assert read(store, key(0)).tobytes() == b"old"
    with store.transaction() as txn:
        assert txn.delete(key(0))
        assert not txn.delete(key(1))
    with store.snapshot() as snapshot:
        assert len(snapshot) == 0


def test_a_block_rewritten_within_one_transaction(store):
    with store.transaction() as txn:
        for seed, nbytes in enumerate([3 * MIB, 100, 2 * MIB, 5000]):
            txn.put(key(0), random_bytes(nbytes, seed))
        txn.put(key(1), random_bytes(MIB, 9))
        txn.delete(key(1))
    assert np.array_equal(read(store, key(0)), random_bytes(5000, 3))
    with store.snapshot() as snapshot:
        assert snapshot.keys().tolist() == [key(0).pack()]


def test_a_snapshot_holds_its_blocks_and_frees_them_when_closed(store):
    put(store, {key(0): random_bytes(MIB)})

    def file_after_rewrites():
        for seed in range(1, 12):
            put(store, {key(0): random_bytes(MIB, seed)})
        return store._environment.lmdb.info()["last_pgno"]

    with store.snapshot() as held:
        grown = file_after_rewrites()
        out = allocate(MIB)
        held.read(key(0), out)
        assert np.array_equal(out, random_bytes(MIB, 0))
    assert np.array_equal(read(store, key(0)), random_bytes(MIB, 11))
    assert file_after_rewrites() == grown


def test_generation_grows_with_every_rewrite(store):
    seen = []
    for _ in range(3):
        put(store, {key(0): b"x"})
        with store.snapshot() as snapshot:
            seen.append(snapshot.extent(key(0)).generation)
    assert seen == sorted(set(seen))


def test_reading_leaves_the_payload_out_of_the_page_cache(store, tmp_path):
    if not store.direct:
        pytest.skip("the temporary directory has no O_DIRECT")
    spec = importlib.util.spec_from_file_location(
        "cold", Path(__file__).parent.parent / "benchmarks" / "cold.py"
    )
    cold = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(cold)
    blocks = {key(i): random_bytes(4 * MIB, i) for i in range(4)}
    put(store, blocks)
    data_file = store.path / "data.mdb"
    cold.drop([data_file])
    out = allocate(4 * MIB)
    with store.snapshot() as snapshot:
        for block_key, data in blocks.items():
            snapshot.read(block_key, out)
            assert np.array_equal(out, data)
    assert cold.cached_nbytes(data_file) < MIB  # the catalogue's pages, none of the payload's


def test_many_threads_read_one_snapshot(store):
    blocks = {key(i): random_bytes(MIB + i, i) for i in range(8)}
    put(store, blocks)
    failures = []

    def reader(snapshot, seed):
        order = np.random.default_rng(seed).permutation(8).tolist()
        for i in order * 3:
            out = allocate(MIB + i)
            snapshot.read(key(i), out)
            if not np.array_equal(out, blocks[key(i)]):
                failures.append(i)

    with store.snapshot() as snapshot:
        threads = [threading.Thread(target=reader, args=(snapshot, seed)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


# --- opening ---


def test_modes_are_for_the_owner_only(tmp_path):
    previous = os.umask(0)
    try:
        with Store.open(tmp_path / "a" / "store", mode="w") as store:
            put(store, {key(0): b"x"})
    finally:
        os.umask(previous)
    assert stat.S_IMODE(store.path.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in store.path.iterdir()} == {0o600}


def test_a_store_reopens_and_is_shared_within_a_process(tmp_path):
    with Store.open(tmp_path / "store", mode="w") as writer:
        put(writer, {key(0): b"one"})
        reader = Store.open(tmp_path / "store")
        put(writer, {key(0): b"two"})
        assert read(reader, key(0)).tobytes() == b"two"
    assert read(reader, key(0)).tobytes() == b"two"  # outlives the writer's handle
    with pytest.raises(errors.StoreBusyError):
        Store.open(tmp_path / "store", mode="w")
    reader.close()
    reader.close()
    with pytest.raises(errors.StoreError, match="closed"):
        reader.snapshot()
    with Store.open(tmp_path / "store", mode="w") as writer:
        assert read(writer, key(0)).tobytes() == b"two"


def _write_in_child(path, results):
    try:
        Store.open(path, mode="w").close()
        results.put("opened")
    except errors.StoreBusyError:
        results.put("busy")


def _read_in_child(path, results):
    with Store.open(path) as store:
        results.put(read(store, key(0)).tobytes())


def _in_child(target, *arguments):
    context = multiprocessing.get_context("forkserver")
    results = context.Queue()
    process = context.Process(target=target, args=(*arguments, results))
    process.start()
    try:
        return results.get(timeout=60)
    finally:
        process.join()


def test_one_process_writes_while_others_read(store):
    put(store, {key(0): b"shared"})
    assert _in_child(_write_in_child, store.path) == "busy"
    assert _in_child(_read_in_child, store.path) == b"shared"
    path = store.path
    store.close()
    assert _in_child(_write_in_child, path) == "opened"


def test_one_transaction_at_a_time(store):
    with store.transaction() as txn:
        txn.put(key(0), b"x")
        with pytest.raises(errors.StoreBusyError):
            store.transaction()
    put(store, {key(1): b"y"})


def test_a_reader_follows_a_store_that_grew(tmp_path):
    with Store.open(tmp_path / "store", mode="w", capacity=4 * MIB) as writer:
        put(writer, {key(0): b"x"})
    with Store.open(tmp_path / "store") as reader:
        _in_child(_grow_in_child, reader.path)
        assert np.array_equal(read(reader, key(1)), random_bytes(16 * MIB))


def _grow_in_child(path, results):
    with Store.open(path, mode="w", capacity=64 * MIB) as writer:
        put(writer, {key(1): random_bytes(16 * MIB)})
    results.put("grown")


def test_a_store_cant_be_pickled(store):
    with pytest.raises(TypeError):
        pickle.dumps(store)


def test_without_o_direct_the_page_cache_is_announced():
    if not Path("/dev/shm").is_dir() or os.statvfs("/dev/shm").f_bavail == 0:
        pytest.skip("no tmpfs at /dev/shm")
    with (
        tempfile.TemporaryDirectory(dir="/dev/shm") as folder,
        pytest.warns(RuntimeWarning, match="without O_DIRECT"),
        Store.open(Path(folder) / "store", mode="w", capacity=64 * MIB) as store,
    ):
        assert not store.direct
        data = bf16_weights(2 * MIB + 11)
        put(store, {key(0): data})
        put(store, {key(1): data}, codec="zstd", itemsize=2)
        assert np.array_equal(read(store, key(0)), data)
        assert np.array_equal(read(store, key(1)), data)


# --- refusals ---


@pytest.mark.parametrize(
    "call",
    [
        lambda path: Store.open(path, mode="rw"),
        lambda path: Store.open(path, mode="w", capacity=0),
        lambda path: Store.open(path, mode="w", capacity=-1),
        lambda path: Store.open(path, capacity=MIB),
        lambda path: allocate(-1),
    ],
)
def test_unusable_options(tmp_path, call):
    with pytest.raises(errors.ConfigError):
        call(tmp_path / "store")


def test_unusable_puts(store):
    with store.transaction() as txn:
        with pytest.raises(errors.ConfigError, match="unknown codec 'lz77'"):
            txn.put(key(0), b"x", codec="lz77")
        with pytest.raises(errors.ConfigError, match="contiguous"):
            txn.put(key(0), np.zeros(10, np.uint8)[::2])
        with pytest.raises(errors.ConfigError, match="space 1"):
            txn.put(BlockKey(Kind.EXPERT, 0, 0, space=1), b"x")
    with store.snapshot() as snapshot:
        assert len(snapshot) == 0


def test_a_swallowed_error_undoes_its_transaction(tmp_path):
    with Store.open(tmp_path / "store", mode="w", capacity=8 * MIB) as store:
        put(store, {key(0): random_bytes(MIB)})
        with pytest.raises(errors.StoreError, match="undone"), store.transaction() as txn:
            txn.put(key(0), random_bytes(MIB, 1))
            with pytest.raises(errors.StoreFullError):
                txn.put(key(1), random_bytes(16 * MIB))
        assert np.array_equal(read(store, key(0)), random_bytes(MIB))
        put(store, {key(1): b"x"})


def test_a_closed_snapshot_reads_nothing(store):
    put(store, {key(0): b"x"})
    with store.snapshot() as snapshot:
        pass
    for call in (snapshot.keys, lambda: snapshot.extent(key(0)), lambda: key(0) in snapshot):
        with pytest.raises(errors.StoreError):
            call()


def test_too_small_a_buffer_is_refused(store):
    put(store, {key(0): bytes(100)})
    with store.snapshot() as snapshot, pytest.raises(errors.ConfigError, match="100 bytes"):
        snapshot.read(key(0), np.empty(99, np.uint8))


def test_places_that_are_no_store(tmp_path):
    with pytest.raises(errors.StoreError, match="no store at"):
        Store.open(tmp_path)
    with pytest.raises(errors.StoreError, match="no store at"):
        Store.open(tmp_path / "nowhere")
    (tmp_path / "file").write_bytes(b"hello")
    for mode in ("r", "w"):
        with pytest.raises(errors.StoreError):
            Store.open(tmp_path / "file", mode=mode)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("don't touch")
    with pytest.raises(errors.StoreError, match="not empty"):
        Store.open(tmp_path / "full", mode="w")
    (tmp_path / "noise").mkdir()
    (tmp_path / "noise" / "data.mdb").write_bytes(b"hello" * 5000)
    for mode in ("r", "w"):
        with pytest.raises(errors.StoreError, match="not an LMDB file"):
            Store.open(tmp_path / "noise", mode=mode)


def test_a_foreign_lmdb_database_is_left_alone(tmp_path):
    with lmdb.open(str(tmp_path / "other")) as env, env.begin(write=True) as txn:
        txn.put(b"their", b"data")
    for mode in ("r", "w"):
        with pytest.raises(errors.StoreError, match="isn't a store of tiered-mem"):
            Store.open(tmp_path / "other", mode=mode)
    with lmdb.open(str(tmp_path / "other")) as env, env.begin() as txn:
        assert txn.get(b"their") == b"data"


def test_another_format_version_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "FORMAT_VERSION", 99)
    Store.open(tmp_path / "store", mode="w").close()
    monkeypatch.undo()
    for mode in ("r", "w"):
        with pytest.raises(errors.StoreMismatchError, match="format 99"):
            Store.open(tmp_path / "store", mode=mode)


def test_writing_needs_mode_w(tmp_path):
    Store.open(tmp_path / "store", mode="w").close()
    with Store.open(tmp_path / "store") as reader:
        with pytest.raises(errors.StoreReadOnlyError, match="mode='w'"):
            reader.transaction()
        with pytest.raises(errors.StoreReadOnlyError):
            reader.set_metadata({})


@pytest.mark.parametrize("keep", [2 * 4096, 3 * 4096, 0.5, 0.99])
def test_a_truncated_file_is_named_not_a_crash(tmp_path, keep):
    with Store.open(tmp_path / "store", mode="w") as store:
        put(store, {key(i): random_bytes(MIB, i) for i in range(4)})
        used = (store._environment.lmdb.info()["last_pgno"] + 1) * 4096
    os.truncate(store.path / "data.mdb", keep if keep > 1 else int(used * keep))
    for mode in ("r", "w"):
        with pytest.raises(errors.StoreError, match="truncated"):
            Store.open(store.path, mode=mode)


def test_a_file_cut_short_while_open_is_a_named_error(store):
    put(store, {key(i): random_bytes(4 * MIB, i) for i in range(2)})
    with store.snapshot() as snapshot:
        extents = snapshot.extents([key(0), key(1)])
        last = max((key(0), key(1)), key=lambda k: snapshot.extent(k).offset)
        out = allocate(4 * MIB)
        snapshot.read(last, out)
        size = (store.path / "data.mdb").stat().st_size
        os.truncate(store.path / "data.mdb", max(e.offset for e in extents) + MIB)
        with pytest.raises(errors.TransferError, match="the file ends"):
            _core.read_block(max(extents, key=lambda e: e.offset), out)
        os.truncate(store.path / "data.mdb", size)


# --- damage ---


def flip_bit(store: Store, offset: int) -> None:
    fd = os.open(store.path / "data.mdb", os.O_RDWR)
    try:
        byte = os.pread(fd, 1, offset)[0]
        os.pwrite(fd, bytes([byte ^ 0x10]), offset)
        os.fsync(fd)
    finally:
        os.close(fd)


@pytest.mark.parametrize(("codec", "itemsize"), [("none", 1), ("zstd", 1), ("zstd", 2)])
def test_a_flipped_bit_in_a_payload_is_found(store, codec, itemsize):
    blocks = {key(i): bf16_weights(2 * MIB + 100) for i in range(3)}
    put(store, blocks, codec=codec, itemsize=itemsize)
    assert store.verify() == []
    with store.snapshot() as snapshot:
        extent = snapshot.extent(key(1))
        flip_bit(store, extent.offset + extent.stored_nbytes // 4)
        with pytest.raises(errors.ChecksumError, match="expert 1 of layer 0"):
            snapshot.read(key(1), allocate(2 * MIB + 100))
    seen = []
    assert store.verify(lambda done, total: seen.append((done, total))) == [key(1)]
    total = 3 * (2 * MIB + 100)
    assert seen == [(total // 3 * i, total) for i in (1, 2, 3)]
    put(store, {key(1): blocks[key(1)]}, codec=codec, itemsize=itemsize)
    assert store.verify() == []


def test_a_damaged_catalogue_entry_serves_nothing(store):
    put(store, {key(0): random_bytes(5000, 0), key(1): random_bytes(5000, 1)})
    env = store._environment
    with env.lmdb.begin() as txn:
        good = txn.get(key(0).pack().to_bytes(8, "big"), db=env.catalogue)
    for damaged in (good[:40], good[:-1] + bytes([good[-1] ^ 1]), b""):
        with env.lmdb.begin(write=True) as txn:
            txn.put(key(1).pack().to_bytes(8, "big"), damaged, db=env.catalogue)
        with store.snapshot() as snapshot, pytest.raises(errors.ChecksumError):
            snapshot.extent(key(1))
        assert store.verify() == [key(1)]
    # A sound entry under another key is damage too.
    with env.lmdb.begin(write=True) as txn:
        txn.put(key(1).pack().to_bytes(8, "big"), good, db=env.catalogue)
    assert store.verify() == [key(1)]


def test_a_stale_extent_gives_an_error_or_its_own_bytes(store):
    put(store, {key(0): random_bytes(MIB, 0)})
    with store.snapshot() as snapshot:
        stale = snapshot.extent(key(0))
    mismatches = 0
    for seed in range(1, 6):
        put(store, {key(i): random_bytes(200_000, seed + i) for i in range(8)})
        out = allocate(MIB)
        try:
            _core.read_block(stale, out)
            assert np.array_equal(out, random_bytes(MIB, 0))
        except errors.ChecksumError:
            mismatches += 1
    assert mismatches > 0  # the pages have been used again, and only the check stood in the way


# --- no room, no permission ---


def test_capacity_is_a_named_error_and_loses_nothing(tmp_path):
    with Store.open(tmp_path / "store", mode="w", capacity=32 * MIB) as store:
        put(store, {key(0): random_bytes(MIB)})
        with pytest.raises(errors.StoreFullError, match="capacity"):
            put(store, {key(i): random_bytes(MIB, i) for i in range(1, 60)})
        with store.snapshot() as snapshot:
            assert snapshot.keys().tolist() == [key(0).pack()]
        assert store.verify() == []
        for seed in range(40):  # freed pages are used again
            put(store, {key(1): random_bytes(2 * MIB, seed)})
        assert (store.path / "data.mdb").stat().st_size <= 32 * MIB
    with Store.open(tmp_path / "store", mode="w", capacity=128 * MIB) as store:
        put(store, {key(i): random_bytes(MIB, i) for i in range(2, 60)})
        assert store.verify() == []


def test_a_file_size_limit_is_a_full_disk(tmp_path):
    with Store.open(tmp_path / "store", mode="w", capacity=256 * MIB) as store:
        put(store, {key(0): random_bytes(MIB)})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 * MIB, hard))
        try:
            with pytest.raises(errors.StoreFullError, match="full"):
                put(store, {key(i): random_bytes(4 * MIB, i) for i in range(1, 9)})
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        with store.snapshot() as snapshot:
            assert snapshot.keys().tolist() == [key(0).pack()]
        assert store.verify() == []
        put(store, {key(1): random_bytes(8 * MIB)})
        assert store.verify() == []


@pytest.fixture
def small_disk(tmp_path):
    """A mounted tmpfs of 12 MiB. Needs the right to mount."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(folder)]
    if subprocess.run(command, capture_output=True, check=False).returncode != 0:
        pytest.skip("mounting isn't allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.filterwarnings("ignore:.*without O_DIRECT:RuntimeWarning")
def test_a_full_disk_is_a_named_error_and_loses_nothing(small_disk):
    with Store.open(small_disk / "store", mode="w", capacity=256 * MIB) as store:
        put(store, {key(0): random_bytes(MIB)})
        with pytest.raises(errors.StoreFullError, match="disk"):
            put(store, {key(i): random_bytes(MIB, i) for i in range(1, 20)})
        assert store.verify() == []
        with store.snapshot() as snapshot:
            assert snapshot.keys().tolist() == [key(0).pack()]


@pytest.mark.filterwarnings("ignore:.*without O_DIRECT:RuntimeWarning")
def test_read_only_storage(small_disk):
    with Store.open(small_disk / "store", mode="w", capacity=8 * MIB) as store:
        put(store, {key(0): b"kept"})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for path in (small_disk / "store", small_disk / "new"):
        with pytest.raises(errors.StoreReadOnlyError):
            Store.open(path, mode="w")
    with Store.open(small_disk / "store") as store:
        assert read(store, key(0)).tobytes() == b"kept"


def test_no_permission(tmp_path):
    with Store.open(tmp_path / "store", mode="w") as store:
        put(store, {key(0): b"x"})
    os.chmod(store.path, 0)
    # Permission bits don't bind root: become nobody for the attempt.
    euid = os.geteuid()
    if euid == 0:
        os.seteuid(65534)
    try:
        for mode in ("r", "w"):
            with pytest.raises(errors.StoreReadOnlyError, match="Permission denied"):
                Store.open(store.path, mode=mode)
    finally:
        os.seteuid(euid)
        os.chmod(store.path, 0o700)


def test_an_unknown_page_layout_is_refused(store, monkeypatch):
    monkeypatch.setattr("tiered_mem.store._OVERFLOW_FLAG", 0x400)
    with pytest.raises(errors.StoreError, match="lays out its pages"):
        put(store, {key(0): random_bytes(MIB)})
    monkeypatch.undo()
    put(store, {key(0): b"x"})
    assert store.verify() == []
