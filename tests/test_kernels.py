"""The device's kernels: what they compute, by a host compiler's functions and on a GPU, and images.

Every case runs on the functions that a host compiler makes of csrc/kernels.cu. With a GPU it runs
there too, from the fatbin and from what CuPy compiles.
"""

from __future__ import annotations

import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from driver_double import run_python
from host_kernels import KERNELS, HostKernels
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tiered_mem import _core
from tiered_mem.device import kernels
from tiered_mem.errors import ConfigError, DeviceError

ROOT = Path(__file__).parent.parent
GUARD = 64  # bytes around what a kernel may write
# The launcher holds no state between examples.
relaxed = settings(
    deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


class Launcher:
    """Where kernels run: `launch` of the core, and memory that they reach, as torch tensors."""

    def __init__(self, core: Any, device: str) -> None:
        self.core, self.device = core, device

    def buffer(self, content: np.ndarray, offset: int, *, pinned: bool = False) -> torch.Tensor:
        """Return a guarded uint8 copy that begins `offset` bytes after a 16-byte boundary."""
        whole = torch.full((content.size + 2 * GUARD + 16,), 0xA5, dtype=torch.uint8)
        if self.device != "cpu":
            whole = whole.pin_memory() if pinned else whole.to(self.device)
        begin = GUARD + (offset - whole.data_ptr() - GUARD) % 16
        whole[begin : begin + content.size] = torch.from_numpy(content.copy())
        part = whole[begin : begin + content.size]
        part.whole, part.begin = whole, begin  # type: ignore[attr-defined]
        return part

    def tensor(self, values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.tensor(values, dtype=dtype, device=self.device)

    def run(self, name: str, grid: int, block: int, *arguments: int) -> None:
        self.core.launch(name, (grid, 1, 1), (block, 1, 1), list(arguments))
        if self.device != "cpu":
            torch.cuda.synchronize()


def check_guards(buffer: Any) -> None:
    whole = buffer.whole.cpu().numpy()
    end = buffer.begin + buffer.numel()
    assert (whole[: buffer.begin] == 0xA5).all() and (whole[end:] == 0xA5).all()


@pytest.fixture(scope="session")
def host_kernels(tmp_path_factory: pytest.TempPathFactory) -> HostKernels:
    if shutil.which("g++") is None:
        pytest.skip("no g++: the kernels can't be compiled for the host")
    return HostKernels(tmp_path_factory.mktemp("kernels"))


@pytest.fixture(
    scope="session",
    params=[
        "host",
        pytest.param("fatbin", marks=pytest.mark.gpu),
        pytest.param("cupy", marks=pytest.mark.gpu),
    ],
)
def launcher(request: pytest.FixtureRequest) -> Launcher:
    if request.param == "host":
        return Launcher(request.getfixturevalue("host_kernels"), "cpu")
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    torch.cuda.init()
    torch.cuda.synchronize()
    core = _core.CudaDevice(torch.cuda.current_device())
    capability = core.compute_capability
    if request.param == "fatbin":
        if not kernels.FATBIN.exists():
            pytest.skip("the package was built without nvcc")
        core.load_kernels(kernels.FATBIN.read_bytes())
    else:
        pytest.importorskip("cupy")
        core.load_kernels(kernels.compiled_image(capability))
    return Launcher(core, "cuda")


# --- blocks ---

extents = st.tuples(
    st.one_of(st.integers(0, 100), st.integers(4000, 9000), st.just(4096), st.just(100_000)),
    st.integers(0, 15),
    st.integers(0, 15),
)


@relaxed
@given(
    blocks=st.lists(extents, max_size=6),
    grid=st.integers(1, 3),
    warps=st.integers(1, 3),
    into=st.sampled_from(["device", "pinned"]),
)
def test_blocks_arrive_whole(
    launcher: Launcher, blocks: list[tuple[int, int, int]], grid: int, warps: int, into: str
) -> None:
    random = np.random.default_rng(len(blocks))
    content = [random.integers(0, 256, nbytes, dtype=np.uint8) for nbytes, _, _ in blocks]
    sources = [
        launcher.buffer(data, offset, pinned=into == "device")
        for data, (_, offset, _) in zip(content, blocks, strict=True)
    ]
    targets = [
        launcher.buffer(np.zeros_like(data), offset, pinned=into == "pinned")
        for data, (_, _, offset) in zip(content, blocks, strict=True)
    ]
    table = launcher.tensor(
        [
            (target.data_ptr(), source.data_ptr(), data.size)
            for target, source, data in zip(targets, sources, content, strict=True)
        ],
        torch.int64,
    )
    launcher.run("tiered_mem_copy_blocks", grid, 32 * warps, table.data_ptr(), len(blocks))
    for target, data in zip(targets, content, strict=True):
        assert (target.cpu().numpy() == data).all()
        check_guards(target)


def test_more_blocks_than_stand_in_shared_memory(launcher: Launcher) -> None:
    data = np.random.default_rng(0).integers(0, 256, 1200 * 48, dtype=np.uint8)
    source = launcher.buffer(data, 0, pinned=True)
    target = launcher.buffer(np.zeros_like(data), 0)
    turned = np.random.default_rng(1).permutation(1200)
    table = launcher.tensor(
        [
            (target.data_ptr() + 48 * int(to), source.data_ptr() + 48 * n, 48)
            for n, to in enumerate(turned)
        ],
        torch.int64,
    )
    launcher.run("tiered_mem_copy_blocks", 2, 64, table.data_ptr(), 1200)
    assert (target.cpu().numpy().reshape(1200, 48)[turned] == data.reshape(1200, 48)).all()
    check_guards(target)


# --- rows ---


@relaxed
@given(
    row_nbytes=st.one_of(
        st.integers(1, 300), st.sampled_from([16, 264, 512, 1412, 2560, 4096, 16384])
    ),
    gap=st.sampled_from([0, 0, 1, 8, 16, 40]),
    ids=st.lists(st.integers(-2, 11), max_size=40),
    offsets=st.tuples(st.integers(0, 15), st.integers(0, 15)),
    grid=st.integers(1, 2),
    warps=st.integers(1, 2),
    scatter=st.booleans(),
)
def test_rows(
    launcher: Launcher,
    row_nbytes: int,
    gap: int,
    ids: list[int],
    offsets: tuple[int, int],
    grid: int,
    warps: int,
    scatter: bool,
) -> None:
    if scatter:
        ids = [*dict.fromkeys(ids)]  # of two rows for one place either may stay
    random = np.random.default_rng(row_nbytes)
    stride = row_nbytes + gap
    table = random.integers(0, 256, (12, stride), dtype=np.uint8)
    rows = random.integers(0, 256, (len(ids), row_nbytes), dtype=np.uint8)
    on_table = launcher.buffer(table.reshape(-1), offsets[0], pinned=True)
    on_rows = launcher.buffer(rows.reshape(-1), offsets[1])
    on_ids = launcher.tensor(ids, torch.int64)
    both = (on_table, on_rows) if scatter else (on_rows, on_table)
    launcher.run(
        f"tiered_mem_{'scatter' if scatter else 'gather'}_rows",
        *(grid, 32 * warps, both[0].data_ptr(), both[1].data_ptr(), on_ids.data_ptr()),
        *(len(ids), row_nbytes, stride),
    )
    for n, row in enumerate(ids):
        if row < 0:
            continue
        if scatter:
            table[row, :row_nbytes] = rows[n]
        else:
            rows[n] = table[row, :row_nbytes]
    assert (on_table.cpu().numpy() == table.reshape(-1)).all()
    assert (on_rows.cpu().numpy() == rows.reshape(-1)).all()
    check_guards(on_table)
    check_guards(on_rows)


# --- ids ---


def remapped(
    ids: np.ndarray, table: np.ndarray, first_slot: int, num_slots: int, top_k: int
) -> dict[str, np.ndarray]:
    """The definition."""
    slots = np.array(
        [
            table[row] - first_slot if 0 <= row < len(table) and table[row] >= 0 else -1
            for row in ids
        ],
        dtype=np.int64,
    )
    bins = np.where((slots >= 0) & (slots < num_slots), slots, num_slots)
    order = np.argsort(bins, kind="stable")
    inverse = np.empty_like(order)
    inverse[order] = np.arange(len(ids))
    return {
        "order": order,
        "inverse": inverse,
        "tokens": order // top_k,
        "slots": np.where(bins[order] < num_slots, bins[order], -1),
        "offs": np.cumsum(np.bincount(bins, minlength=num_slots + 1)[:num_slots]),
    }


def check_remap(
    launcher: Launcher,
    ids: np.ndarray,
    table: np.ndarray,
    first_slot: int,
    num_slots: int,
    top_k: int,
) -> None:
    expected = remapped(ids, table, first_slot, num_slots, top_k)
    window = {"first_slot": first_slot, "num_slots": num_slots, "top_k": top_k}
    on_ids = launcher.tensor(ids.tolist(), torch.int64)
    on_table = launcher.tensor(table.tolist(), torch.int32)
    for core in (launcher.core, SimpleNamespace()):  # the kernel, and torch's own operations
        found = kernels.remap_ids(core, on_ids, on_table, **window)
        for name, value in expected.items():
            assert getattr(found, name).cpu().numpy().tolist() == value.tolist(), name
    assert (found.order.dtype, found.slots.dtype) == (torch.int64, torch.int32)
    assert (found.inverse.dtype, found.offs.dtype) == (torch.int64, torch.int32)


@relaxed
@given(data=st.data())
def test_ids(launcher: Launcher, data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(0, 20))
    slots = st.integers(-1, 30)
    table = data.draw(st.lists(slots, min_size=num_experts, max_size=num_experts))
    # Sentinels on both sides, and ids that come again and again.
    ids = data.draw(st.lists(st.integers(-2, num_experts + 2), max_size=70))
    check_remap(
        launcher,
        np.array(ids, dtype=np.int64),
        np.array(table, dtype=np.int32),
        data.draw(st.integers(0, 10)),
        data.draw(st.integers(1, 20)),
        data.draw(st.integers(1, 8)),
    )


@pytest.mark.parametrize("num_rows", [1023, 1024, 1025, 4097])
@pytest.mark.parametrize(("num_experts", "num_slots"), [(8, 3), (1023, 1023), (1200, 700)])
def test_ids_of_many_rows(
    launcher: Launcher, num_rows: int, num_experts: int, num_slots: int
) -> None:
    random = np.random.default_rng(num_rows)
    table = random.permutation(num_experts).astype(np.int32)
    table[random.random(num_experts) < 0.2] = -1
    ids = random.integers(-1, num_experts + 1, num_rows)
    check_remap(launcher, ids, table, 0, num_slots, 8)


def test_huge_ids_have_no_slot(launcher: Launcher) -> None:
    ids = np.array([2**62, 1, -(2**62), 2**32, 2**32 + 1], dtype=np.int64)
    check_remap(launcher, ids, np.array([0, 1], dtype=np.int32), 0, 2, 1)


def test_remap_refuses_what_it_does_not_take() -> None:
    ids, table = torch.tensor([0]), torch.tensor([0], dtype=torch.int32)
    with pytest.raises(ConfigError, match="int64 ids"):
        kernels.remap_ids(None, ids.int(), table, num_slots=1)
    with pytest.raises(ConfigError, match="1 to 1023"):
        kernels.remap_ids(None, ids, table, num_slots=1024)
    with pytest.raises(ConfigError, match="1 to 1023"):
        kernels.remap_ids(None, ids, table, num_slots=0)


THROUGH_THE_DRIVER = """
import mmap, os
import numpy as np
from tiered_mem import _core
from tiered_mem.device import kernels

os.environ["TIERED_MEM_KERNELS"] = {image!r}
device = _core.CudaDevice(0)
kernels.load_kernels(device)
memory = np.frombuffer(mmap.mmap(-1, 1 << 20), np.uint8)
pin = device.pin(memory.ctypes.data, memory.nbytes)
ids, order, inverse, tokens = memory[:65536].view(np.int64).reshape(4, 2048)
table, slots, offs = memory[65536 : 65536 + 24576].view(np.int32).reshape(3, 2048)
ids[:] = np.random.default_rng(0).integers(-1, 9, 2048)
table[:8] = [3, -1, 0, 7, 2, 1, 9, 4]
at = [array.ctypes.data for array in (ids, table, order, inverse, tokens, slots, offs)]
arguments = [at[0], 2048, at[1], 8, 0, 4, 2, *at[2:]]
device.launch("tiered_mem_remap_ids", (2, 1, 1), (1024, 1, 1), arguments)
device.wait(device.mark_compute())
bins = np.array([table[e] if 0 <= e < 8 and 0 <= table[e] < 4 else 4 for e in ids])
assert (order == np.argsort(bins, kind="stable")).all()
assert (order[inverse] == np.arange(2048)).all() and (tokens == order // 2).all()
assert (slots == np.where(bins[order] < 4, bins[order], -1)).all()
assert (offs[:4] == np.cumsum(np.bincount(bins, minlength=5)[:4])).all()
print("same")
"""


def test_kernels_run_through_the_driver(cuda_double: Path) -> None:
    # The double takes any image, and runs the host's functions.
    code = THROUGH_THE_DRIVER.replace("{image!r}", repr(str(KERNELS)))
    assert run_python(cuda_double, code) == "same\n"


# --- images ---


def fatbin(*parts: tuple[int, int]) -> bytes:
    """A fatbin of empty entries (kind, architecture)."""
    body = b"".join(
        struct.pack("<HHIQIIHHI", kind, 0x101, 64, 8, 0, 0, 0, 0, arch) + bytes(64 - 32 + 8)
        for kind, arch in parts
    )
    return struct.pack("<IHHQ", 0xBA55ED50, 1, 16, len(body)) + body


@pytest.mark.parametrize(
    ("parts", "capability", "serves"),
    [
        ([(2, 80)], (8, 0), True),
        ([(2, 80)], (8, 9), True),
        ([(2, 86)], (8, 0), False),
        ([(2, 90)], (10, 0), False),
        ([(2, 90), (1, 75)], (10, 0), True),
        ([(2, 75), (1, 75)], (7, 0), False),
        ([(2, 100)], (10, 3), True),
        ([], (9, 0), False),
    ],
)
def test_which_devices_an_image_serves(
    parts: list[tuple[int, int]], capability: tuple[int, int], serves: bool
) -> None:
    assert kernels.entries(fatbin(*parts)) == parts
    assert kernels.serves(fatbin(*parts), capability) is serves


def test_damaged_images_are_named() -> None:
    with pytest.raises(DeviceError, match="cut short"):
        kernels.entries(fatbin((2, 90))[:40])
    with pytest.raises(DeviceError, match="no fatbin"):
        kernels.entries(bytes(64))


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A fatbin as setup.py builds it; the one that is there unless the source is newer."""
    if kernels.FATBIN.exists() and kernels.FATBIN.stat().st_mtime >= KERNELS.stat().st_mtime:
        yield kernels.FATBIN
        return
    if shutil.which("nvcc") is None:
        pytest.skip("no nvcc: no fatbin can be built")
    path = tmp_path_factory.mktemp("image") / "kernels.fatbin"
    code = (
        "import sys, setuptools; from pathlib import Path; setuptools.setup = lambda **_: None;"
        "import setup; setup.build_kernels(Path(sys.argv[1]))"
    )
    subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=True)
    yield path


def test_the_fatbin_serves_every_device_from_turing_on(built: Path) -> None:
    image = built.read_bytes()
    found = kernels.entries(image)
    # What nvcc 12.0 knows; newer ones know Blackwell too.
    assert {(2, arch) for arch in (75, 80, 86, 89, 90)} <= set(found)
    assert (1, 75) in found
    for capability in [(7, 5), (8, 0), (8, 6), (8, 7), (8, 9), (9, 0), (10, 0), (11, 0), (12, 1)]:
        assert kernels.serves(image, capability), capability
    assert not kernels.serves(image, (7, 0))
    assert len(image) < 300_000


def test_kernel_image(built: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TIERED_MEM_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "FATBIN", built)
    assert kernels.kernel_image((9, 0)) == built.read_bytes()
    monkeypatch.setenv("TIERED_MEM_KERNELS", "fatbin")
    with pytest.raises(DeviceError, match="no code for sm_70"):
        kernels.kernel_image((7, 0))
    monkeypatch.setattr(kernels, "FATBIN", tmp_path / "none")
    with pytest.raises(DeviceError, match="built without nvcc"):
        kernels.kernel_image((9, 0))
    (tmp_path / "own").write_bytes(b"own")
    monkeypatch.setenv("TIERED_MEM_KERNELS", str(tmp_path / "own"))
    assert kernels.kernel_image((9, 0)) == b"own"
    monkeypatch.setenv("TIERED_MEM_KERNELS", "fatbim")
    with pytest.raises(ConfigError, match="fatbim is neither"):
        kernels.kernel_image((9, 0))


def test_without_nvcc_and_cupy_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TIERED_MEM_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "FATBIN", tmp_path / "none")
    monkeypatch.setitem(sys.modules, "cupy", None)
    monkeypatch.setitem(sys.modules, "cupy.cuda", None)
    kernels.compiled_image.cache_clear()
    with pytest.raises(DeviceError, match=r"built without nvcc.*pip install 'cupy-cuda13x\[ctk\]'"):
        kernels.kernel_image((9, 0))


def test_cupy_compiles_for_any_device(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("cupy", reason="CuPy isn't installed")
    monkeypatch.setenv("TIERED_MEM_KERNELS", "cupy")
    kernels.compiled_image.cache_clear()
    for capability in ((7, 5), (9, 0), (12, 0)):
        image = kernels.kernel_image(capability)
        assert image.startswith(b"\x7fELF") and b"tiered_mem_remap_ids" in image
    unknown = kernels.kernel_image((12, 9))
    assert b".target sm_121" in unknown or b".target sm_120" in unknown


class Refusing:
    """A device whose driver is older than the fatbin."""

    compute_capability = (9, 0)

    def __init__(self) -> None:
        self.images: list[bytes] = []

    def load_kernels(self, image: bytes) -> None:
        self.images.append(image)
        if len(self.images) == 1:
            raise DeviceError("CUDA_ERROR_UNSUPPORTED_PTX_VERSION")


def test_a_fatbin_that_the_driver_refuses_is_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.delenv("TIERED_MEM_KERNELS", raising=False)
    monkeypatch.setattr(kernels, "kernel_image", lambda capability: b"fatbin")
    monkeypatch.setattr(kernels, "compiled_image", lambda capability: b"compiled")
    device: Any = Refusing()
    kernels.load_kernels(device)
    assert device.images == [b"fatbin", b"compiled"]
    assert "by CuPy" in caplog.text
