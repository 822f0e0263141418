"""CRC-32C against the published vectors, and its implementations against each other."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiered_mem import _core

# RFC 3720, appendix B.4, and the check value of the CRC catalogue.
VECTORS = [
    (bytes(32), 0x8A9136AA),
    (bytes([0xFF] * 32), 0x62A8AB43),
    (bytes(range(32)), 0x46DD794E),
    (bytes(range(31, -1, -1)), 0x113FDB5C),
    (b"123456789", 0xE3069283),
    (b"", 0),
]


@pytest.mark.parametrize(("data", "expected"), VECTORS)
def test_published_vectors(data, expected):
    assert _core.crc32c(data) == expected
    results = _core.crc32c_by_implementation(data)
    assert "tables" in results  # the one that runs everywhere
    assert set(results.values()) == {expected}


# The implementations work in blocks of 3 x 1024 and of 256 bytes: sizes around their multiples,
# and odd starts.
@settings(deadline=None, max_examples=60)
@given(
    nbytes=st.one_of(
        st.integers(0, 300),
        st.integers(500, 780),
        st.integers(3060, 3090),
        st.integers(6130, 6160),
        st.integers(0, 70_000),
    ),
    start=st.integers(0, 9),
    cut=st.floats(0, 1),
    seed=st.integers(0, 2**32 - 1),
)
def test_implementations_agree_at_any_size_alignment_and_cut(nbytes, start, cut, seed):
    data = np.random.default_rng(seed).integers(0, 256, start + nbytes, np.uint8)[start:]
    results = _core.crc32c_by_implementation(data)
    expected = results["tables"]
    middle = int(cut * nbytes)
    assert set(results.values()) == {expected}
    assert _core.crc32c(data[middle:], _core.crc32c(data[:middle])) == expected


def test_every_flipped_bit_shows():
    data = np.random.default_rng(0).integers(0, 256, 64, np.uint8)
    expected = _core.crc32c(data)
    for bit in range(8 * data.size):
        data[bit // 8] ^= 1 << bit % 8
        assert _core.crc32c(data) != expected
        data[bit // 8] ^= 1 << bit % 8


def test_a_strided_buffer_is_refused():
    from tiered_mem.errors import ConfigError

    with pytest.raises(ConfigError, match="contiguous"):
        _core.crc32c(np.zeros(64, np.uint8)[::2])
