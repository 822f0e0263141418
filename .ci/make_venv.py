"""Make a venv with torch: `make_venv.py VENV REQUIREMENT`.

A torch of a new enough version that this python can import already is used and never replaced; only
where there is none is REQUIREMENT installed. A venv that is there and has torch is kept as it is.
"""

from __future__ import annotations

import re
import site
import subprocess
import sys
import venv
from pathlib import Path

OLDEST_PYTHON, OLDEST_TORCH = (3, 11), (2, 11)


def main() -> None:
    if sys.version_info < OLDEST_PYTHON:
        sys.exit(f"python {sys.version.split()[0]} is too old: make PYTHON=python3.11, or newer")
    directory, requirement = Path(sys.argv[1]), sys.argv[2]
    python = directory / "bin" / "python"
    if not (python.exists() and torch_version(python)):
        shared = torch_version(Path(sys.executable))
        venv.create(directory, with_pip=True, symlinks=True, system_site_packages=bool(shared))
        if shared and not torch_version(python):
            share_packages(directory)
        if not torch_version(python):
            subprocess.run([python, "-m", "pip", "install", requirement], check=True)
    version = torch_version(python)
    if not version:
        sys.exit(f"{requirement} isn't torch {OLDEST_TORCH[0]}.{OLDEST_TORCH[1]} or newer")
    print(f"{directory} has torch {version}")
    (directory / "constraints.txt").write_text(f"torch=={version}\n")


def torch_version(python: Path) -> str | None:
    """Return the version of the torch that `python` has, None if it has none or too old a one."""
    command = [python, "-c", "import torch; print(torch.__version__)"]
    done = subprocess.run(command, capture_output=True, text=True)
    version = done.stdout.strip()
    numbers = re.match(r"(\d+)\.(\d+)", version)
    if done.returncode or not numbers or tuple(map(int, numbers.groups())) < OLDEST_TORCH:
        return None
    return version


def share_packages(directory: Path) -> None:
    """Let the venv see the packages of the venv this python is of.

    `system_site_packages` shows those of the python both were made from, and no others.
    """
    for packages in directory.glob("lib/python*/site-packages"):
        lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
        (packages / "shared.pth").write_text("".join(lines))


if __name__ == "__main__":
    main()
