"""The extension's stub says what the extension has."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

# pybind11's classes have its metaclass, and a default __init__ where they can't be made.
ALLOWED = """
tiered_mem\\._core\\.(Event|Evictable|Extent|Future|File|FileWriter|Memory|Residency|Tiers)
tiered_mem\\._core\\.(Event|Evictable|Memory)\\.__init__
tiered_mem\\._core\\.(CudaDevice|Device|Mark|Pin|QueueDevice)
tiered_mem\\._core\\.(Device|Mark|Pin)\\.__init__
"""


def test_stub_fits_the_extension(tmp_path: Path) -> None:
    config, allowed = tmp_path / "mypy.ini", tmp_path / "allowed"
    # The stub alone: the modules it imports are other tests' business, and take a minute.
    config.write_text("[mypy]\nfollow_imports = skip\n")
    allowed.write_text(ALLOWED)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "mypy.stubtest", "tiered_mem._core"),
            *("--mypy-config-file", str(config), "--allowlist", str(allowed)),
        ],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent.parent,
    )
    assert done.returncode == 0, done.stdout + done.stderr
