"""Settings of the whole test run."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
from driver_double import compile_double

# Threads split a product's sums differently in different kernels, so tokens and logits compare
# bit by bit on one thread only; and small products on two threads crawl beside a busy core.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session")
def cuda_double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The double of CUDA's driver: a library, for driver_double.run_python."""
    if shutil.which("g++") is None:
        pytest.skip("no g++: the double of the CUDA driver can't be built")
    return compile_double(tmp_path_factory.mktemp("cuda_double"))
