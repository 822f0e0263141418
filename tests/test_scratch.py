"""Scratch directories go with their process, at the latest when the next one starts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiered_mem.errors import ConfigError
from tiered_mem.scratch import make_scratch, store_in
from tiered_mem.store import Store

KILLED = """
import os, signal, sys
from tiered_mem.scratch import make_scratch, store_in
from tiered_mem.store import Store
scratch = make_scratch(sys.argv[1])
store = Store.open(store_in(scratch), mode="w", durable=False)
print(scratch, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def age(scratch: Path) -> None:
    os.utime(scratch, (0, 0))


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    left = Path(done.stdout.strip())
    assert left.is_dir(), done.stderr
    assert make_scratch(tmp_path).is_dir()
    assert left.is_dir()  # it is too new to tell from one that isn't locked yet
    age(left)
    make_scratch(tmp_path)
    assert not left.exists()


def test_what_is_in_use_stays(tmp_path: Path) -> None:
    used = make_scratch(tmp_path)
    (tmp_path / "tiered-mem-kv-notes").write_text("somebody's")
    with Store.open(store_in(used), mode="w", durable=False):
        age(used)
        assert make_scratch(tmp_path) != used
        assert used.is_dir()
    assert (tmp_path / "tiered-mem-kv-notes").exists()


def test_a_file_is_no_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a file"):
        make_scratch(__file__)
