"""The core in C++ programs: the order of transfers, and stress under sanitizers."""

from __future__ import annotations

import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from driver_double import compile_double

ROOT = Path(__file__).parent.parent
# What the runtime doesn't need isn't built: each file costs seconds.
UNUSED = ("bindings", "block_reader")
SOURCES = [
    path for path in sorted((ROOT / "csrc").glob("*.cpp")) if not path.stem.startswith(UNUSED)
]
SANITIZERS = {"thread": "thread", "address": "address,undefined"}


def compile_program(target: Path, objects: list[Path], source: Path, flags: list[str]) -> None:
    run(["g++", *flags, str(source), *map(str, objects), "-o", str(target), "-pthread", "-ldl"])


def run(command: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, capture_output=True, text=True, env={**os.environ, **environment}, check=False
    )
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done


class Build:
    """The core's objects under one sanitizer."""

    def __init__(self, folder: Path, sanitizer: str) -> None:
        self.folder = folder
        self.flags = [
            *("-std=c++17", "-O1", "-g1", f"-fsanitize={SANITIZERS[sanitizer]}", "-pthread"),
            *(f"-I{ROOT / 'csrc'}", f"-I{ROOT / 'policies'}"),
        ]
        if sanitizer == "address":
            self.flags.append("-fno-sanitize-recover=undefined")
        self.objects = [folder / f"{source.stem}.o" for source in SOURCES]
        commands = [
            ["g++", *self.flags, "-c", str(source), "-o", str(target)]
            for source, target in zip(SOURCES, self.objects, strict=True)
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, commands))

    def cuda_double(self) -> Path:
        """The double of CUDA's driver, under the same sanitizer."""
        return compile_double(self.folder, tuple(self.flags))

    def program(self, name: str) -> Path:
        target = self.folder / name
        compile_program(target, self.objects, ROOT / "tests" / "cpp" / f"{name}.cpp", self.flags)
        return target


@pytest.fixture(scope="module", params=SANITIZERS)
def build(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Build:
    if shutil.which("g++") is None:
        pytest.skip("no g++: the core's C++ programs can't be built")
    folder = tmp_path_factory.mktemp(request.param)
    probe = folder / "probe.cpp"
    probe.write_text("int main() { return 0; }\n")
    flags = [f"-fsanitize={SANITIZERS[request.param]}"]
    try:
        compile_program(folder / "probe", [], probe, flags)
        run([str(folder / "probe")])
    except AssertionError as error:
        pytest.skip(f"no {request.param} sanitizer on this machine: {str(error)[-200:]}")
    return Build(folder, request.param)


@pytest.mark.slow
def test_transfers_keep_their_order(build: Build) -> None:
    assert run([str(build.program("transfers"))]).stdout == "ok\n"


@pytest.mark.slow
def test_a_device_on_a_queue(build: Build) -> None:
    assert run([str(build.program("device_queue"))]).stdout == "ok\n"


@pytest.mark.slow
def test_stress(build: Build, tmp_path: Path) -> None:
    # Threads with events, hints, failures and repairs; shrinks, throttles, cancels; close amid all.
    program = build.program("stress")
    done = run([str(program), str(tmp_path / "blocks"), "4"], TSAN_OPTIONS="halt_on_error=1")
    assert done.stdout.count(" events") == 4
    assert "WARNING" not in done.stderr


@pytest.mark.slow
def test_cuda_device_and_runtime_over_it(build: Build, tmp_path: Path) -> None:
    # On the double of the driver: every byte, an order between all accesses, nothing left behind.
    environment = {
        "TIERED_MEM_CUDA_DRIVER": str(build.cuda_double()),
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    device = str(build.program("device_cuda"))
    for method in ("engine", "batch", "kernel"):
        run([device, method, "0.5"], **environment)
    run([device, "batch", "0.5"], TIERED_MEM_CUDA_DOUBLE="guard=1", **environment)
    run([device, "failures", "0"], **environment)
    run([device, "races", "0"], **environment)
    stress = [str(build.program("stress_cuda")), str(tmp_path / "blocks")]
    run([*stress, "2", "engine"], **environment)
    run([*stress, "1", "kernel"], **environment)
