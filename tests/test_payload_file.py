"""Payloads in a file of their own: no extent is used twice, and a failed write loses nothing."""

from __future__ import annotations

import itertools
import os
import resource
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_prefixes import check_whole, groups_of, open_at, tokens

from tiered_mem import _core, errors
from tiered_mem.catalogue import ALIGNMENT, allocate
from tiered_mem.free_extents import FreeExtents
from tiered_mem.payload_file import Source
from tiered_mem.prefix_index import Group
from tiered_mem.prefixes import PrefixStore
from tiered_mem.store import Store

MIB = 1 << 20


def random_bytes(nbytes: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, nbytes, np.uint8)


def extents_of(store: PrefixStore) -> list[tuple[int, int]]:
    """Return [start, end) of all payloads in the file, sorted."""
    with store.store.snapshot() as snapshot:
        found = [snapshot.extent(key) for r in store.index.records.values() for key in r.keys]
    return sorted((e.offset, e.offset + -(-e.nbytes // ALIGNMENT) * ALIGNMENT) for e in found)


def check_disjoint(extents: list[tuple[int, int]]) -> None:
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(extents))


@settings(max_examples=60, deadline=None)
@given(
    st.sets(st.integers(0, 11), max_size=8),
    st.lists(st.one_of(st.integers(1, 4), st.integers(-9, -1)), max_size=25),
    st.integers(0, 20),
)
def test_free_extents_are_those_of_a_set(used, steps, limit):
    free = FreeExtents([(page, 1) for page in used], limit)
    taken = [(page, 1) for page in sorted(used)]
    for step in steps:
        pages = {p for start, length in taken for p in range(start, start + length)}
        assert free.tail == max(pages, default=-1) + 1
        assert free.nbytes_before(99) == len(set(range(limit)) - pages)
        if step < 0 and taken:
            free.give(*taken.pop(step % len(taken)))
        elif step > 0:
            fits = [p for p in range(limit - step + 1) if pages.isdisjoint(range(p, p + step))]
            start = free.take(step)
            assert start == (fits[0] if fits else None)
            if start is not None:
                taken.append((start, step))
    pages = {p for start, length in taken for p in range(start, start + length)}
    before = free.take_before(15)
    assert {p for at, n in before for p in range(at, at + n)} == set(range(15)) - pages


def test_a_writer_writes_what_it_is_given(tmp_path):
    writer = _core.FileWriter(str(tmp_path / "file"))
    sizes = [1, 4096, 5000, 3 * MIB + 1, 7 * MIB, 100]
    expected = []
    for turn in range(4):  # more than its ring holds
        offsets, blocks = [], writer.take(sizes)
        for i, block in enumerate(blocks):
            offsets.append(sum(len(e) for e in expected))
            block[:] = random_bytes(sizes[i], 10 * turn + i)
            expected.append(bytes(block) + bytes(-sizes[i] % ALIGNMENT))
        writer.write(offsets)
        lent = [random_bytes(n * ALIGNMENT, n) for n in (1, 300)]
        aligned = [allocate(block.nbytes) for block in lent]
        for out, block in zip(aligned, lent, strict=True):
            out[:] = block
        at = sum(len(e) for e in expected)
        number = writer.write_from(aligned, [at + ALIGNMENT * 300, at])  # in any order
        expected += [bytes(lent[1]), bytes(lent[0])]
        writer.wait(number)
        for out in aligned:
            out[:] = 0
    writer.flush()
    assert (tmp_path / "file").read_bytes() == b"".join(expected)


def test_a_writer_refuses_memory_that_the_device_would(tmp_path):
    writer = _core.FileWriter(str(tmp_path / "file"))
    block = allocate(2 * ALIGNMENT)
    for bad in (block[:100], block[8 : ALIGNMENT + 8]):
        with pytest.raises(errors.ConfigError, match="aligned"):
            writer.write_from([bad], [0])
    with pytest.raises(errors.ConfigError, match="offset"):
        writer.write_from([block], [])
    writer.take([5])
    with pytest.raises(errors.ConfigError, match="offset"):
        writer.write([0, 4096])


def test_a_failed_write_is_an_error_of_its_flush_alone(tmp_path):
    writer = _core.FileWriter(str(tmp_path / "file"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
    try:
        for at in range(0, 4 * MIB, MIB):
            writer.take([MIB])[0][:] = 7
            writer.write([at])
        with pytest.raises(OSError, match="too large"):
            writer.flush()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    writer.take([MIB])[0][:] = 8
    writer.write([0])
    writer.flush()
    assert (tmp_path / "file").read_bytes() == bytes([8]) * MIB


def churn(store: PrefixStore, num_turns: int) -> None:
    for number in range(1, num_turns):
        store.save(groups_of(store, [number, 0, number, 1]))
        check_disjoint(extents_of(store))


def test_room_that_is_freed_is_used_again_also_after_a_restart(tmp_path):
    for _ in range(3):
        with open_at(tmp_path, capacity=2 * MIB) as store:
            churn(store, 60)
            check_whole(store)
            sizes = [(tmp_path / name).stat().st_size for name in ("data.mdb", "payload.bin")]
            assert sum(sizes) <= 2 * MIB


def test_what_is_gone_at_the_end_is_given_back_to_the_disk(tmp_path):
    with open_at(tmp_path) as store:
        churn(store, 20)
        first = store.match(tokens(1, 0, 1, 1))
        store.gc(capacity=sum(record.nbytes for record in first))
        end = max(end for _, end in extents_of(store))
        assert (tmp_path / "payload.bin").stat().st_size == end
        check_whole(store)
        store.gc(capacity=0)
        assert (tmp_path / "payload.bin").stat().st_size == 0


def test_less_capacity_than_there_is_cuts_nothing_off(tmp_path):
    with open_at(tmp_path) as store:
        churn(store, 100)
        num_records = len(store.index.records)
    with open_at(tmp_path, capacity=MIB) as store:
        assert len(store.index.records) == num_records
        check_whole(store)
        churn(store, 130)
        check_whole(store)
        assert max(end for _, end in extents_of(store)) <= MIB


def hold_snapshot(path: Path) -> subprocess.Popen[str]:
    """Read the store in another process, that checks it again when it gets a line."""
    code = (
        "import sys; from tiered_mem.prefixes import PrefixStore\n"
        "with PrefixStore.inspect(sys.argv[1]) as prefixes, prefixes.store.snapshot() as old:\n"
        "    print(len(old), flush=True)\n"
        "    sys.stdin.readline()\n"
        "    for key in old.keys().tolist():\n"
        "        old.read(key, bytearray(old.nbytes(key)))\n"
        "    print('whole', flush=True)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("restart", [False, True])
def test_what_another_process_reads_stays(tmp_path, restart):
    store = open_at(tmp_path, capacity=MIB)
    store.save(groups_of(store, [1, 2, 3, 4]))
    with hold_snapshot(tmp_path) as reader:
        assert reader.stdout.readline() == "6\n"
        store.gc(capacity=0)
        if restart:  # another writer knows of no transaction but its own
            store.close()
            store = open_at(tmp_path, capacity=MIB)
        with pytest.raises(errors.StoreFullError, match="others still read"):
            churn(store, 100)
        stored = list(store.index.records)
        assert reader.communicate("\n")[0] == "whole\n"
    assert reader.returncode == 0
    assert stored == list(store.index.records)  # nothing was evicted in vain
    churn(store, 100)
    check_whole(store)
    store.close()


def test_a_full_disk_keeps_what_was_stored(tmp_path):
    with open_at(tmp_path) as store:
        store.save(groups_of(store, [1, 2]))
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # What is set aside meets the limit, as it would meet a disk that is full.
        resource.setrlimit(resource.RLIMIT_FSIZE, (MIB, hard))
        try:
            with pytest.raises(errors.StoreFullError, match="disk"):
                store.save(groups_of(store, [1, 2, 3, 4], nbytes=2 * MIB))
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(store.match(tokens(1, 2, 3, 4))) == 1
        check_whole(store)
        store.save(groups_of(store, [1, 2, 3, 4]))
        check_whole(store)


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
def test_a_disk_that_fills_up(small_disk):
    with open_at(small_disk / "store", capacity=64 * MIB) as store:
        for number in range(1, 30):  # the least recently used go, as if this were its capacity
            store.save(groups_of(store, [number, 2], nbytes=MIB))
        num_records = len(store.index.records)
        assert 2 <= num_records <= 6
        with pytest.raises(errors.StoreFullError, match="disk"):
            store.save(groups_of(store, [1, 3], nbytes=9 * MIB))
        assert len(store.index.records) == num_records  # none went in vain
        assert len(store.match(tokens(29, 2))) == 1
        assert store.verify() == []


class Failing:
    """Whose payloads can't be read."""

    def lend(self, names):
        return None

    def copy(self, names, outs):
        raise errors.TransferError("no such luck")


def test_payloads_that_cannot_be_made_take_no_room(tmp_path):
    with open_at(tmp_path) as store:
        store.save(groups_of(store, [1, 2]))
        size = (tmp_path / "payload.bin").stat().st_size
        group = Group(store.root, tokens(3, 4), [(0, Source(9 * MIB, Failing(), 0))])
        with pytest.raises(errors.TransferError, match="luck"):
            store.save([group])
        assert store.match(tokens(3, 4)) == []
        assert (tmp_path / "payload.bin").stat().st_size == size
        churn(store, 5)
        check_whole(store)


class Removing:
    """Who finds a stored group damaged while another is written."""

    def __init__(self, store, record):
        self._store, self._record = store, record

    def lend(self, names):
        return None

    def copy(self, names, outs):
        self._store.damaged(self._record)


@pytest.mark.parametrize("named", [False, True])
def test_what_follows_damage_found_meanwhile_is_not_stored(tmp_path, named):
    with open_at(tmp_path) as store:
        groups = groups_of(store, [1, 2])
        (first,) = store.save(groups)
        follower = Group(first.hash, tokens(3, 4), [(0, Source(100, Removing(store, first), 0))])
        with pytest.raises(errors.TieredMemError, match=r"removed while|to save a group after"):
            store.save([*groups, follower] if named else [follower])
        assert store.index.records == {} and not store.index.headless()
        store.save(groups)
        check_whole(store)


@pytest.mark.parametrize("keep", [None, 0, 10_000])
def test_a_file_that_is_gone_or_cut_is_damage(tmp_path, keep):
    with open_at(tmp_path) as store:
        store.save(groups_of(store, [1, 2, 3, 4, 5, 6]))
    if keep is None:
        (tmp_path / "payload.bin").unlink()
    else:
        os.truncate(tmp_path / "payload.bin", keep)
    with open_at(tmp_path) as store:
        bad = store.verify()
        assert len(bad) == 3
        for record in bad:
            store.damaged(record)
        store.save(groups_of(store, [1, 2, 3, 4, 5, 6]))
        assert store.verify() == []
        check_whole(store)


def test_the_former_format_is_refused_by_name(tmp_path):
    with Store.open(tmp_path, mode="w") as store:
        store.set_metadata({"format": "kv prefixes 1", "models": {}})
    for opening in (open_at, PrefixStore.inspect):
        with pytest.raises(errors.StoreMismatchError, match=r"'kv prefixes 1'.* delete"):
            opening(tmp_path)
    assert not (tmp_path / "payload.bin").exists()


WRITER = """
import sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_prefixes import check_whole, groups_of, open_at
from tiered_mem import errors
number, done = int(sys.argv[3]), 0
while done < 12:
    try:
        with open_at(sys.argv[1]) as store:
            store.save(groups_of(store, [number, done, done, number]))
            check_whole(store)
            done += 1
    except errors.StoreBusyError:
        time.sleep(0.001)
"""


def test_two_processes_writing_one_store(tmp_path):
    command = [sys.executable, "-c", WRITER, str(tmp_path), str(Path(__file__).parent)]
    writers = [subprocess.Popen([*command, str(number)]) for number in (100, 200)]
    assert [writer.wait(timeout=60) for writer in writers] == [0, 0]
    with open_at(tmp_path) as store:
        assert len(store.index.records) == 2 * 2 * 12
        check_disjoint(extents_of(store))
        check_whole(store)
