"""csrc/kernels.cu compiled for the host, and called from Python."""

from __future__ import annotations

import ctypes
import subprocess
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parent.parent / "csrc" / "kernels.cu"

_CALLER = """
#include "kernels.cu"
extern "C" bool run(const char* name, unsigned grid, unsigned block, void** parameters) {
  const auto launch = tiered_mem_bind_kernel(name, grid, block, parameters);
  if (launch) launch();
  return bool(launch);
}
"""


class HostKernels:
    """Has the `launch` of `_core.CudaDevice`, runs the kernel at once, on this thread.

    Words that aren't aligned, which a GPU refuses, end the process.
    """

    def __init__(self, folder: Path) -> None:
        source, library = folder / "kernels.cpp", folder / "kernels.so"
        source.write_text(_CALLER)
        flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", "-fPIC", "-shared"]
        flags += ["-fsanitize=alignment,bounds", "-fno-sanitize-recover=all"]
        command = ["g++", *flags, f"-I{KERNELS.parent}", str(source), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        self._run: Any = ctypes.CDLL(str(library)).run
        self._run.restype = ctypes.c_bool

    def launch(
        self,
        kernel: str,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        arguments: list[int],
        compute: int = 0,
    ) -> None:
        values = (ctypes.c_uint64 * len(arguments))(*arguments)
        places = [ctypes.addressof(values) + 8 * n for n in range(len(arguments))]
        parameters = (ctypes.c_void_p * len(arguments))(*places)
        assert self._run(kernel.encode(), grid[0], block[0], parameters), kernel
