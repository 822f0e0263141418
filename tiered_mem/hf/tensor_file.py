"""Reads of single tensors, or rows of them, from safetensors files.

The format: 8 bytes little-endian header length, a JSON header (name -> dtype, shape, [begin, end)
relative to the end of the header), then the bytes. Reading by offset keeps a bounded buffer (a
mapped file would count against the process as it is streamed), and checks the whole header against
the file's size before any tensor is trusted.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import NamedTuple

import torch

from tiered_mem.errors import CheckpointError

_DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
_MAX_HEADER = 100_000_000  # the format's own limit
_MAX_SAMPLES = 4096  # pages hashed per file for the fingerprint: a third of a second at worst
_PAGE = 4096


class TensorInfo(NamedTuple):
    """A tensor's format dtype, shape, and absolute byte range [begin, end) in its file."""

    format_dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return self.end - self.begin

    @property
    def dtype(self) -> torch.dtype:
        return _DTYPES[self.format_dtype]

    def get_dtype(self) -> str:
        """The dtype as the file spells it (the name transformers' quantisers ask by)."""
        return self.format_dtype


class TensorFile:
    """One safetensors file, open for reads from any thread.

    Raises `CheckpointError` if the file is missing, isn't safetensors, or is shorter or longer
    than its header says.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self._fd = -1
        try:
            self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise CheckpointError(
                f"can't open the checkpoint's file {path}: {error.strerror}; "
                "the checkpoint is incomplete, fetch that file again"
            ) from error
        try:
            self._nbytes = os.fstat(self._fd).st_size
            header = self._read_header()
            self.tensors = {n: self._check(n, v) for n, v in header.items() if n != "__metadata__"}
            expected = max((info.end for info in self.tensors.values()), default=self._data)
            if expected != self._nbytes:
                raise self._broken(f"its tensors end at byte {expected} of {self._nbytes}")
        except BaseException:
            self.close()
            raise

    def read(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Return tensor `name`, or its rows [begin, end) only, as a new tensor in the file's dtype.

        Raises `CheckpointError` if the file became shorter, `OSError` if the read failed.
        """
        info = self.tensors[name]
        shape = info.shape
        start, nbytes = info.begin, info.nbytes
        if end is not None:
            row = nbytes // shape[0]
            start, nbytes = start + begin * row, (end - begin) * row
            shape = (end - begin, *shape[1:])
        data = torch.empty(nbytes, dtype=torch.uint8)
        self._read_into(data.numpy().data, start)
        return data.view(info.dtype).view(shape)

    def add_to_digest(self, digest: hashlib._Hash, pieces: Mapping[str, int]) -> None:
        """Hash the header, which fixes the size, and a page from the middle of each piece.

        `pieces` says into how many equal pieces to take a tensor. The pages tell apart checkpoints
        of one architecture (a base model and its fine-tune have equal headers) without reading the
        file whole. Of more than _MAX_SAMPLES pieces, every second (third, ...) is looked at.
        """
        digest.update(self._header)
        spans = []
        for name, count in pieces.items():
            begin, nbytes = self.tensors[name].begin, self.tensors[name].nbytes // count
            spans += [(begin + i * nbytes, nbytes) for i in range(count)]
        for begin, nbytes in spans[:: -(-len(spans) // _MAX_SAMPLES) or 1]:
            page = bytearray(min(_PAGE, nbytes))
            self._read_into(memoryview(page), begin + (nbytes - len(page)) // 2)
            digest.update(page)

    def close(self) -> None:
        """Close the file. Closing twice is fine."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __del__(self) -> None:
        self.close()

    def _read_header(self) -> dict[str, dict[str, object]]:
        if self._nbytes < 8:
            raise self._broken(f"it has {self._nbytes} bytes")
        length = int.from_bytes(os.pread(self._fd, 8, 0), "little")
        self._data = 8 + length
        if length > _MAX_HEADER or self._data > self._nbytes:
            raise self._broken(f"its header would be {length} bytes of {self._nbytes}")
        self._header = os.pread(self._fd, length, 8)
        try:
            header = json.loads(self._header)
        except ValueError as error:
            raise self._broken(f"its header isn't JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._broken("its header isn't a JSON object")
        return header

    def _check(self, name: str, entry: dict[str, object]) -> TensorInfo:
        try:
            begin, end = (int(offset) for offset in entry["data_offsets"])  # type: ignore[attr-defined]
            shape = tuple(int(size) for size in entry["shape"])  # type: ignore[attr-defined]
            dtype = str(entry["dtype"])
        except (KeyError, TypeError, ValueError) as error:
            raise self._broken(f"its header entry of {name} is malformed") from error
        if dtype not in _DTYPES:
            raise CheckpointError(f"{self.path}: torch has no dtype {dtype}, that of tensor {name}")
        nbytes = math.prod(shape) * _DTYPES[dtype].itemsize
        info = TensorInfo(dtype, shape, self._data + begin, self._data + end)
        if begin < 0 or end - begin != nbytes:
            raise self._broken(f"tensor {name} of {nbytes} bytes lies at [{begin}, {end})")
        if info.end > self._nbytes:
            raise self._broken(f"tensor {name} ends at byte {info.end} of {self._nbytes}")
        return info

    def _read_into(self, out: memoryview, offset: int) -> None:
        done = 0
        while done < len(out):
            count = os.preadv(self._fd, [out[done:]], offset + done)
            if count == 0:
                raise self._broken(f"it ends at byte {offset + done}, inside a tensor")
            done += count

    def _broken(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.path} is not a whole safetensors file: {what}; fetch that file again"
        )
