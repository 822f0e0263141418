"""Reports: what is written for given results, and which directories may be replaced."""

from __future__ import annotations

import csv
import json
import re
import shutil
import struct
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tiered_mem.compare import FORMAT
from tiered_mem.errors import ConfigError
from tiered_mem.report import new_directory, write_report
from tiered_mem.report.lines import MAX_LINES, choose_lines, group_lines
from tiered_mem.report.page import format_rate, format_seconds

TOTAL = 1 << 30
HOSTILE = "a<script>alert(1)</script>\"'&$x^{$\u4e2d"


def make_run(trace: str, eviction: str, prefetch: str, percent: int, misses: int) -> dict[str, Any]:
    return {
        "trace": trace,
        "eviction": eviction,
        "prefetch": prefetch,
        "hbm": f"{percent}%",
        "hbm_nbytes": TOTAL * percent // 100,
        "dram_nbytes": 0,
        "num_accesses": 1000,
        "num_hits": 1000 - misses,
        "num_misses": misses,
        "num_tokens": 10,
        "num_evictions": misses,
        "byte_miss_ratio": misses / 1000,
        "nbytes_moved": {"nvme_to_hbm": misses << 20, "dram_to_hbm": 0, "hbm_to_dram": 0},
        "stall_seconds": misses / 100,
        "wasted_prefetch_nbytes": 0,
        "decode": {"num_hits": 7},
        "bounds": {
            "num_misses_forced": 50,
            "num_misses_bypass": 40,
            "stall_seconds_demand": 0.5,
            "stall_seconds_lower": 0.25,
        },
    }


def make_results(
    traces: Sequence[str] = ("qwen",),
    evictions: Sequence[str] = ("lru", "arc"),
    prefetch: Sequence[str] = ("none", "oracle(0.8,2)"),
    percents: Sequence[int] = (10, 50),
) -> dict[str, Any]:
    runs = [
        make_run(trace, e, p, percent, 900 - 7 * percent - 20 * i - 200 * j)
        for trace in traces
        for percent in percents
        for j, p in enumerate(prefetch)
        for i, e in enumerate(evictions)
    ]
    info = {
        "model": "a model",
        "form": "events",
        "num_tokens": 10,
        "num_sequences": 1,
        "num_events": 480,
        "num_accesses": 1000,
        "num_layers": 48,
        "num_experts": 128,
        "top_k": 8,
        "total_nbytes": TOTAL,
        "cycle_nbytes": 1 << 28,
        "ceiling": 0.9,
        "previous_token_recall": None,
    }
    link = {"bytes_per_second": 3e9, "latency": 8e-5}
    return {
        "command": "tiered-mem compare qwen.npz --prefetch 'oracle(0.8,2)' -o <here>",
        "format": FORMAT,
        "date": "2026-11-23T19:00:00+00:00",
        "version": "0.1.0",
        "machine": {"processor": "one", "cores": 2},
        "links": {"nvme": link, "hbm": link, "compute": {"bytes_per_second": 3e11}},
        "traces": [{"name": t, "path": f"{t}.npz", "nbytes": TOTAL, "info": info} for t in traces],
        "runs": runs,
    }


class Page(HTMLParser):
    """The page's tables as text, its tags, and what it refers to."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.text = ""
        self._cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
            self._cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self._cell = False

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._cell:
            self.tables[-1][-1][-1] += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("reports") / "hostile"
    directory.mkdir()
    write_report(directory, make_results(("qwen", HOSTILE)))
    return directory


@pytest.fixture(scope="module")
def page(report: Path) -> Page:
    return Page((report / "index.html").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def lone(tmp_path_factory: pytest.TempPathFactory) -> Page:
    """The page of a single run, with a DRAM tier, that needn't stall."""
    directory = tmp_path_factory.mktemp("lone")
    results = make_results(evictions=["lru"], prefetch=["none"], percents=[25])
    for run in results["runs"]:
        run["dram_nbytes"] = 1 << 20
        run["bounds"]["stall_seconds_lower"] = 0.0
    write_report(directory, results)
    return Page((directory / "index.html").read_text(encoding="utf-8"))


# --- files ---


def test_results_are_written_as_they_are(report: Path) -> None:
    written = json.loads((report / "results.json").read_text())
    assert written == make_results(("qwen", HOSTILE))


def test_csv_is_flat_with_a_row_a_run(report: Path) -> None:
    with (report / "runs.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    runs = make_results(("qwen", HOSTILE))["runs"]
    assert [row["trace"] for row in rows] == [run["trace"] for run in runs]
    assert [int(row["nbytes_moved.nvme_to_hbm"]) for row in rows] == [
        run["nbytes_moved"]["nvme_to_hbm"] for run in runs
    ]
    assert {row["bounds.num_misses_bypass"] for row in rows} == {"40"}
    assert {row["decode.num_hits"] for row in rows} == {"7"}


def test_two_plots_a_trace(report: Path) -> None:
    plots = sorted((report / "plots").iterdir())
    names = [path.name for path in plots]
    assert names[:2] == ["1-qwen-miss-ratio.png", "1-qwen-stall.png"]
    assert [re.fullmatch(r"2-[\w.-]+\.png", name) is not None for name in names[2:]] == [True, True]
    for path in plots:
        head = path.read_bytes()[:24]
        assert head[:8] == b"\x89PNG\r\n\x1a\n"
        assert min(struct.unpack(">II", head[16:24])) > 500


# --- page ---


def test_page_needs_no_network(page: Page) -> None:
    sources = [a["src"] or "" for a in page.all("img")] + [
        a["srcset"] or "" for a in page.all("source")
    ]
    assert len(sources) == 8
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert page.all("link") == []
    assert [a.get("src") for a in page.all("script")] == [None]
    assert {a["href"] for a in page.all("a")} == {"runs.csv", "results.json"}


def test_names_are_text_and_never_markup(page: Page) -> None:
    assert len(page.all("script")) == 1
    assert page.all("here") == []
    assert HOSTILE in page.text
    assert "-o <here>" in page.text


def test_table_holds_every_run(page: Page) -> None:
    *_, (head, *rows) = page.tables
    assert head[:6] == ["Trace", "Eviction", "Prefetch", "HBM", "Misses", "Byte misses"]
    found = {(row[0], row[1], row[2], row[3].split()[0], row[4]) for row in rows}
    assert found == {
        (
            run["trace"],
            run["eviction"],
            run["prefetch"],
            run["hbm"],
            f"{run['num_misses'] / 10:.2f} %",
        )
        for run in make_results(("qwen", HOSTILE))["runs"]
    }


def test_summary_names_the_best_at_each_budget(page: Page) -> None:
    _, *rows = page.tables[0]
    assert rows == [
        ["10%", "830 ms", "arc", "810 ms", "50 ms", "arc + oracle(0.8,2)", "610 ms", "25 ms"],
        ["50%", "550 ms", "arc", "530 ms", "50 ms", "arc + oracle(0.8,2)", "330 ms", "25 ms"],
    ]


def test_columns_sort_by_buttons_that_say_so(page: Page) -> None:
    sorted_headers = [a for a in page.all("th") if "aria-sort" in a]
    buttons = [a for a in page.all("button") if a.get("class") == "sort"]
    assert len(buttons) == len(sorted_headers) == len(page.tables[-1][0])


def test_filters_offer_what_there_is_a_choice_of(page: Page, lone: Page) -> None:
    assert [a["data-column"] for a in page.all("select")] == ["0", "1", "2", "3"]
    assert lone.tables[-1][0][0] == "Eviction"  # one trace needs no column
    assert lone.all("select") == []


def test_what_has_no_bound_shows_none(lone: Page) -> None:
    assert lone.tables[0][1][4:] == ["", "lru", "725 ms", "0 s"]
    assert "DRAM" in lone.tables[-1][0]
    assert "Of lower bound" not in lone.tables[-1][0]


def test_many_budgets_from_small_to_large(tmp_path: Path) -> None:
    write_report(tmp_path, make_results(percents=range(1, 100, 9), evictions=["lru"]))
    assert len(list((tmp_path / "plots").iterdir())) == 2


# --- lines ---


def test_few_lines_all_stand_out() -> None:
    lines = group_lines(make_results()["runs"])
    assert [line.label for line in lines] == [
        "lru",
        "arc",
        "lru + oracle(0.8,2)",
        "arc + oracle(0.8,2)",
    ]
    assert choose_lines(lines) == lines


def test_of_many_lines_the_best_of_each_predictor_stand_out() -> None:
    evictions = ["lru", *(f"p{i}" for i in range(9))]
    lines = group_lines(make_results(evictions=evictions, prefetch=["none", "eam"])["runs"])
    chosen = [line.label for line in choose_lines(lines)]
    # Plain lru is the last in rank, but what all others are measured by.
    assert chosen == ["lru", "p6", "p7", "p8", *(f"p{i} + eam" for i in (5, 6, 7, 8))]
    assert len(chosen) == MAX_LINES


# --- numbers ---


def test_numbers_for_people() -> None:
    assert [format_seconds(s) for s in (0, 2.5, 0.0123, 80e-6, 3e-9)] == [
        "0 s",
        "2.5 s",
        "12.3 ms",
        "80 µs",
        "3 ns",
    ]
    assert [format_rate(r) for r in (3e12, 5e10, 8e8, 12.0)] == [
        "3 TB/s",
        "50 GB/s",
        "800 MB/s",
        "12 B/s",
    ]


# --- directories ---


def listing(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*"))


def make_report(directory: Path, command: str = "old") -> None:
    directory.mkdir()
    (directory / "results.json").write_text(json.dumps({"format": FORMAT, "command": command}))
    (directory / "plots").mkdir()


def test_a_new_directory_appears_when_its_body_ends(tmp_path: Path) -> None:
    target = tmp_path / "a" / "report"
    with new_directory(target) as directory:
        (directory / "index.html").write_text("new")
        assert not target.exists()
        assert directory.parent == target.parent  # on the same disk
    assert listing(tmp_path) == ["a", "a/report", "a/report/index.html"]
    assert target.stat().st_mode & 0o700 == 0o700


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_stays_of_what_fails(tmp_path: Path, error: type[BaseException]) -> None:
    make_report(tmp_path / "report")
    before = listing(tmp_path)
    with pytest.raises(error), new_directory(tmp_path / "report", force=True) as directory:
        (directory / "index.html").write_text("new")
        raise error
    assert listing(tmp_path) == before


def test_an_empty_directory_is_used(tmp_path: Path) -> None:
    with new_directory(tmp_path) as directory:
        (directory / "index.html").write_text("new")
    assert listing(tmp_path) == ["index.html"]


def test_a_former_report_is_replaced_by_force_alone(tmp_path: Path) -> None:
    target = tmp_path / "report"
    make_report(target)
    with pytest.raises(ConfigError, match="add --force"), new_directory(target):
        pass
    with new_directory(target, force=True) as directory:
        (directory / "index.html").write_text("new")
    assert listing(tmp_path) == ["report", "report/index.html"]


def test_a_link_to_a_report_stays_one(tmp_path: Path) -> None:
    make_report(tmp_path / "report")
    link = tmp_path / "latest"
    link.symlink_to("report")
    with new_directory(link, force=True) as directory:
        (directory / "index.html").write_text("new")
    assert link.is_symlink()
    assert listing(tmp_path / "report") == ["index.html"]


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"format": "other"}', "\udcff"])
def test_what_is_no_report_is_never_replaced(tmp_path: Path, content: str) -> None:
    target = tmp_path / "mine"
    target.mkdir()
    (target / "results.json").write_bytes(content.encode("utf-8", "surrogateescape"))
    with pytest.raises(ConfigError, match="no former report"), new_directory(target, force=True):
        pass
    shutil.rmtree(target)
    target.write_text("a file")
    with pytest.raises(ConfigError, match="not a directory"), new_directory(target, force=True):
        pass
    assert listing(tmp_path) == ["mine"]


def test_a_report_with_other_files_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "report"
    make_report(target)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(ConfigError, match=r"notes\.txt"), new_directory(target, force=True):
        pass
    assert (target / "notes.txt").read_text() == "mine"


def test_what_comes_meanwhile_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "report"
    with pytest.raises(ConfigError, match="other files"), new_directory(target):
        target.mkdir()
        (target / "notes.txt").write_text("mine")
    assert listing(tmp_path) == ["report", "report/notes.txt"]
