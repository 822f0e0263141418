"""Build of the C++ extension and the GPU's kernels. Everything declarative is in pyproject.toml."""

import os
import shutil
import subprocess
from glob import glob
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

ParallelCompile("NPY_NUM_BUILD_JOBS", default=2).install()

core = Pybind11Extension(
    "tiered_mem._core",
    sorted(glob("csrc/*.cpp")),
    depends=sorted(glob("csrc/*.h") + glob("policies/eviction/*.h")),
    include_dirs=["csrc", "policies"],
    cxx_std=17,
    extra_compile_args=["-O3", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
    libraries=["dl"],
)

KERNELS = Path("csrc/kernels.cu")
# Turing, A100, consumer Ampere, Ada, Hopper, and Blackwell in servers and out of them.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)


class BuildWithKernels(build_ext):
    """Puts kernels.fatbin beside the extension where there is nvcc, and into wheels their source.

    A machine without nvcc builds all the same: CuPy compiles the source where it runs.
    """

    def run(self):
        super().run()
        folder = Path(self.get_ext_fullpath(core.name)).parent
        if not self.inplace:
            shutil.copy(KERNELS, folder)
        fatbin = folder / "kernels.fatbin"
        if not fatbin.exists() or fatbin.stat().st_mtime < KERNELS.stat().st_mtime:
            fatbin.unlink(missing_ok=True)  # rather none than one of another source
            build_kernels(fatbin)


def build_kernels(fatbin):
    nvcc = find_nvcc()
    if nvcc is None:
        print(f"no nvcc on PATH or in CUDA_HOME: no {fatbin}; CuPy compiles the kernels instead")
        return
    listed = subprocess.run([nvcc, "--list-gpu-arch"], check=True, capture_output=True, text=True)
    archs = [arch for arch in ARCHITECTURES if f"compute_{arch}" in listed.stdout.split()]
    codes = [(arch, f"sm_{arch}") for arch in archs]
    codes += [(arch, f"compute_{arch}") for arch in (archs[0], archs[-1])]  # PTX, for all others
    command = [nvcc, "-fatbin", "-std=c++17", "-O3", "-Xfatbin", "-compress-all"]
    for arch, code in codes:
        command += ["-gencode", f"arch=compute_{arch},code={code}"]
    part = fatbin.with_suffix(".part")
    if subprocess.run([*command, str(KERNELS), "-o", str(part)], check=False).returncode:
        print(f"{nvcc} failed: no {fatbin}; CuPy compiles the kernels instead")
        return
    part.replace(fatbin)


def find_nvcc():
    homes = [os.environ[name] for name in ("CUDA_HOME", "CUDA_PATH") if os.environ.get(name)]
    places = [str(Path(home) / "bin") for home in homes] + [os.environ.get("PATH", os.defpath)]
    return shutil.which("nvcc", path=os.pathsep.join(places))


setup(ext_modules=[core], cmdclass={"build_ext": BuildWithKernels})
