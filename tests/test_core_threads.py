"""The core beside Python: the GIL, signals, forks and the end of the interpreter."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from blocks import (
    PAGE,
    Blocks,
    assert_right_bytes,
    experts,
    memory_of,
    room,
    uniform,
    wait_all,
    write_blocks,
)

from tiered_mem import _core
from tiered_mem.errors import RuntimeClosedError

NBYTES = 2 * PAGE


@pytest.fixture(scope="module")
def blocks(tmp_path_factory: pytest.TempPathFactory) -> Blocks:
    return write_blocks(tmp_path_factory.mktemp("blocks") / "blocks", uniform(2, 16, NBYTES))


def make(blocks: Blocks, hbm_slots: int, dram_slots: int = 0) -> _core.Tiers:
    slot = room(NBYTES)
    tiers = _core.Tiers(hbm=hbm_slots * slot, dram=dram_slots * slot)
    blocks.add_to(tiers)
    return tiers


def hold(tiers: _core.Tiers, indices: range | list[int]) -> _core.Event:
    event = tiers.acquire(experts(0, indices))
    assert event is not None
    assert not wait_all(event)
    return event


def await_waiter(tiers: _core.Tiers) -> None:
    """Return once somebody waits for room: then a newcomer isn't let in, room or not."""
    while (event := tiers.acquire(np.empty(0, np.uint64), stream=99, wait=False)) is not None:
        event.release()


def in_thread(action: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=action)
    thread.start()
    return thread


# --- the GIL: each of these would hang if the blocked call held it ---


def test_a_blocked_acquire_lets_others_run(blocks: Blocks) -> None:
    tiers = make(blocks, 4)
    held = hold(tiers, range(4))

    def unblock() -> None:
        await_waiter(tiers)
        held.release()

    thread = in_thread(unblock)
    event = tiers.acquire(experts(1, range(4)), stream=1)
    assert event is not None
    assert not wait_all(event)
    thread.join()
    tiers.close()


def test_a_blocked_wait_lets_others_run(blocks: Blocks) -> None:
    tiers = make(blocks, 4)
    tiers.throttle("nvme_to_hbm", 1e-3)
    event = tiers.acquire(experts(0, [0]))
    assert event is not None
    thread = in_thread(lambda: tiers.throttle("nvme_to_hbm", 0))
    assert event.wait_any() == ([0], [])
    thread.join()
    tiers.close()


def test_a_blocked_removal_lets_others_run(blocks: Blocks) -> None:
    tiers = make(blocks, 4)
    held = hold(tiers, range(4))
    thread = in_thread(held.release)
    tiers.remove_space(0)
    thread.join()
    assert tiers.stats()["hbm_nbytes_used"] == 0
    tiers.close()


def test_closing_wakes_those_who_wait(blocks: Blocks) -> None:
    tiers = make(blocks, 4)
    held = hold(tiers, range(4))

    def close() -> None:
        await_waiter(tiers)
        tiers.close()

    thread = in_thread(close)
    with pytest.raises(RuntimeClosedError):
        tiers.acquire(experts(1, [0]), stream=1)
    thread.join()
    held.release()


# --- signals ---


@pytest.mark.parametrize("traffic", [False, True])
def test_ctrl_c_ends_a_wait_for_room(blocks: Blocks, traffic: bool) -> None:
    tiers = make(blocks, 4)
    held = hold(tiers, range(4))
    main = threading.main_thread().ident
    assert main is not None
    done = threading.Event()

    def interrupt() -> None:
        await_waiter(tiers)
        signal.pthread_kill(main, signal.SIGINT)

    def make_traffic() -> None:
        while not done.is_set():  # the holder's own stream: wakes all waiters all the time
            hold(tiers, [0]).release()

    threads = [in_thread(interrupt)]
    if traffic:
        threads.append(in_thread(make_traffic))
    try:
        with pytest.raises(KeyboardInterrupt):
            tiers.acquire(experts(1, range(4)), stream=1)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    # Whoever was interrupted left the queue and pins nothing.
    held.release()
    event = tiers.acquire(experts(1, range(4)), stream=2, wait=False)
    assert event is not None
    tiers.close()


def test_ctrl_c_ends_a_wait_for_bytes(blocks: Blocks) -> None:
    tiers = make(blocks, 4)
    tiers.throttle("nvme_to_hbm", 1e-3)
    event = tiers.acquire(experts(0, [0]))
    assert event is not None
    main = threading.main_thread().ident
    assert main is not None
    thread = threading.Thread(target=signal.pthread_kill, args=(main, signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
        thread.start()
        event.wait_any()
    thread.join()
    tiers.throttle("nvme_to_hbm", 0)
    assert event.wait_any() == ([0], [])
    assert_right_bytes(memory_of(tiers), event, experts(0, [0]), blocks)
    tiers.close()


# --- forks ---


def use_in_child(tiers: _core.Tiers, event: _core.Event | None, blocks: Blocks) -> None:
    """What a child may do with its parent's runtime: nothing, without a hang or a crash."""
    assert tiers.closed
    for action in (
        lambda: tiers.acquire(experts(0, [0])),
        lambda: tiers.hint(experts(0, [0])),
        tiers.stats,
        tiers.hbm_memory,
        lambda: tiers.resize_hbm(PAGE),
        lambda: tiers.remove_space(0),
    ):
        with pytest.raises(RuntimeClosedError, match="process"):
            action()
    if event is not None:
        with pytest.raises(RuntimeClosedError, match="process"):
            event.wait_any()
        event.release()
    tiers.close()
    own = make(blocks, 4)
    hold(own, [1]).release()
    own.close()


def test_a_forked_child_neither_hangs_nor_crashes(blocks: Blocks) -> None:
    tiers = make(blocks, 8, 8)
    memory = memory_of(tiers)
    stop = threading.Event()

    def hammer(stream: int) -> None:
        while not stop.is_set():
            for first in range(0, 16, 2):
                event = tiers.acquire(experts(1, [first, first + 1]), stream)
                assert event is not None
                assert not wait_all(event)
                event.release()

    threads = [threading.Thread(target=hammer, args=(stream,)) for stream in (1, 2)]
    for thread in threads:
        thread.start()
    try:
        for number in range(8):
            event = hold(tiers, [0, 1])
            pid = os.fork()
            if pid == 0:
                status = 1
                try:
                    signal.alarm(20)  # a hang is a failure
                    use_in_child(tiers, event, blocks)
                    del tiers, event, memory
                    gc.collect()
                    status = 0
                finally:
                    os._exit(status)
            assert os.waitpid(pid, 0)[1] == 0, f"fork {number}"
            # The parent is none the worse for it.
            assert_right_bytes(memory, event, experts(0, [0, 1]), blocks)
            event.release()
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    tiers.close()


def test_multiprocessing_by_fork(blocks: Blocks) -> None:
    tiers = make(blocks, 8, 8)
    event = hold(tiers, [0, 1])
    child = multiprocessing.get_context("fork").Process(
        target=use_in_child, args=(tiers, event, blocks)
    )
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert_right_bytes(memory_of(tiers), event, experts(0, [0, 1]), blocks)
    tiers.close()


SCRIPT = """
import os, sys
import numpy as np
from pathlib import Path
sys.path.insert(0, {tests!r})
from blocks import *
from tiered_mem import _core
blocks = write_blocks(Path({path!r}), uniform(1, 4, 3 * PAGE))
tiers = _core.Tiers(hbm=9 * PAGE, dram=9 * PAGE)
blocks.add_to(tiers)
memory = memory_of(tiers)
tiers.throttle("nvme_to_hbm", 1)
event = tiers.acquire(experts(0, [0, 1]))
tiers.hint(experts(0, [2]), exact=True)
{end}
"""


@pytest.mark.parametrize(
    "end",
    [
        "sys.exit(0)",
        "sys.exit(0 if os.fork() == 0 else os.waitstatus_to_exitcode(os.wait()[1]))",
        "del tiers, event, memory",
        # Daemon threads that wait: for bytes, for room, and woken when the interpreter is ending.
        "import threading\n"
        "for call in (event.wait_any, lambda: tiers.acquire(experts(0, [2, 3]), 5)):\n"
        "    threading.Thread(target=call, daemon=True).start()\n"
        "while tiers.acquire([], 6, False): pass",
    ],
    ids=["exit", "fork", "del", "daemons"],
)
def test_the_interpreter_ends_with_reads_under_way(tmp_path: Path, end: str) -> None:
    script = SCRIPT.format(tests=str(Path(__file__).parent), path=str(tmp_path / "b"), end=end)
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
