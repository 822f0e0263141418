"""How commands speak: results on stdout; progress, warnings and errors on stderr."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Table

_PIPE_WIDTH = 160  # columns, where no terminal says how many there are

JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, for programs to read.")]


def print_json(value: dict[str, Any]) -> None:
    """Print one JSON document on stdout."""
    print(json.dumps(value, indent=2))


def print_table(rows: Sequence[Sequence[str]], *, title: str = "") -> None:
    """Print rows of cells on stdout in columns."""
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for _ in range(max((len(row) for row in rows), default=0)):
        table.add_column(overflow="fold")
    for row in rows:
        table.add_row(*(escape(cell) for cell in row))
    console = Console(highlight=False, width=None if sys.stdout.isatty() else _PIPE_WIDTH)
    if title:
        console.print(f"[bold]{escape(title)}[/bold]")
    console.print(Padding(table, (0, 0, 0, 2), expand=False))


def error(message: str) -> None:
    """Print one line on stderr."""
    print(message, file=sys.stderr)


def show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """Print a warning as one line, without the place in the source it came from."""
    error(f"warning: {message}")


@contextmanager
def progress_bar(what: str, *, hidden: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show bytes, rate and time left on stderr. Yields a function of (bytes done, bytes in all)."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with _bar(what, columns, hidden) as report:
        yield report


@contextmanager
def count_bar(what: str, *, hidden: bool = False) -> Iterator[Callable[[int, int], None]]:
    """Show how many things are done and the time left on stderr. Yields as `progress_bar` does."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    with _bar(what, columns, hidden) as report:
        yield report


@contextmanager
def _bar(
    what: str, columns: Sequence[ProgressColumn], hidden: bool
) -> Iterator[Callable[[int, int], None]]:
    console = Console(stderr=True)
    disable = hidden or not console.is_terminal
    with Progress(*columns, console=console, disable=disable, transient=True) as bar:
        tasks: list[TaskID] = []

        def report(done: int, total: int) -> None:
            if not tasks:  # nothing is shown of what didn't happen, and resumed bytes have no rate
                tasks.append(bar.add_task(what, completed=done, total=total))
            bar.update(tasks[0], completed=done, total=total)

        yield report


@contextmanager
def status(what: str, *, hidden: bool = False) -> Iterator[None]:
    """Show on stderr that something is under way."""
    console = Console(stderr=True, quiet=hidden)
    with console.status(what):
        yield
