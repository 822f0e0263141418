"""The CUDA device, on the double of the driver: order, methods of copying, and what goes wrong."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from driver_double import run_python

from tiered_mem import _core
from tiered_mem.errors import DeviceError

SETUP = """
import os, threading, numpy as np
from driver_double import Double
from tiered_mem import _core
from tiered_mem.errors import *
double = Double()
KiB, MiB = 1 << 10, 1 << 20
IMAGE = b"\\x7fELF" + bytes(60)

def raises(kind, call, *words):
    try:
        call()
    except kind as error:
        assert type(error) is kind, error
        assert all(word in str(error) for word in words), error
        return
    raise AssertionError(f"no {kind.__name__}")

def open_gpu(*arguments, **named):
    gpu = _core.CudaDevice(*arguments, **named)
    double.start(arguments[0] if arguments else 0)
    return gpu

def staging(gpu, nbytes):
    memory = gpu.allocate_staging(nbytes)
    array = np.frombuffer(memory, np.uint8)
    return array, array.ctypes.data

def pages(nbytes):
    array = np.zeros(nbytes + 4096, np.uint8)
    start = -array.ctypes.data % 4096
    return array[start : start + nbytes], array.ctypes.data + start

def rows(target, source, nbytes, count, stride=None):
    stride = stride or 2 * nbytes
    return [(target + i * stride, source + i * stride, nbytes) for i in range(count)]
"""


def on_double(library: Path, code: str, settings: str = "") -> str:
    return run_python(library, SETUP + textwrap.dedent(code), settings)


# --- the driver ---


def test_no_driver() -> None:
    code = """
    from tiered_mem import _core
    from tiered_mem.errors import DeviceError
    assert _core.cuda_driver_version() is None and _core.cuda_device_count() == 0
    try:
        _core.CudaDevice()
    except DeviceError as error:
        assert "no CUDA driver" in str(error) and "/no/such/libcuda.so" in str(error)
    else:
        raise AssertionError
    """
    environment = {**os.environ, "TIERED_MEM_CUDA_DRIVER": "/no/such/libcuda.so"}
    subprocess.run([sys.executable, "-c", textwrap.dedent(code)], env=environment, check=True)


@pytest.mark.skipif(_core.cuda_driver_version() is not None, reason="there is a driver here")
def test_no_driver_on_this_machine() -> None:
    with pytest.raises(DeviceError, match="install NVIDIA's driver"):
        _core.CudaDevice(0)


def test_a_driver_that_is_too_old(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        assert _core.cuda_driver_version() == 11080
        raises(DeviceError, _core.CudaDevice, "11.8", "12.0", "update")
        raises(DeviceError, _core.cuda_device_count, "11.8")
        """,
        "driver_version=11080",
    )


def test_a_driver_that_lacks_a_function(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        "raises(DeviceError, _core.CudaDevice, 'cuEventRecord')",
        "missing=cuEventRecord",
    )


def test_a_driver_that_cannot_start(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        "raises(DeviceError, _core.CudaDevice, 'CUDA_ERROR_NOT_SUPPORTED')",
        "fail=cuInit:1:801",
    )


def test_a_driver_without_devices(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        assert _core.cuda_device_count() == 0
        raises(DeviceError, _core.CudaDevice)
        """,
        "num_devices=0",
    )


def test_devices_and_their_properties(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        assert _core.cuda_driver_version() == 13000 and _core.cuda_device_count() == 2
        gpu = open_gpu(1)
        assert "double" in gpu.name and gpu.driver_version == 13000
        assert gpu.compute_capability == (8, 6) and not gpu.integrated
        assert gpu.pci_bus_id.count(":") == 2 and gpu.memory() == (1000000, 1000000)
        assert gpu.asynchronous and gpu.stream_ordered and not gpu.host_accessible
        raises(DeviceError, lambda: gpu.allocate(4096), "segments")
        raises(DeviceError, lambda: _core.CudaDevice(2), "no CUDA device 2", "sees 2")
        raises(DeviceError, lambda: _core.CudaDevice(-1), "no CUDA device -1")
        raises(ConfigError, lambda: _core.CudaDevice(0, "teleport"), "teleport", "engine")
        """,
        "num_devices=2,capability=86,memory=1000000",
    )


# --- copies ---


@pytest.mark.parametrize("method", ["engine", "batch", "kernel"])
def test_blocks_go_there_and_back(cuda_double: Path, method: str) -> None:
    on_double(
        cuda_double,
        f"""
        gpu = open_gpu(0, {method!r})
        if {method!r} == "kernel":
            gpu.load_kernels(IMAGE)
        here, there_at = staging(gpu, 3 * MiB)
        back, back_at = staging(gpu, 3 * MiB)
        device = double.make("cuMemAlloc", 3 * MiB)
        random = np.random.default_rng(0)
        for nbytes, count in ((1, 7), (100, 5000), (4096, 300), (1 * MiB, 1)):
            here[:] = random.integers(0, 256, here.size)
            back[:] = 0
            came = gpu.copy("in", rows(device, there_at, nbytes, count))
            went = gpu.copy("out", rows(back_at, device, nbytes, count), [came])
            gpu.wait(went)
            assert gpu.reached(went) and gpu.reached(came)
            span = np.arange(2 * nbytes * count)
            moved = span[(span // nbytes) % 2 == 0]
            assert (back[moved] == here[moved]).all()
            assert not np.delete(back, moved).any()
        assert double.count("races") == 0
        counts = {{"engine": "copies", "batch": "batches", "kernel": "launches"}}
        assert double.count(counts[{method!r}]) > 0
        del came, went, gpu, here, back
        """,
    )


def test_neighbours_are_joined(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        gpu = open_gpu(0, "engine")
        here, here_at = staging(gpu, 4 * MiB)
        device = double.make("cuMemAlloc", 8 * MiB)
        device += -device % (2 * MiB)
        def num_copies(rows):
            before = double.count("copies")
            gpu.wait(gpu.copy("in", rows))
            return double.count("copies") - before
        assert num_copies(rows(device, here_at, 4096, 64, stride=4096)) == 1
        assert num_copies(rows(device, here_at, 4096, 64, stride=8192)) == 64
        # Another allocation may begin at a multiple of 2 MiB.
        assert num_copies(rows(device + MiB, here_at, 4096, 512, stride=4096)) == 2
        assert num_copies([(device, here_at, 0), (device, here_at, 5)]) == 1
        assert gpu.copy("in", []) is None and gpu.copy("in", [(device, here_at, 0)]) is None
        """,
    )


def test_copies_are_cut_where_pins_end(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        gpu = open_gpu(0, "batch")
        here, at = pages(16 * 4096)
        device = double.make("cuMemAlloc", here.size)
        pins = [gpu.pin(at + i * 4096, 4096) for i in (0, 1, 3)]
        assert gpu.reaches(at, 8192) and gpu.reaches(at + 100, 5000) and gpu.reaches(at, 0)
        assert not gpu.reaches(at, 8193) and not gpu.reaches(at + 8192, 1)
        here[:] = np.arange(here.size) % 251
        gpu.wait(gpu.copy("in", [(device, at, here.size)]))
        assert double.read(device, here.size) == here.tobytes()
        # Pinned: 0 | 1 | 3, by a batch. Not pinned: 2 and all from 4 on.
        assert double.count("pageable_copies") == 2 and double.count("batches") == 1
        pins[0].release()
        assert not gpu.reaches(at, 4096) and gpu.reaches(at + 4096, 4096)
        raises(DeviceError, lambda: gpu.pin(at + 4096, 4096), "pin 4096", "ALREADY_REGISTERED")
        del pins
        assert double.count("live_registrations") == 0
        """,
    )


def test_compute_and_copies_wait_for_each_other(cuda_double: Path) -> None:
    """No wait of the host: the double finds a race wherever an order is missing."""
    on_double(
        cuda_double,
        """
        gpu = open_gpu()
        compute = double.make("cuStreamCreateWithPriority", 1, 0)
        here, here_at = staging(gpu, 64 * 4096)
        slot = double.make("cuMemAlloc", 4096)
        results, results_at = staging(gpu, 64 * 4096)
        here[:] = np.repeat(np.arange(64), 4096)
        waits = double.count("waits")
        released = None
        for i in range(64):
            on = compute if i % 2 else 0
            came = gpu.copy("in", [(slot, here_at + i * 4096, 4096)], [released])
            gpu.hold_compute(on, came)
            double.call("cuMemcpyDtoHAsync", results_at + i * 4096, slot, 4096, on)  # computes
            released = gpu.mark_compute(on)
        assert double.count("waits") == waits
        gpu.wait(released)
        assert (results == here).all() and double.count("races") == 0
        assert double.count("live_events") < 200
        """,
    )


def test_threads_and_recycled_events(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        gpu = open_gpu()
        failed = []
        def work(number):
            try:
                here, here_at = staging(gpu, 64 * KiB)
                back, back_at = staging(gpu, 64 * KiB)
                device = double.make("cuMemAlloc", 64 * KiB)
                for i in range(100):
                    here[:] = (number * 100 + i) % 256
                    came = gpu.copy("in", rows(device, here_at, 4096, 8))
                    gpu.wait(gpu.copy("out", rows(back_at, device, 4096, 8), [came]))
                    assert (back.reshape(8, 2, 4096)[:, 0] == here[0]).all()
            except BaseException as error:
                failed.append(error)
        def start(number):
            double.start()
            work(number)
        threads = [threading.Thread(target=start, args=(n,)) for n in range(4)]
        [t.start() for t in threads]; [t.join() for t in threads]
        assert not failed, failed
        assert double.count("races") == 0 and double.count("live_events") <= 16
        """,
        "max_delay_us=20",
    )


def test_any_thread_can_call(cuda_double: Path) -> None:
    """One that has no context, and one that computes on another device."""
    on_double(
        cuda_double,
        """
        first, second = _core.CudaDevice(0), _core.CudaDevice(1)
        double.start(1)
        here, here_at = staging(first, 4096)
        device = double.make("cuMemAlloc", 4096)
        first.wait(first.copy("in", [(device, here_at, 4096)]))
        done = []
        def call():
            first.wait(first.copy("in", [(device, here_at, 4096)]))
            done.append(double.make("cuCtxGetCurrent"))
        thread = threading.Thread(target=call)
        thread.start(); thread.join()
        assert done == [0]  # as it was before
        assert double.make("cuCtxGetCurrent") != 0
        """,
        "num_devices=2",
    )


def test_all_is_given_back(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        gpu = _core.CudaDevice(0, "kernel")
        gpu.load_kernels(IMAGE)
        here, here_at = staging(gpu, 8192)
        other, other_at = pages(4096)
        pin = gpu.pin(other_at, 4096)
        double.start()
        device = double.make("cuMemAlloc", 8192)
        mark = gpu.copy("in", [(device, here_at, 4096), (device + 4096, other_at, 4096)])
        gpu.wait(mark)
        double.call("cuMemFree", device)
        double.call("cuDevicePrimaryCtxRelease", 0)
        del gpu, here  # a mark and a pin may outlive their device
        assert double.count("live_registrations") == 1
        del mark, pin
        assert double.live() == {}, double.live()
        """,
    )


# --- methods ---


def test_calibration_chooses(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        import json
        gpu = open_gpu()
        assert gpu.copy_method("in", 4096, 1000) == "batch"  # the default, without kernels
        assert gpu.copy_method("in", 4096, 2) == gpu.copy_method("in", MiB, 1000) == "engine"
        gpu.load_kernels(IMAGE)
        assert gpu.copy_method("out", 4096, 1000) == "kernel"
        live = double.live()
        table = json.loads(json.dumps(gpu.calibrate()))
        assert double.live().get("allocations") == live.get("allocations")
        seen = {(r[0], r[1]) for r in table["times"]}
        assert seen == {(d, m) for d in ("in", "out") for m in ("engine", "batch", "kernel")}
        assert {r[2] for r in table["times"]} >= {4 * KiB, 16 * MiB}
        assert table["in_bytes_per_second"] > 0 and table["duplex_bytes_per_second"] > 0
        gpu.set_calibration(table)

        def times(**seconds):  # of one block and of 101
            return [
                ["in", method, nbytes, count, one + (count - 1) * more]
                for method, (one, more) in seconds.items()
                for nbytes in (4 * KiB, MiB)
                for count in (1, 101)
            ]
        known = times(engine=(1e-5, 1e-5), batch=(3e-5, 5e-6), kernel=(9e-5, 1e-6))
        gpu.set_calibration({"version": 1, "times": known})
        methods = [gpu.copy_method("in", 64 * KiB, n) for n in (1, 4, 10, 20, 1000)]
        assert methods == ["engine", "engine", "batch", "kernel", "kernel"]
        # A kernel that is hardly faster isn't worth the multiprocessors it takes.
        gpu.set_calibration({"version": 1, "times": times(engine=(1.0, 1.0), kernel=(0.97, 0.97))})
        assert gpu.copy_method("in", 4096, 50) == "engine"
        assert gpu.copy_method("out", 4096, 50) == "kernel"  # nothing known: the default
        row = ["in", "engine", 4096, 1, 1.0]
        for bad in (
            {}, {"version": 2, "times": []}, {"version": 1}, {"version": 1, "times": [[1]]},
            {"version": 1, "times": [["up", *row[1:]]]}, {"version": 1, "times": [row[:4] + [0.0]]},
            {"version": 1, "times": [row[:4] + [float("nan")]]},
            {"version": 1, "times": [row[:2] + [0, 1, 1.0]]},
        ):
            raises(ConfigError, lambda: gpu.set_calibration(bad))
        """,
        "max_delay_us=0",
    )


def test_without_batched_copies(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        raises(DeviceError, lambda: _core.CudaDevice(0, "batch"), "12.8")
        gpu = open_gpu()
        assert gpu.copy_method("in", 4096, 1000) == "engine"
        """,
        "missing=cuMemcpyBatchAsync",
    )


def test_kernel_images(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        gpu = open_gpu(0, "kernel")
        here, here_at = staging(gpu, 4096)
        device = double.make("cuMemAlloc", 4096)
        raises(DeviceError, lambda: gpu.copy("in", [(device, here_at, 4096)]), "no", "kernels.cu")
        raises(DeviceError, lambda: gpu.launch("tiered_mem_copy_blocks", (1,) * 3, (1,) * 3, []))
        raises(DeviceError, lambda: gpu.load_kernels(b""), "empty")
        raises(DeviceError, lambda: gpu.load_kernels(b"no image, for sure"), "INVALID_IMAGE")
        double.fail("cuModuleGetFunction", 1, 500)
        raises(DeviceError, lambda: gpu.load_kernels(IMAGE), "tiered_mem_copy_blocks")
        assert double.count("live_modules") == 0
        gpu.load_kernels(IMAGE)
        raises(DeviceError, lambda: gpu.launch("nothing", (1,) * 3, (32, 1, 1), []), "nothing")
        here[:] = 5
        blocks, blocks_at = staging(gpu, 24)
        blocks.view(np.uint64)[:] = (device, here_at, 4096)
        gpu.launch("tiered_mem_copy_blocks", (2, 1, 1), (64, 1, 1), [blocks_at, 1])
        gpu.wait(gpu.mark_compute())
        assert double.read(device, 4096) == bytes([5]) * 4096
        double.fail("cuLaunchKernel", 1, 801)
        copy = [(device, here_at, 4096)]
        raises(TransferError, lambda: gpu.copy("in", copy), "copying 1 blocks in", "NOT_SUPPORTED")
        gpu.wait(gpu.copy("in", copy))
        """,
    )


# --- what goes wrong ---


@pytest.mark.parametrize(
    "function", ["cuMemcpyHtoDAsync", "cuMemcpyBatchAsync", "cuStreamWaitEvent", "cuEventRecord"]
)
def test_a_copy_that_cannot_start(cuda_double: Path, function: str) -> None:
    """Nothing of the batch is on its way afterwards, and the next one works."""
    on_double(
        cuda_double,
        f"""
        gpu = open_gpu(0, "batch" if "Batch" in {function!r} else "engine")
        here, here_at = staging(gpu, 64 * KiB)
        device = double.make("cuMemAlloc", 64 * KiB)
        before = gpu.mark_compute()
        double.fail({function!r}, 3 if "HtoD" in {function!r} else 1, 2)
        words = ["CUDA_ERROR_OUT_OF_MEMORY"]
        if "Memcpy" in {function!r}:
            words += [{function!r}, "direction in", "4096 bytes", "to 0x"]
        copies = rows(device, here_at, 4096, 8)
        raises(TransferError, lambda: gpu.copy("in", copies, [before]), *words)
        here[:] = 3
        gpu.wait(gpu.copy("in", copies))
        assert double.count("races") == 0 and double.read(device, 2) == bytes([3, 3])
        """,
    )


def test_a_copy_that_fails_later(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        gpu = open_gpu()
        here, here_at = staging(gpu, 4096)
        device = double.make("cuMemAlloc", 4096)
        mark = gpu.copy("in", [(device, here_at, 4096)])
        raises(TransferError, lambda: gpu.wait(mark), "CUDA_ERROR_ECC_UNCORRECTABLE")
        raises(TransferError, lambda: gpu.reached(mark))
        raises(TransferError, lambda: gpu.copy("in", [(device, here_at, 4096)]))
        raises(TransferError, lambda: gpu.mark_compute())
        """,
        "fail_copy=1",
    )


def test_a_copy_that_never_ends(cuda_double: Path) -> None:
    """It can be asked for without waiting, and the device goes without waiting for it."""
    on_double(
        cuda_double,
        """
        gpu = open_gpu()
        here, here_at = staging(gpu, 4096)
        device = double.make("cuMemAlloc", 4096)
        double.set("hang_copy", 1)
        mark = gpu.copy("in", [(device, here_at, 4096)])
        assert not gpu.reached(mark)
        del gpu
        os._exit(0)
        """,
    )


def test_too_little_memory(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        gpu = open_gpu()
        raises(BudgetError, lambda: gpu.allocate_staging(2 * MiB), "2097152", "OUT_OF_MEMORY")
        raises(BudgetError, gpu.calibrate, "pinned")
        here, at = pages(4096)
        double.fail("cuMemHostRegister", 1, 2)
        raises(DeviceError, lambda: gpu.pin(at, 4096), "can't pin 4096", "OUT_OF_MEMORY")
        assert not gpu.reaches(at, 4096)
        """,
        f"host_memory={1 << 20}",
    )


def test_a_forked_child(cuda_double: Path) -> None:
    on_double(
        cuda_double,
        """
        gpu = open_gpu()
        here, here_at = staging(gpu, 4096)
        device = double.make("cuMemAlloc", 4096)
        mark = gpu.copy("in", [(device, here_at, 4096)])
        child = os.fork()
        if child == 0:
            for call in (
                lambda: gpu.copy("in", [(device, here_at, 4096)]), lambda: gpu.reached(mark),
                gpu.mark_compute, gpu.memory, lambda: gpu.name, lambda: gpu.allocate_staging(1),
            ):
                raises(RuntimeClosedError, call, "spawn")
            raises(DeviceError, _core.CudaDevice, "spawn")
            del mark, gpu, here  # gives nothing back, and doesn't crash
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        gpu.wait(mark)
        """,
    )


@pytest.mark.parametrize("pageable", [0, 1])
def test_memory_shared_with_the_cpu(cuda_double: Path, pageable: int) -> None:
    on_double(
        cuda_double,
        """
        gpu = open_gpu()
        assert gpu.integrated and gpu.host_accessible and not gpu.asynchronous
        hbm = np.frombuffer(gpu.allocate(8192), np.uint8)
        here, at = pages(4096)
        here[:] = 9
        assert gpu.reaches(at, 4096)
        gpu.pin(at, 4096)
        assert double.count("live_registrations") == 0
        mark = gpu.copy("in", [(hbm.ctypes.data, at, 4096)], [gpu.mark_compute()])
        assert mark is None and (hbm[:4096] == 9).all() and double.count("copies") == 0
        raises(DeviceError, gpu.calibrate, "shares its memory")
        """,
        f"integrated=1,pageable_access={pageable}",
    )
