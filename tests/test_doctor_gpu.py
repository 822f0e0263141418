"""What the doctor and the CUDA backend say of a GPU: here the double of its driver."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver_double import run_python

from tiered_mem.config import DeviceMemory, WorkingSet
from tiered_mem.doctor import advise

GIB = 1 << 30
MIB = 1 << 20


def test_the_doctor_describes_and_measures_a_gpu(cuda_double: Path) -> None:
    code = """
from tiered_mem import doctor
from tiered_mem.cli.doctor import _describe
(gpu,) = doctor.examine_gpus()
assert gpu.total_nbytes == 1 << 30 and gpu.memory.name == "cuda:0", gpu
assert (gpu.compute_capability, gpu.driver_version, gpu.shares_memory) == ("9.0", "13.0", False)
text = _describe(gpu)
assert text.startswith("cuda:0: ") and "1.0 GiB free" in text, text
link = doctor.measure_gpu(gpu)
assert link.name == "DRAM to cuda:0" and link.bytes_per_second > 0
"""
    run_python(cuda_double, code, "max_delay_us=0")


def test_a_calibration_is_kept_and_segments_are_viewed(cuda_double: Path, tmp_path: Path) -> None:
    code = f"""
import json, os, pathlib, torch
os.environ["XDG_CACHE_HOME"] = {str(tmp_path)!r}
from double_backend import DoubleBackend
DoubleBackend(calibrate=True)
(path,) = (pathlib.Path({str(tmp_path)!r}) / "tiered-mem").iterdir()
kept = json.loads(path.read_text())
assert set(kept["identity"]) == {{"name", "driver", "pci_bus_id", "kernels"}}
assert kept["calibration"]["times"]
DoubleBackend._measure = None  # not again
backend = DoubleBackend(calibrate=True)
segment = backend.allocate(1 << 20)
low, high = segment[: 1 << 19], segment[1 << 19 :]
backend._segments.add(low), backend._segments.add(high)
del segment
seam = backend.view(high.data_ptr() - 4096, 8192)
seam.fill_(3)
assert low[-4096:].eq(3).all() and high[:4096].eq(3).all()
try:
    backend.allocate(1 << 40)
except Exception as error:
    assert type(error).__name__ == "BudgetError" and "TiB left for HBM" in str(error), error
else:
    raise AssertionError("so much can't be had")
"""
    run_python(cuda_double, code, "max_delay_us=0")


def test_dram_is_pinned_in_the_background(cuda_double: Path, tmp_path: Path) -> None:
    code = f"""
import pathlib, time
import numpy as np
from double_backend import DoubleBackend
from test_backends import NUM_EXPERTS, SLOT, read, write_store
from tiered_mem.device.pinning import Pinning
from tiered_mem.runtime import Runtime
from tiered_mem.store import Store
Pinning._EVERY_SECONDS = 0.01
path = pathlib.Path({str(tmp_path)!r}) / "store"
write_store(path)
backend = DoubleBackend()
with Store.open(path) as store, Runtime(4 * SLOT, 24 * SLOT, device=backend) as runtime:
    space = runtime.attach(store)
    until = time.monotonic() + 30
    while backend.double.count("registered_nbytes") < 8 * SLOT:
        assert time.monotonic() < until
        for layer in range(2):
            read(space, layer, [0, 3, 6, 9])
        time.sleep(0.01)
assert backend.double.count("registered_nbytes") == 0
assert backend.double.count("races") == 0 and backend.double.count("freed_in_use") == 0
"""
    run_python(cuda_double, code, "max_delay_us=50")


@pytest.mark.parametrize(
    ("free", "spare", "advice"),
    [
        (20 * GIB, 30 * GIB, ("auto", "0")),
        (4 * GIB, 30 * GIB, ("auto", f"{6 * 1024 + 256}MiB")),
        (4 * GIB, 2 * GIB, ("auto", "2048MiB")),
        (GIB // 2, 2 * GIB, ("auto", "0")),
    ],
)
def test_budgets_for_a_gpu(free: int, spare: int, advice: tuple[str, str]) -> None:
    gpu = DeviceMemory("cuda:0", free, 8 * GIB)
    told = advise(spare, WorkingSet(10 * GIB, 3 * GIB, GIB // 2), gpu)
    assert (told.hbm, told.dram) == advice
    assert "cuda:0" in told.why
