"""What the wheel holds, and that dependencies point one way."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import tiered_mem
from tiered_mem import _core

ROOT = Path(__file__).parents[1]
NOT_SOURCE = (".*", "build", "dist", "*.egg-info", "*.so", "__pycache__", "models", "results")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, with the extension that is built already."""
    source = tmp_path_factory.mktemp("wheel") / "source"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(*NOT_SOURCE))
    # A compiler would take a minute; one that is newer than its sources counts as up to date.
    built = source / "build" / "tiered_mem" / Path(_core.__file__).name
    built.parent.mkdir(parents=True)
    shutil.copy(_core.__file__, built)
    command = ["-q", "build", "--build-lib", "build", "bdist_wheel", "--dist-dir", "dist"]
    subprocess.run(
        [sys.executable, "setup.py", *command], cwd=source, check=True, capture_output=True
    )
    (path,) = (source / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_what_is_imported(wheel: zipfile.ZipFile) -> None:
    names = wheel.namelist()
    sources = {str(p.relative_to(ROOT)) for p in (ROOT / "tiered_mem").rglob("*.py")}
    sources |= {f"tiered_mem/{p.relative_to(ROOT)}" for p in (ROOT / "policies").rglob("*.py")}
    assert sources <= set(names)
    assert {"tiered_mem/py.typed", "tiered_mem/_core.pyi"} <= set(names)
    assert f"tiered_mem/{Path(_core.__file__).name}" in names
    assert {"tiered_mem/policies/eviction/lru.h", "tiered_mem/kernels.cu"} <= set(names)
    assert ("tiered_mem/kernels.fatbin" in names) == (shutil.which("nvcc") is not None)
    assert {f"tiered_mem/report/page.{end}" for end in ("html", "css", "js")} <= set(names)
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_wheel_has_one_top_level_package(wheel: zipfile.ZipFile) -> None:
    tops = {name.split("/")[0] for name in wheel.namelist()}
    assert tops == {"tiered_mem", f"tiered_mem-{tiered_mem.__version__}.dist-info"}


def test_unpacked_wheel_works(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    wheel.extractall(tmp_path)
    code = (
        "import tiered_mem, tiered_mem._core; from tiered_mem.policies import prefetch;"
        "print(tiered_mem.__file__, prefetch.__file__, tiered_mem._core.__file__);"
        "prefetch.make_predictor('next-gate'); import tiered_mem.cli as c; c.main(['policies'])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True
    )
    first, *policies = done.stdout.splitlines()
    assert all(Path(path).is_relative_to(tmp_path) for path in first.split())
    assert any("lru" in line for line in policies)


def test_importing_the_package_loads_no_torch() -> None:
    code = (
        "import sys, tiered_mem, tiered_mem.cli, tiered_mem.policies.prefetch;"
        "print(*{'torch', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == ""


# --- arrows: which file may know of which ---

ON_TOP = {"__init__", "__main__"}  # these import what is above them only when called
CORE = [path for path in (ROOT / "tiered_mem").glob("*.py") if path.stem not in ON_TOP]
ABOVE_CORE = {"tiered_mem.hf", "tiered_mem.cli", "tiered_mem.doctor", "tiered_mem.report"}


def imports(path: Path) -> set[str]:
    """Return the absolute names a file imports, in functions too, beside the standard library."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in names if name.split(".")[0] not in sys.stdlib_module_names}


def includes(path: Path) -> set[str]:
    return set(re.findall(r'#include [<"]([^>"]+)[>"]', path.read_text()))


def is_in(name: str, packages: set[str]) -> bool:
    return any(name == package or name.startswith(package + ".") for package in packages)


def test_policies_know_only_keys_and_errors() -> None:
    # Plug-ins by name alone: it is how policies of other packages are found.
    allowed = {"numpy", "tiered_mem.errors", "tiered_mem.keys", "tiered_mem.plugins"}
    for path in (ROOT / "policies").rglob("*.py"):
        assert {name for name in imports(path) if not is_in(name, allowed)} == set(), path
    types = {"error.h", "key.h", "policy.h"}
    types |= {"block_lists.h", "flat_map.h", "position_set.h", "ranking.h", "recency_list.h"}
    types |= {"frequency_sketch.h"}
    headers = {
        str(path.relative_to(ROOT / "policies")) for path in (ROOT / "policies").rglob("*.h")
    }
    for header in headers:
        names = {name for name in includes(ROOT / "policies" / header) if name.endswith(".h")}
        assert names <= types | headers, header


def test_the_runtime_knows_neither_torch_nor_what_is_above_it() -> None:
    allowed = {"lmdb", "numpy", "psutil", "zstandard", "tiered_mem"}
    for path in CORE:
        names = imports(path)
        assert {name for name in names if is_in(name, ABOVE_CORE)} == set(), path
        assert {name.split(".")[0] for name in names} <= allowed, path


def test_the_adapter_knows_no_command() -> None:
    for path in (ROOT / "tiered_mem" / "hf").glob("*.py"):
        above = ABOVE_CORE - {"tiered_mem.hf"}
        assert {name for name in imports(path) if is_in(name, above)} == set(), path


def test_csrc_sees_python_only_in_bindings() -> None:
    foreign = re.compile(r"pybind11|Python\.h|torch|ATen|cuda", re.IGNORECASE)
    own = {p.name for p in (ROOT / "csrc").glob("*.h")}  # cuda_driver.h among them: no toolkit's
    found = {
        p.name
        for p in (ROOT / "csrc").glob("*.*")
        if any(foreign.search(name) for name in includes(p) if name not in own)
    }
    assert found == {"bindings.h"}
    found = {p.name for p in (ROOT / "csrc").glob("*.*") if "bindings.h" in includes(p)}
    assert all(name.startswith("bindings") for name in found)
