"""What a comparison leaves behind: results.json, runs.csv, plots and a page that opens offline.

A report is made of the results alone (see `tiered_mem.compare`): nothing is run here.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tiered_mem.report.directory import PAGE, PLOTS, RESULTS, TABLE, new_directory
from tiered_mem.report.page import render_page
from tiered_mem.report.plots import draw_plots

__all__ = ["new_directory", "write_report"]


def write_report(directory: Path, results: dict[str, Any]) -> None:
    """Write all files of a report into `directory`, which is there and empty."""
    plots = draw_plots(results)
    (directory / PLOTS).mkdir()
    for plot in plots:
        (directory / PLOTS / plot.file_name).write_bytes(plot.light)
    (directory / RESULTS).write_text(json.dumps(results, indent=1, allow_nan=False) + "\n")
    _write_csv(directory / TABLE, results["runs"])
    (directory / PAGE).write_text(render_page(results, plots), encoding="utf-8")


def _write_csv(path: Path, runs: list[dict[str, Any]]) -> None:
    rows = [dict(_flatten(run)) for run in runs]
    columns = dict.fromkeys(name for row in rows for name in row)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def _flatten(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (name, value): what is in {"decode": {"num_hits": 3}} is called decode.num_hits."""
    for name, value in record.items():
        if isinstance(value, dict):
            yield from _flatten(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value
