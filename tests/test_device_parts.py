"""Around the backends: pinning in the background, calibrations that are kept, devices refused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from test_backends import SLOT, pretended

from tiered_mem.device import backend_for, calibration, pinning
from tiered_mem.errors import ConfigError, DeviceError, RuntimeClosedError
from tiered_mem.runtime import Runtime

# --- pinning ---


class Tiers:
    def __init__(self, answers: list[int | Exception]) -> None:
        self.answers = answers

    def pin_dram(self, nbytes: int) -> int:
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer


def test_dram_is_pinned_until_all_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning.Pinning, "_EVERY_SECONDS", 0.001)
    tiers = Tiers([5, 5, 0, 3, 0, RuntimeClosedError("closed")])
    thread = pinning.Pinning(tiers, "cuda:0")  # type: ignore[arg-type]
    thread.join(10)
    assert not thread.is_alive() and tiers.answers == []


def test_what_cant_be_pinned_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(pinning.Pinning, "_EVERY_SECONDS", 0.001)
    tiers = Tiers([5, DeviceError("ulimit -l says no")])
    pinning.Pinning(tiers, "cuda:0").join(10)  # type: ignore[arg-type]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "costs the CPU a copy" in caplog.text and "ulimit -l says no" in caplog.text


def test_pinning_ends_with_its_runtime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pinning.Pinning, "_EVERY_SECONDS", 0.001)
    thread = pinning.Pinning(Tiers([0]), "cuda:0")  # type: ignore[arg-type]
    thread.join(10)
    assert not thread.is_alive()


# --- calibration ---


def test_a_device_is_measured_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured: list[int] = []
    used: list[Any] = []

    def measure() -> dict[str, Any]:
        measured.append(len(measured))
        return {"number": measured[-1]}

    one, other = {"name": "A", "pci_bus_id": "1"}, {"name": "A", "pci_bus_id": "2"}
    for identity in (one, one, other, one):
        calibration.calibrate(identity, measure, used.append)
    assert [u["number"] for u in used] == [0, 0, 1, 0]

    def refuse(kept: dict[str, Any]) -> None:
        if kept["number"] < 2:
            raise ConfigError("of another version")

    calibration.calibrate(one, measure, refuse)
    assert measured == [0, 1, 2]
    for path in (tmp_path / "tiered-mem").iterdir():
        path.write_bytes(b"{")
    calibration.calibrate(one, measure, used.append)
    assert used[-1] == {"number": 3}


def test_a_cache_that_cant_be_written_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    used: list[Any] = []
    calibration.calibrate({"name": "A"}, lambda: {"x": 1}, used.append)
    assert used == [{"x": 1}] and "measured again in every process" in caplog.text


@pytest.mark.parametrize(("value", "wanted"), [("1", True), ("0", False), ("off", False)])
def test_measuring_can_be_refused(
    monkeypatch: pytest.MonkeyPatch, value: str, wanted: bool
) -> None:
    monkeypatch.setenv(calibration.VARIABLE, value)
    assert calibration.wanted() is wanted


# --- devices that can't be used ---


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cuda:-1", "", 7.5, None])
def test_what_is_no_device(name: Any) -> None:
    with pytest.raises(ConfigError, match="is no device"):
        backend_for(name)


def test_a_device_whose_memory_has_no_addresses() -> None:
    with pytest.raises(ConfigError, match="no addresses"):
        backend_for("mps")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("name", ["cuda", "cuda:0", "xpu", "xpu:3"])
def test_a_device_that_isnt_there(name: str) -> None:
    with pytest.raises(DeviceError, match="can't be used"):
        backend_for(name)
    with pytest.raises(DeviceError, match="can't be used"):
        Runtime(SLOT, device=name)


def test_a_backend_of_a_parent_process_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    backends = {"cuda:0": (os.getpid() + 1, pretended())}
    monkeypatch.setattr("tiered_mem.device._backends", backends)
    with pytest.raises(DeviceError, match=r"forked.*'spawn'"):
        backend_for("cuda:0")


def test_the_host_is_found_without_torch() -> None:
    code = (
        "import sys; from tiered_mem.device import backend_for;"
        "assert backend_for('cpu').name == 'cpu'; from tiered_mem import Runtime;"
        "Runtime(8192).close(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "False"
