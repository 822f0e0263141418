"""What each figure must reach, and the table of all bars in a folder of results.

    python benchmarks/gpu/bars.py FOLDER

This module alone knows the folder above, whose `common` the others take from here.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import common  # of the folder above, put on the path just now

__all__ = ["bar", "common", "print_bars"]


def bar(what: str, value: float, needed: float, *, at_most: bool = False) -> dict[str, Any]:
    """Return one figure beside what it must reach."""
    met = value <= needed if at_most else value >= needed
    sign = "<=" if at_most else ">="
    return {"what": what, "is": round(value, 4), "bar": f"{sign} {needed:g}", "met": met}


def print_bars(results: dict[str, Any]) -> None:
    """Print the `bars` of a results file, a line each; of a smoke run none is met or missed."""
    words = {True: "met", False: "MISSED", None: "no claim"}
    rows = [[b["what"], b["is"], b["bar"], words[b["met"]]] for b in results["bars"]]
    if rows:
        common.print_table(rows, ["bar", "is", "must be", ""])


def main() -> None:
    bars = []
    for path in sorted(Path(sys.argv[1]).glob("*.json")):
        bars += json.loads(path.read_text()).get("bars", [])
    print_bars({"bars": bars})


if __name__ == "__main__":
    main()
