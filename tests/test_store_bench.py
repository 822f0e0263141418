"""The tools that the store's benchmark measures with tell the truth."""

from __future__ import annotations

import importlib.util
import mmap
import os
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
MIB = 1 << 20


@pytest.fixture(scope="module")
def cold():
    spec = importlib.util.spec_from_file_location("cold", BENCHMARKS / "cold.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_drop_empties_the_page_cache_of_mapped_pages_too(cold, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(os.urandom(4 * MIB))
    assert cold.cached_nbytes(path) == 4 * MIB
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[:: mmap.PAGESIZE]) >= 0  # every page is mapped now
        if cold.drop([path]) != 0:
            pytest.skip("this filesystem keeps its pages, as tmpfs does")
        assert cold.cached_nbytes(path) == 0
        assert mapped[0] == path.read_bytes()[0]
        assert cold.cached_nbytes(path) > 0


def test_cachestat_and_mincore_agree(cold, tmp_path):
    path = tmp_path / "file"
    path.write_bytes(bytes(MIB))
    fd = os.open(path, os.O_RDONLY)
    try:
        assert cold._mincore_nbytes(fd) == cold.cached_nbytes(path) == MIB
    finally:
        os.close(fd)
