"""The double of CUDA's driver behaves as the driver does, and finds what it is there to find."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
from driver_double import run_python

SETUP = """
import ctypes, os, random
from driver_double import Double
double = Double()
double.start()
NBYTES = 1 << 16
def stream(): return double.make("cuStreamCreateWithPriority", 1, 0)
def event(): return double.make("cuEventCreate", 2)
def pinned(): return double.make("cuMemHostAlloc", NBYTES, 0)
def device(): return double.make("cuMemAlloc", NBYTES)
def fill(address, byte): ctypes.memset(address, byte, NBYTES)
def into(target, source, on): return double.result("cuMemcpyHtoDAsync", target, source, NBYTES, on)
def out(target, source, on): return double.result("cuMemcpyDtoHAsync", target, source, NBYTES, on)
def is_all(address, byte): return double.read(address, NBYTES) == bytes([byte]) * NBYTES
"""


def on_double(library: Path, code: str, settings: str = "", timeout: float = 60) -> str:
    return run_python(library, SETUP + textwrap.dedent(code), settings, timeout)


def test_events_order_streams(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        first, second, done = stream(), stream(), event()
        here, there, back = pinned(), device(), pinned()
        assert is_all(there, 0xCD)  # fresh memory holds poison
        for byte in range(100):
            fill(here, byte)
            assert into(there, here, first) == 0
            double.call("cuEventRecord", done, first)
            double.call("cuStreamWaitEvent", second, done, 0)
            assert out(back, there, second) == 0
            double.call("cuStreamSynchronize", second)
            assert is_all(back, byte)
        assert double.count("races") == 0 and double.count("copies") == 200
        assert double.count("nbytes_copied") == 200 * NBYTES
        """,
    )


def test_a_copy_without_order_is_a_race(cuda_double: Path) -> None:
    # Counted though the streams, without delays, may run them in a good order.
    on_double(
        cuda_double,
        """
        first, second = stream(), stream()
        here, there, back = pinned(), device(), pinned()
        into(there, here, first)
        out(back, there, second)
        assert double.count("races") == 1
        double.call("cuStreamSynchronize", first)
        double.call("cuStreamSynchronize", second)
        out(back, there, second)  # the host has seen the other one end
        assert double.count("races") == 1
        """,
        "max_delay_us=0",
    )


def test_the_default_stream_waits_for_blocking_ones(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        blocking = double.make("cuStreamCreateWithPriority", 0, 0)
        here, there, back = pinned(), device(), pinned()
        for byte in range(30):
            fill(here, byte)
            into(there, here, blocking)
            double.call("cuMemcpyDtoH", back, there, NBYTES)
            assert is_all(back, byte)
        assert double.count("races") == 0
        """,
    )


def test_a_target_holds_poison_until_its_bytes_come(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        import time
        copies, arrived = stream(), event()
        here, there = pinned(), device()
        fill(here, 1)
        into(there, here, copies)
        double.call("cuStreamSynchronize", copies)
        double.set("hang_copy", 1)
        fill(here, 2)
        into(there, here, copies)
        double.call("cuEventRecord", arrived, copies)
        while not is_all(there, 0xCE):  # no longer what was there
            time.sleep(0.001)
        assert double.result("cuEventQuery", arrived) == 600
        fill(here, 3)  # read late: who overwrites a source too early sees it
        double.release_hung()
        double.call("cuEventSynchronize", arrived)
        assert is_all(there, 3)
        """,
    )


def test_a_wrong_address_sticks(cuda_double: Path) -> None:
    for call in (
        "into(there + 4096, here, copies)",  # beyond the end
        "into(here + (1 << 40), here, copies)",  # no memory at all
        "into(there, there, copies)",  # device memory isn't the host's
    ):
        on_double(
            cuda_double,
            f"""
            copies = stream()
            here, there = pinned(), device()
            assert {call} == 700
            assert into(there, here, copies) == 700
            assert double.result("cuEventCreate", ctypes.byref(ctypes.c_uint64()), 0) == 700
            double.result("cuMemFree", there)
            assert double.count("live_allocations") == 0  # countable, though
            """,
        )


def test_copies_of_freed_memory(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        copies = stream()
        here, there = pinned(), device()
        double.set("hang_copy", 1)
        into(there, here, copies)
        other, free = double.allocate(NBYTES)
        into(other, here, copies)
        free()
        assert double.count("freed_in_use") == 1
        double.release_hung()
        assert double.result("cuStreamSynchronize", copies) == 700
        """,
    )


def test_host_memory_is_registered_whole(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        import mmap
        memory = mmap.mmap(-1, 4 * NBYTES)
        base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        copies, there = stream(), device()
        register = lambda at, nbytes: double.result("cuMemHostRegister", at, nbytes, 0)
        assert into(there, base, copies) == 0 and double.count("pageable_copies") == 1
        assert double.result("cuStreamQuery", copies) == 0  # and was waited for
        assert register(base, NBYTES) == 0 and register(base + NBYTES, NBYTES) == 0
        assert register(base + 4096, NBYTES) == 712
        assert register(base, 1 << 44) == 1  # not mapped
        assert into(there, base, copies) == 0 and double.count("pageable_copies") == 1
        # Two registrations, and one half of none: neither is the driver's from end to end.
        assert into(there, base + 4096, copies) == 1
        assert into(there, base + NBYTES + 4096, copies) == 1
        assert into(there, base + 2 * NBYTES - 4096, copies) == 1
        double.call("cuMemHostUnregister", base)
        assert double.result("cuMemHostUnregister", base) == 713
        assert double.count("live_registrations") == 1
        assert double.count("registered_nbytes") == NBYTES
        """,
    )


def test_batches(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        copies, here, there = stream(), pinned(), device()
        fill(here, 7)
        words = lambda *values: (ctypes.c_uint64 * len(values))(*values)
        targets, sources = words(there, there + 8192), words(here + 8192, here)
        order = (ctypes.c_uint32 * 6)(1)
        def batch(on, num=2, order=order, nbytes=(8192, NBYTES - 8192)):
            failed = ctypes.c_uint64()
            return double.result("cuMemcpyBatchAsync", targets, sources, words(*nbytes), num,
                                 order, words(0), 1, ctypes.byref(failed), on)
        assert batch(copies) == 0
        assert batch(copies, nbytes=(8192, 0)) == 1
        assert batch(copies, order=(ctypes.c_uint32 * 6)(0)) == 1  # no order of access
        assert batch(0) == 1  # not on the default stream
        double.call("cuStreamSynchronize", copies)
        assert is_all(there, 7)
        assert double.count("batches") == 1 and double.count("copies") == 2
        """,
    )


def test_failures_that_are_asked_for(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        copies, here, there = stream(), pinned(), device()
        double.fail("cuMemcpyHtoDAsync", 2, 719)
        assert [into(there, here, copies) for _ in range(3)] == [0, 719, 0]
        address = ctypes.c_uint64()
        assert double.result("cuMemAlloc", ctypes.byref(address), 1 << 20) == 2
        double.set("fail_copy", 2)
        assert into(there, here, copies) == 0 == into(there, here, copies)
        assert double.result("cuStreamSynchronize", copies) == 214
        assert into(there, here, copies) == 214
        """,
        "memory=1000000",
    )


def test_live_things_are_counted(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        assert double.live() == {"contexts": 1}
        made = [stream(), event(), pinned(), device()]
        assert double.live() == {
            kind: 1
            for kind in ("contexts", "streams", "events", "allocations", "host_allocations")
        }
        frees = ("cuStreamDestroy", "cuEventDestroy", "cuMemFreeHost", "cuMemFree")
        for free, handle in zip(frees, made):
            double.call(free, handle)
        assert double.result("cuEventDestroy", made[1]) == 400
        double.call("cuDevicePrimaryCtxRelease", 0)
        assert double.live() == {}
        """,
    )


def test_what_a_process_must_not_do(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        import threading
        address = ctypes.c_uint64()
        allocate = lambda: double.result("cuMemAlloc", ctypes.byref(address), 4096)
        results = []
        thread = threading.Thread(target=lambda: results.append(allocate()))
        thread.start(); thread.join()
        assert results == [201]  # no context is current on that thread
        child = os.fork()
        if child == 0:
            os._exit(double.result("cuInit", 0) + allocate())
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 6  # not initialised, twice
        """,
    )


def test_a_guard_keeps_the_host_out(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        copies, here, there = stream(), pinned(), device()
        fill(here, 5)
        into(there, here, copies)
        double.call("cuStreamSynchronize", copies)
        assert is_all(there, 5)
        child = os.fork()
        if child == 0:
            ctypes.string_at(there, 1)
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -11
        """,
        "guard=1",
    )


def test_images_and_entry_points(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        def find(name, version):
            address, status = ctypes.c_void_p(), ctypes.c_int()
            result = double.result("cuGetProcAddress_v2", name, ctypes.byref(address), version, 0,
                                   ctypes.byref(status))
            return result, bool(address.value), status.value
        assert find(b"cuMemAlloc", 3020) == (0, True, 0)
        assert find(b"cuMemAlloc", 2000) == (0, False, 2)
        assert find(b"cuNothing", 12000) == (0, False, 1)
        assert find(b"cuMemcpyBatchAsync", 12080) == (1, False, 1)  # newer than the driver
        assert find(b"cuEventQuery", 2000) == (0, False, 1)
        module = ctypes.c_uint64()
        load = lambda image: double.result("cuModuleLoadData", ctypes.byref(module), image)
        assert load(b"rubbish, rubbish") == 200
        assert load(b"\\x50\\xed\\x55\\xba" + bytes(60)) == 0
        assert double.result("cuModuleGetFunction", ctypes.byref(module), module, b"none") == 500
        """,
        "driver_version=12040,missing=cuEventQuery",
    )


def test_unknown_settings_are_refused(cuda_double: Path) -> None:
    with pytest.raises(AssertionError, match='says "sed=3"'):
        run_python(cuda_double, SETUP, "sed=3")
