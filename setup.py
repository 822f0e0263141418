"""Build of the C++ extension. Everything declarative is in pyproject.toml."""

from glob import glob

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup

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

setup(ext_modules=[core])
