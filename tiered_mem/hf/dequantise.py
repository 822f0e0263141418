"""transformers' dequantisation, bit for bit and faster: what runs for each use of an expert.

torch converts fp8 and looks up single 4-bit codes slowly on a CPU. Here a whole byte indexes a
table, and rows are converted so many at a time that they stay in the cache. Products and roundings
are those of `Fp8Dequantize` and `convert_moe_packed_tensors` in transformers.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from transformers.integrations.finegrained_fp8 import Fp8Dequantize
from transformers.integrations.mxfp4 import FP4_VALUES, Mxfp4Dequantize

_CACHE_NBYTES = 2 << 20  # of fp32 values that a CPU converts at a time


def dequantise(
    codes: torch.Tensor, table: torch.Tensor, scales: torch.Tensor, out: torch.Tensor
) -> None:
    """Fill `out` [rows, columns] with `table[code] * scale`, multiplied in fp32 and then rounded.

    `codes` are bytes [rows, bytes], `table` [256] has the fp32 value or values of each, `scales`
    are fp32 [block rows, block columns]: blocks of equal size that make up `out`.
    """
    (num_rows, columns), (grid_rows, grid_columns) = out.shape, scales.shape
    block_rows = num_rows // grid_rows
    step = grid_rows
    if out.device.type == "cpu":
        step = max(1, _CACHE_NBYTES // (4 * columns * block_rows))
    for first in range(0, grid_rows, step):
        some = scales[first : first + step, None, :, None]
        rows = slice(first * block_rows, (first + len(some)) * block_rows)
        values = table.index_select(0, codes[rows].reshape(-1).int()).view(torch.float32)
        values.view(len(some), block_rows, grid_columns, -1).mul_(some)
        out[rows].copy_(values.view(-1, columns))


@functools.cache
def fp8_table(dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """The value of each byte of an fp8 dtype, fp32 [256]."""
    return torch.arange(256, dtype=torch.uint8).view(dtype).float().to(device)


@functools.cache
def fp4_table(device: torch.device) -> torch.Tensor:
    """The two e2m1 values of each byte, the low half first, as pairs of fp32 in a float64 [256]."""
    byte, values = torch.arange(256), torch.tensor(FP4_VALUES, dtype=torch.float32)
    pairs = torch.stack([values[byte & 15], values[byte >> 4]], dim=-1)
    # One element a byte: torch gathers rows of a matrix much slower.
    return pairs.view(torch.float64).squeeze(-1).to(device)


class FastFp8Dequantize(Fp8Dequantize):  # type: ignore[misc]
    """`Fp8Dequantize` for the matrices of experts: fp8, or int8 with two fp4 values to a byte."""

    def _dequantize_one(
        self, quantized: torch.Tensor, scales: torch.Tensor, output_dtype: Any = None
    ) -> torch.Tensor:
        known = (torch.int8, torch.float8_e4m3fn, torch.float8_e5m2)
        plain = quantized.dtype in known and quantized.dim() == scales.dim() == 2
        if not plain or output_dtype is None or quantized.device.type == "meta":
            result: torch.Tensor = super()._dequantize_one(quantized, scales, output_dtype)
            return result
        is_fp4 = quantized.dtype == torch.int8
        device = quantized.device
        table = fp4_table(device) if is_fp4 else fp8_table(quantized.dtype, device)
        factors = scales.float()
        if scales.dtype == torch.uint8:  # exponents
            factors = (factors - 127.0).exp2()
        rows, columns = quantized.shape
        out = torch.empty(rows, columns * (2 if is_fp4 else 1), dtype=output_dtype, device=device)
        dequantise(quantized.view(torch.uint8), table, factors, out)
        return out


class FastMxfp4Dequantize(Mxfp4Dequantize):  # type: ignore[misc]
    """`Mxfp4Dequantize` for one expert: blocks [1, rows, groups, 16] to [1, 32 * groups, rows]."""

    def convert(
        self,
        input_dict: dict[str, Any],
        model: Any = None,
        full_layer_name: str | None = None,
        **kwargs: Any,
    ) -> dict[str, torch.Tensor]:
        """Make the parameter `full_layer_name` of `model` from its `_blocks` and `_scales`."""
        assert full_layer_name is not None
        name = full_layer_name.rpartition(".")[2]
        [blocks], [scales] = input_dict[f"{name}_blocks"], input_dict[f"{name}_scales"]
        _, rows, groups, half = blocks.shape
        dtype = model.get_parameter(full_layer_name).dtype
        out = torch.empty(1, 2 * half * groups, rows, dtype=dtype, device=blocks.device)
        exponents = scales[0].int() - 127
        dequantise(
            blocks[0].flatten(1), fp4_table(blocks.device), torch.pow(2.0, exponents), out[0].T
        )
        return {full_layer_name: out}


def faster(operation: Any, quantizer: Any) -> Any:
    """Return an operation that gives the same: the fast one, or `operation` itself."""
    if type(operation) is Fp8Dequantize:
        return FastFp8Dequantize(quantizer)
    if type(operation) is Mxfp4Dequantize:
        return FastMxfp4Dequantize(quantizer)
    return operation
