"""The device's kernels, csrc/kernels.cu: an image of them to load, and their use on tensors.

The image is the fatbin that nvcc made when the package was built, or else what CuPy compiles, by
NVRTC, from the same text for the device in hand. TIERED_MEM_KERNELS chooses: `fatbin`, `cupy`, or
the path of an image.
"""

from __future__ import annotations

import functools
import logging
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiered_mem.errors import ConfigError, DeviceError

if TYPE_CHECKING:
    import torch

    from tiered_mem import _core

logger = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent.parent
FATBIN = PACKAGE / "kernels.fatbin"
#: Rows that one block of threads of tiered_mem_remap_ids places.
TILE = 1024
#: Slots of a window: torch's grouped matmul takes 1024 groups at most.
MAX_SLOTS = 1023

_PTX, _CUBIN = 1, 2


def kernel_image(compute_capability: tuple[int, int]) -> bytes:
    """Return an image of the kernels that a device of this capability can load.

    Raises `DeviceError` where there is neither a fatbin for it nor a CuPy that compiles one.
    """
    way = os.environ.get("TIERED_MEM_KERNELS", "")
    if way == "cupy":
        return compiled_image(compute_capability)
    if way not in ("", "fatbin"):
        return _read(Path(way))
    if FATBIN.exists():
        image = FATBIN.read_bytes()
        if serves(image, compute_capability):
            return image
        problem = f"{FATBIN} has no code for {_sm(compute_capability)}"
    else:
        problem = f"there is no {FATBIN}: the package was built without nvcc"
    if way == "fatbin":
        raise DeviceError(f"{problem}; build it with an nvcc that knows the device")
    try:
        return compiled_image(compute_capability)
    except DeviceError as error:
        raise DeviceError(
            f"no kernels for {_sm(compute_capability)}: {problem}; {error}"
        ) from error


def load_kernels(device: _core.CudaDevice) -> None:
    """Load the kernels into a device, compiled there and then if the driver refuses the fatbin.

    A driver older than the nvcc that made the fatbin may do so. Raises `DeviceError`.
    """
    capability = device.compute_capability
    image = kernel_image(capability)
    try:
        device.load_kernels(image)
    except DeviceError as error:
        if os.environ.get("TIERED_MEM_KERNELS"):
            raise
        logger.warning("compiling the kernels by CuPy, which takes a second: %s", error)
        device.load_kernels(compiled_image(capability))


@functools.cache
def compiled_image(compute_capability: tuple[int, int]) -> bytes:
    """Return the kernels as CuPy's NVRTC compiles them for a device: its code, or PTX.

    No driver is needed. Raises `DeviceError` without CuPy or NVRTC.
    """
    try:
        from cupy.cuda import nvrtc

        known = nvrtc.getSupportedArchs()
    except Exception as error:  # CuPy raises classes of its own where NVRTC is missing
        raise DeviceError(
            "CuPy can't compile the kernels "
            f"({type(error).__name__}: {str(error).splitlines()[0]}); "
            "pip install 'cupy-cuda13x[ctk]' (or cupy-cuda12x, for an older driver), or build "
            "tiered-mem with nvcc on the PATH"
        ) from error
    major, minor = compute_capability
    exact = 10 * major + minor in known
    # PTX of the newest architecture that is older than the device.
    arch = max((arch for arch in known if arch <= 10 * major + minor), default=min(known))
    kind = "sm" if exact else "compute"
    program = nvrtc.createProgram(source().read_text(), "kernels.cu", [], [])
    try:
        nvrtc.compileProgram(program, ["--std=c++17", f"--gpu-architecture={kind}_{arch}"])
        image = nvrtc.getCUBIN(program) if exact else nvrtc.getPTX(program)
    except Exception as error:
        raise DeviceError(
            f"NVRTC can't compile {source()} for {kind}_{arch}: {error}; report this, and build "
            "tiered-mem with nvcc on the PATH meanwhile"
        ) from error
    finally:
        nvrtc.destroyProgram(program)
    return image if isinstance(image, bytes) else image.encode()


def source() -> Path:
    """Return the kernels' text: in the package, or in csrc/ where that is a source tree."""
    installed = PACKAGE / "kernels.cu"
    return installed if installed.exists() else PACKAGE.parent / "csrc" / "kernels.cu"


def serves(image: bytes, compute_capability: tuple[int, int]) -> bool:
    """Return whether a fatbin has code for a device, or PTX that its driver can compile for it."""
    major, minor = compute_capability
    for kind, arch in entries(image):
        if kind == _PTX and arch <= 10 * major + minor:
            return True
        # Code runs on devices of its own major version and a minor one not below its own.
        if kind == _CUBIN and arch // 10 == major and arch % 10 <= minor:
            return True
    return False


def entries(image: bytes) -> list[tuple[int, int]]:
    """Return what is in a fatbin: (1 for PTX or 2 for code, architecture), as (2, 90) for sm_90.

    Raises `DeviceError` for what is no fatbin. The layout is that of NVIDIA's fatbinary: a header
    of 16 bytes, then entries, each with its header's and its payload's size.
    """
    found = []
    try:
        magic, _, at, nbytes = struct.unpack_from("<IHHQ", image)
        if magic != 0xBA55ED50:
            raise DeviceError(f"the kernel image is no fatbin: it begins with {magic:#x}; rebuild")
        end = at + nbytes
        while at < end:
            kind, _, header_nbytes, payload_nbytes = struct.unpack_from("<HHIQ", image, at)
            (arch,) = struct.unpack_from("<I", image, at + 28)
            found.append((kind, arch))
            at += header_nbytes + payload_nbytes
    except struct.error as error:
        raise DeviceError(f"the fatbin of the kernels is cut short: {error}; rebuild") from error
    return found


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ConfigError(
            f"TIERED_MEM_KERNELS={path} is neither fatbin nor cupy nor an image that can be read: "
            f"{error}"
        ) from error


def _sm(compute_capability: tuple[int, int]) -> str:
    return "sm_{}{}".format(*compute_capability)


@dataclass(frozen=True)
class Remapped:
    """Rows sorted, stably, by the slot of their expert: what a grouped matmul needs.

    Rows of experts that aren't in the window come last; `offs` doesn't count them.
    """

    #: int64 [num_rows]: the row that comes n-th.
    order: torch.Tensor
    #: int64 [num_rows]: where each row comes.
    inverse: torch.Tensor
    #: int64 [num_rows]: order // top_k, the token whose row comes n-th.
    tokens: torch.Tensor
    #: int32 [num_rows]: the slot of the row that comes n-th, counted from the window's first; -1
    #: for what isn't in the window.
    slots: torch.Tensor
    #: int32 [num_slots]: how many rows come up to and with each slot.
    offs: torch.Tensor


def remap_ids(
    core: Any,
    ids: torch.Tensor,
    table: torch.Tensor,
    *,
    first_slot: int = 0,
    num_slots: int,
    top_k: int = 1,
) -> Remapped:
    """Sort rows by the slots of their experts, for a matmul over a window of slots.

    `ids`: int64, any shape, num_rows elements, the expert of each row; ids outside of the table
    (expert parallelism's sentinels) count as experts without a slot. `table`: int32 [num_experts]
    on the same device, the slot of each expert, negative if it has none. The window is `num_slots`
    slots from `first_slot` on. `core` is the backend's: one launch on a `_core.CudaDevice` with
    kernels, on the current stream and without waiting for it; torch's own operations elsewhere.

    Raises `ConfigError` for tensors of other types, and for more than 1023 slots.
    """
    import torch

    if ids.dtype != torch.int64 or table.dtype != torch.int32 or table.dim() != 1:
        raise ConfigError(
            "remap_ids takes int64 ids and an int32 table [num_experts], not "
            f"{ids.dtype} and {table.dtype} {list(table.shape)}"
        )
    if not 0 < num_slots <= MAX_SLOTS or first_slot < 0 or top_k < 1:
        raise ConfigError(
            f"no window of {num_slots} slots from {first_slot} with {top_k} rows a token: a window "
            f"has 1 to {MAX_SLOTS} slots; take several"
        )
    if ids.device != table.device:
        raise ConfigError(f"ids are on {ids.device} and the table is on {table.device}")
    ids, table = ids.reshape(-1).contiguous(), table.contiguous()
    if not hasattr(core, "launch"):
        return _remap_by_torch(ids, table, first_slot, num_slots, top_k)
    num_rows = ids.numel()
    device = ids.device
    rows = torch.empty(3, num_rows, dtype=torch.int64, device=device)
    slots = torch.empty(num_rows, dtype=torch.int32, device=device)
    offs = torch.empty(num_slots, dtype=torch.int32, device=device)
    arguments = [
        *(ids.data_ptr(), num_rows, table.data_ptr(), table.numel(), first_slot, num_slots, top_k),
        *(tensor.data_ptr() for tensor in (*rows, slots, offs)),
    ]
    grid = max(1, -(-num_rows // TILE))
    block = 256 if num_rows <= TILE else 1024
    stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
    core.launch("tiered_mem_remap_ids", (grid, 1, 1), (block, 1, 1), arguments, stream)
    return Remapped(rows[0], rows[1], rows[2], slots, offs)


def _remap_by_torch(
    ids: torch.Tensor, table: torch.Tensor, first_slot: int, num_slots: int, top_k: int
) -> Remapped:
    import torch

    known = (ids >= 0) & (ids < table.numel())
    slots = torch.full_like(ids, -1)
    if table.numel():
        found = table[ids.clamp(0, table.numel() - 1)].long()
        slots = torch.where(known & (found >= 0), found - first_slot, slots)
    bins = torch.where((slots >= 0) & (slots < num_slots), slots, num_slots)
    bins, order = torch.sort(bins, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.numel(), device=order.device)
    numbers = torch.arange(num_slots, device=bins.device)
    return Remapped(
        order=order,
        inverse=inverse,
        tokens=order // top_k,
        slots=torch.where(bins < num_slots, bins, -1).int(),
        offs=torch.searchsorted(bins, numbers, right=True).int(),
    )
