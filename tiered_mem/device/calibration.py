"""What was measured of a device, kept from process to process.

Which of the copy engine, batched copies and the gather kernel is fastest at which size differs from
device to device, so it is measured, once, and kept in the user's cache directory.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import tiered_mem
from tiered_mem.atomic_file import new_file
from tiered_mem.errors import ConfigError

logger = logging.getLogger(__name__)

#: Set to 0 to measure nothing and use what is known of no device in particular.
VARIABLE = "TIERED_MEM_CALIBRATE"

Calibration = dict[str, Any]


def wanted() -> bool:
    """Whether the environment allows measuring."""
    return os.environ.get(VARIABLE, "1") not in {"0", "no", "off", "false"}


def calibrate(
    identity: dict[str, Any],
    measure: Callable[[], Calibration],
    use: Callable[[Calibration], None],
) -> Calibration:
    """Use what is kept of the device with this identity, or else measure it, use and keep that.

    Returns what is used.
    `use` raises `ConfigError` for a calibration that it can't use, of another version perhaps.
    """
    path = _path(identity)
    kept = _read(path, identity)
    if kept is not None:
        try:
            use(kept)
            return kept
        except ConfigError as error:
            logger.info("%s isn't used (%s): the device is measured again", path, error)
    measured = measure()
    use(measured)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with new_file(path, overwrite=True) as file:
            file.write(json.dumps({"identity": identity, "calibration": measured}).encode())
    except OSError as error:
        logger.warning(
            "%s can't be written (%s): this device is measured again in every process", path, error
        )
    return measured


def _path(identity: dict[str, Any]) -> Path:
    name = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    home = os.environ.get("XDG_CACHE_HOME")
    # The specification has relative paths ignored.
    folder = Path(home) if home and Path(home).is_absolute() else Path.home() / ".cache"
    return folder / "tiered-mem" / f"calibration-{tiered_mem.__version__}-{name}.json"


def _read(path: Path, identity: dict[str, Any]) -> Calibration | None:
    try:
        kept = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        logger.warning("%s can't be read (%s): the device is measured again", path, error)
        return None
    if not isinstance(kept, dict) or kept.get("identity") != identity:
        return None
    calibration = kept.get("calibration")
    return calibration if isinstance(calibration, dict) else None
