"""The double of CUDA's driver: compiled, and used from Python.

It plays a CUDA device over host memory and is no GPU: tests/cuda_double/machine.h says what it
checks, control.cpp what can be set and counted.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

TESTS = Path(__file__).parent
ROOT = TESTS.parent
SOURCES = sorted((TESTS / "cuda_double").glob("*.cpp"))


def compile_double(folder: Path, flags: tuple[str, ...] = ("-O1",)) -> Path:
    """Builds the library under `folder`. Raises CalledProcessError."""
    target = folder / "libcuda_double.so"
    flags = ("-std=c++17", "-fPIC", "-pthread", f"-I{ROOT / 'csrc'}", *flags)
    objects = [folder / f"double_{source.stem}.o" for source in SOURCES]

    def compile_one(source: Path, into: Path) -> None:
        subprocess.run(["g++", *flags, "-c", str(source), "-o", str(into)], check=True)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(compile_one, SOURCES, objects))
    command = ["g++", *flags, "-shared", *map(str, objects), "-o", str(target)]
    subprocess.run([*command, "-Wl,-z,nodelete"], check=True)  # its threads never end
    return target


def run_python(library: Path, code: str, settings: str = "", timeout: float = 60) -> str:
    """Runs code in a process of its own whose CUDA driver is the double.

    A driver is loaded once a process, so no test loads the double into its own. Modules of tests/
    can be imported. `settings` is as control.cpp reads them: "max_delay_us=0,memory=1000000".
    Returns what was printed; fails if the code does.
    """
    environment = {
        **os.environ,
        "TIERED_MEM_CUDA_DRIVER": str(library),
        "TIERED_MEM_CUDA_DOUBLE": settings,
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(ROOT), os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment, timeout=timeout, check=False
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


class Double:
    """The double that this process has as its driver."""

    def __init__(self, path: str | None = None) -> None:
        self.library = ctypes.CDLL(path or os.environ["TIERED_MEM_CUDA_DRIVER"])
        for name, result in (("setting", ctypes.c_longlong), ("count", ctypes.c_longlong)):
            getattr(self.library, f"cuda_double_{name}").restype = result
        self.library.cuda_double_alias.restype = ctypes.c_void_p
        self.library.cuda_double_set.argtypes = (ctypes.c_char_p, ctypes.c_longlong)
        self.library.cuda_double_fail.argtypes = (ctypes.c_char_p, ctypes.c_longlong, ctypes.c_int)
        self.library.cuda_double_alias.argtypes = (ctypes.c_ulonglong,)
        self.library.cuda_double_free.argtypes = (ctypes.c_ulonglong,)

    def start(self, ordinal: int = 0) -> None:
        """Initialises the driver and makes the device's context current on this thread."""
        self.call("cuInit", 0)
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), ordinal)
        self.call("cuCtxSetCurrent", context)

    def result(self, function: str, *arguments: Any) -> int:
        """CUresult of a function of the driver's API. Integers are taken as 64 bits."""
        wide = [ctypes.c_uint64(a) if isinstance(a, int) else a for a in arguments]
        return int(getattr(self.library, function)(*wide))

    def call(self, function: str, *arguments: Any) -> None:
        result = self.result(function, *arguments)
        if result:
            raise RuntimeError(f"{function} returned {result}")

    def make(self, function: str, *arguments: Any) -> int:
        """Calls a function that gives a handle or an address in its first parameter."""
        handle = ctypes.c_uint64()
        self.call(function, ctypes.byref(handle), *arguments)
        return handle.value

    def count(self, name: str) -> int:
        return int(self.library.cuda_double_count(name.encode()))

    def set(self, name: str, value: int) -> None:
        if self.library.cuda_double_set(name.encode(), value):
            raise KeyError(name)

    def fail(self, function: str, nth: int, code: int) -> None:
        """Lets the n-th call of a function from now return a code."""
        self.library.cuda_double_fail(function.encode(), nth, code)

    def release_hung(self) -> None:
        self.library.cuda_double_release_hung()

    def allocate(self, nbytes: int) -> tuple[int, Callable[[], None]]:
        """Device memory: its address, and what frees it as torch's allocator would, unwaited."""
        address = self.make("cuMemAlloc", nbytes)
        return address, lambda: self.call("cuda_double_free", address)

    def read(self, address: int, nbytes: int) -> bytes:
        """Bytes of any memory it knows, as they are now: in no order with any stream."""
        return ctypes.string_at(self.library.cuda_double_alias(address), nbytes)

    def live(self) -> dict[str, int]:
        """What hasn't been given back."""
        kinds = ("streams", "events", "allocations", "host_allocations", "registrations")
        kinds += ("modules", "contexts")
        counts = {kind: self.count(f"live_{kind}") for kind in kinds}
        return {kind: count for kind, count in counts.items() if count}
