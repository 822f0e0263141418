"""Whole models over the CUDA backend and the double of its driver: bytes, order and failures."""

from __future__ import annotations

from pathlib import Path

import pytest
from driver_double import ROOT, run_python

MODEL = ROOT / "benchmarks" / "models" / "tiny-moe"
PREAMBLE = f"""
import gc, os, warnings
warnings.simplefilter("ignore")
import torch
from transformers import AutoModelForCausalLM
import tiered_mem
from tiered_mem.errors import BudgetError, DeviceError, RuntimeClosedError, TransferError
from tiered_mem.runtime import Runtime
from double_backend import DoubleBackend
MODEL = {str(MODEL)!r}
EXPERTS = 14155776  # bytes

def load(hbm, dram=0.0, **options):
    backend = DoubleBackend()
    runtime = Runtime(int(EXPERTS * hbm), int(EXPERTS * dram), device=backend, **options)
    model = tiered_mem.from_pretrained(MODEL, runtime=runtime, dtype=torch.float32)
    return model, runtime, backend.double

def tokens(model, n=24):
    ids = torch.randint(0, 500, (1, 30), generator=torch.Generator().manual_seed(0))
    return model.generate(ids, max_new_tokens=n, do_sample=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("hbm", "dram"),
    [(1.3, 0.0), (0.4, 0.0), (0.3, 0.3), (0.25, 1.2)],
    ids=["all-resident", "nvme", "dram-and-nvme", "all-in-dram"],
)
def test_tokens_are_those_of_the_unmodified_model(
    cuda_double: Path, hbm: float, dram: float
) -> None:
    code = f"""
right = tokens(AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32))
model, runtime, double = load({hbm}, {dram})
assert torch.equal(tokens(model), right)
stats = model.tiered_mem.stats()
if {dram} > 0:
    while runtime._tiers.pin_dram(1 << 20):
        pass
    assert double.count("live_registrations") > 0
runtime.resize(hbm=int(EXPERTS * {hbm} * 0.8))
assert torch.equal(tokens(model), right)
assert double.count("races") == 0 and double.count("freed_in_use") == 0
assert double.count("pageable_copies") == 0
assert (stats.num_evictions > 0) == ({hbm} < 1), stats
assert (stats.num_dram_hits > 0) == ({dram} > 0), stats
model.tiered_mem.close()
runtime.close()
del model, runtime
gc.collect()
left = double.live()
assert not {{"allocations", "registrations"}} & set(left), left
"""
    run_python(cuda_double, PREAMBLE + code, "max_delay_us=200")


def test_a_copy_that_is_refused_fails_its_event_alone(cuda_double: Path) -> None:
    # DRAM is pinned first: then copies in are told by the thread that asks for them.
    code = """
model, runtime, double = load(0.3, 1.2)
right = tokens(model)
while runtime._tiers.pin_dram(1 << 20):
    pass
double.fail("cuMemcpyBatchAsync", 3, 1)
try:
    tokens(model)
except TransferError as error:
    assert "cuMemcpyBatchAsync" in str(error) and "INVALID_VALUE" in str(error), error
else:
    raise AssertionError("nobody heard of it")
assert torch.equal(tokens(model), right)
"""
    run_python(cuda_double, PREAMBLE + code, "max_delay_us=50")


def test_a_device_that_fails_is_named_and_nothing_hangs(cuda_double: Path) -> None:
    code = """
model, runtime, double = load(0.3, 0.3)
tokens(model)
double.set("fail_copy", 4)
for _ in range(2):
    try:
        tokens(model)
    except TransferError as error:
        assert "CUDA" in str(error), error
    else:
        raise AssertionError("nobody heard of it")
model.tiered_mem.close()
runtime.close()
print("closed", flush=True)
os._exit(0)
"""
    assert "closed" in run_python(cuda_double, PREAMBLE + code, "max_delay_us=50")


def test_too_little_device_memory_is_said_at_the_start(cuda_double: Path) -> None:
    code = """
try:
    load(0.5)
except BudgetError as error:
    assert "cuda:0" in str(error), error
else:
    raise AssertionError("so much can't be had")
model, runtime, double = load(0.2)
tokens(model, 4)
"""
    run_python(cuda_double, PREAMBLE + code, f"max_delay_us=0,memory={4 << 20}")


def test_a_forked_child_is_told_to_spawn(cuda_double: Path) -> None:
    code = """
model, runtime, double = load(0.3)
right = tokens(model, 4)
child = os.fork()
if child == 0:
    try:
        tokens(model, 4)
    except RuntimeClosedError as error:
        os._exit(7 if "child" in str(error) else 8)
    finally:
        os._exit(9)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
assert torch.equal(tokens(model, 4), right)
"""
    run_python(cuda_double, PREAMBLE + code, "max_delay_us=0")


def test_two_models_share_a_device(cuda_double: Path) -> None:
    code = """
first, one, double = load(0.3)
second, other, _ = load(0.25)
third = tiered_mem.from_pretrained(MODEL, runtime=one, dtype=torch.float32)
right = tokens(first, 8)
assert torch.equal(tokens(second, 8), right) and torch.equal(tokens(third, 8), right)
first.tiered_mem.close()
assert torch.equal(tokens(third, 8), right) and torch.equal(tokens(second, 8), right)
"""
    run_python(cuda_double, PREAMBLE + code, "max_delay_us=0")


@pytest.mark.parametrize("hbm", [1.3, 0.4], ids=["all-resident", "nvme"])
def test_ids_are_remapped_by_the_kernel(cuda_double: Path, tmp_path: Path, hbm: float) -> None:
    # As where torch has a grouped matmul: here the CPU's, and the kernel compiled for the CPU.
    code = f"""
from pathlib import Path
from host_kernels import HostKernels
import tiered_mem.hf.device, tiered_mem.hf.pooled
launched = []
class Counting(HostKernels):
    def launch(self, kernel, *arguments):
        launched.append(kernel)
        super().launch(kernel, *arguments)
kernels = Counting(Path({str(tmp_path)!r}))
tiered_mem.hf.device.Home.kernels = property(lambda home: kernels)
tiered_mem.hf.device.may_have_kernel = lambda *_: True
tiered_mem.hf.pooled._FEW_ROWS = 0
ids = torch.randint(0, 500, (2, 200), generator=torch.Generator().manual_seed(0))
with torch.no_grad():
    right = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16)(ids).logits
    runtime = Runtime(int(EXPERTS * {hbm}), 0, device=DoubleBackend())
    model = tiered_mem.from_pretrained(
        MODEL, runtime=runtime, dtype=torch.bfloat16, prefetch="none"
    )
    for _ in range(2):
        launched.clear()
        assert torch.equal(model(ids).logits, right)
        assert set(launched) == {{"tiered_mem_remap_ids"}}
"""
    run_python(cuda_double, PREAMBLE + code, "max_delay_us=0")
