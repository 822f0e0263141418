"""The page: one file that needs no network, with the plots in it."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib.resources import files
from string import Template
from typing import Any

from tiered_mem.config import format_size
from tiered_mem.report.lines import combination
from tiered_mem.report.plots import Plot, demand_stall, least_stall, miss_ratio, per_token

_TITLE = "Eviction and prefetch, compared"


def render_page(results: dict[str, Any], plots: Sequence[Plot]) -> str:
    """Return the HTML of a report."""
    columns = _columns(results)
    return Template(_read("page.html")).substitute(
        title=_TITLE,
        style=_read("page.css"),
        script=_read("page.js"),
        subtitle=escape(_subtitle(results)),
        command=_command(results["command"]),
        traces="\n".join(_trace_section(trace, results, plots) for trace in results["traces"]),
        filters="\n".join(_filters(columns, results["runs"])),
        table=_runs_table(columns, results["runs"]),
        words="\n".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in _WORDS),
        made_by=_facts(_made_by(results)),
    )


def _read(name: str) -> str:
    return (files("tiered_mem.report") / name).read_text(encoding="utf-8")


def _subtitle(results: dict[str, Any]) -> str:
    num_runs, num_traces = len(results["runs"]), len(results["traces"])
    return (
        f"{num_runs} simulated {'run' if num_runs == 1 else 'runs'} over {num_traces} "
        f"{'trace' if num_traces == 1 else 'traces'}, by tiered-mem {results['version']}, "
        f"{results['date'][:16].replace('T', ' ')} UTC"
    )


def _command(command: str) -> str:
    """Return it so that lines break between its words: a hyphen is no place for it."""
    return " ".join(f"<span>{escape(word)}</span>" for word in command.split(" "))


def _made_by(results: dict[str, Any]) -> dict[str, str]:
    links = {
        f"simulated {name}": f"{format_rate(link['bytes_per_second'])}, "
        f"{format_seconds(link['latency'])} a transfer"
        for name, link in results["links"].items()
        if name != "compute"
    }
    compute = results["links"]["compute"]["bytes_per_second"]
    links["simulated compute"] = f"{format_rate(compute)} of weights, where no time was recorded"
    return links | {name: str(value) for name, value in results["machine"].items()}


def _facts(facts: dict[str, str]) -> str:
    items = (f"<div><dt>{escape(k)}</dt><dd>{escape(v)}</dd></div>" for k, v in facts.items())
    return f'<dl class="facts">{"".join(items)}</dl>'


# --- numbers ---


def format_rate(bytes_per_second: float) -> str:
    """Return a bandwidth for people, in the units that links are sold by."""
    for factor, unit in ((1e12, "TB/s"), (1e9, "GB/s"), (1e6, "MB/s")):
        if bytes_per_second >= factor:
            return f"{bytes_per_second / factor:.4g} {unit}"
    return f"{bytes_per_second:.4g} B/s"


def format_seconds(seconds: float) -> str:
    """Return a duration for people: "1.25 ms"."""
    if seconds == 0:
        return "0 s"
    for factor, unit in ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs")):
        if seconds >= factor:
            return f"{seconds / factor:.4g} {unit}"
    return f"{seconds / 1e-9:.3g} ns"


def _percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _optional(text: Callable[[float], str], value: float | None) -> str:
    return "" if value is None else text(value)


# --- the sections of traces ---


def _trace_section(trace: dict[str, Any], results: dict[str, Any], plots: Sequence[Plot]) -> str:
    runs = [run for run in results["runs"] if run["trace"] == trace["name"]]
    pictures = "".join(_figure(plot) for plot in plots if plot.trace == trace["name"])
    return (
        f"<section><h2>{escape(trace['name'])}</h2>"
        f"{_facts(_describe(trace['info']))}{_summary(runs)}"
        f'<div class="plots">{pictures}</div></section>'
    )


def _describe(info: dict[str, Any]) -> dict[str, str]:
    """Return what a reader wants to know of a trace (`tiered_mem.trace_info`) first."""
    num_experts, top_k, cycle = info["num_experts"], info["top_k"], info["cycle_nbytes"]
    recall = info["previous_token_recall"]
    facts = {
        "model": info["model"],
        "made of": info["form"],
        "tokens": f"{info['num_tokens']:,}" if info["form"] == "events" else "",
        "sequences": f"{info['num_sequences']:,}",
        "events": f"{info['num_events']:,}",
        "accesses": f"{info['num_accesses']:,}",
        "layers": f"{info['num_layers']:,}",
        "experts a layer": f"{num_experts}, of which {top_k}" if num_experts and top_k else "",
        "all blocks": format_size(info["total_nbytes"]),
        "one token's cycle": format_size(cycle) if cycle else "",
        "hits of an endless cache": _percent(info["ceiling"]),
        "same as the token before": "" if recall is None else _percent(recall),
    }
    return {name: text for name, text in facts.items() if text}


def _figure(plot: Plot) -> str:
    return (
        '<figure><picture><source media="(prefers-color-scheme: dark)" '
        f'srcset="{_data_uri(plot.dark)}">'
        f'<img src="{_data_uri(plot.light)}" alt="{escape(plot.text)}"></picture></figure>'
    )


def _data_uri(png: bytes) -> str:
    return f"data:image/png;base64,{base64.b64encode(png).decode()}"


def _summary(runs: list[dict[str, Any]]) -> str:
    """A row a budget: plain lru, what did best, and the bounds."""
    headings = [
        "HBM",
        "lru: stall a token",
        "best without prefetch",
        "stall a token",
        "Belady on demand",
        "best of all",
        "stall a token",
        "lower bound",
    ]
    rows = []
    for nbytes in sorted({run["hbm_nbytes"] for run in runs}):
        here = [run for run in runs if run["hbm_nbytes"] == nbytes]
        on_demand = [run for run in here if run["prefetch"] == "none"]
        lru = [run for run in on_demand if run["eviction"] == "lru"]
        cells = [f"{here[0]['hbm']}", _stall(lru[0]) if lru else ""]
        for group, bound in ((on_demand, demand_stall), (here, least_stall)):
            best = min(group, key=_worth, default=None)
            cells.append(combination(best["eviction"], best["prefetch"]) if best else "")
            cells.append(_stall(best) if best else "")
            cells.append(_optional(format_seconds, bound(here[0])))
        rows.append(cells)
    head = "".join(f'<th scope="col" class="{_side(i)}">{h}</th>' for i, h in enumerate(headings))
    body = "".join(f"<tr>{''.join(_summary_cells(row))}</tr>" for row in rows)
    return (
        '<div class="scroll" role="region" aria-label="Best by budget" tabindex="0">'
        f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _summary_cells(row: Sequence[str]) -> Iterable[str]:
    yield f'<th scope="row">{escape(row[0])}</th>'
    for i, cell in enumerate(row[1:], 1):
        yield f'<td class="{_side(i)}">{escape(cell)}</td>'


def _side(column: int) -> str:
    return "name" if column in (0, 2, 5) else "number"


def _worth(run: dict[str, Any]) -> tuple[float, float]:
    return run["stall_seconds"], run["num_misses"]


def _stall(run: dict[str, Any]) -> str:
    return format_seconds(per_token(run, run["stall_seconds"]))


# --- the table of all runs ---


@dataclass(frozen=True)
class _Column:
    """`value` is what is sorted by, `text` what is shown.

    `filtered` is what a run calls it that is chosen from, if there is a filter for the column.
    """

    heading: str
    value: Callable[[dict[str, Any]], float | str | None]
    text: Callable[[Any], str] = str
    filtered: str = ""
    least_is_best: bool = False

    @property
    def is_number(self) -> bool:
        return self.text is not str


def _columns(results: dict[str, Any]) -> list[_Column]:
    columns = [
        _Column("Trace", lambda run: run["trace"], filtered="trace"),
        _Column("Eviction", lambda run: run["eviction"], filtered="eviction"),
        _Column("Prefetch", lambda run: run["prefetch"], filtered="prefetch"),
        _Column("HBM", lambda run: run["hbm_nbytes"], format_size, filtered="hbm"),
        _Column("DRAM", lambda run: run["dram_nbytes"], format_size),
        _Column("Misses", miss_ratio, _percent, least_is_best=True),
        _Column("Byte misses", lambda run: run["byte_miss_ratio"], _percent),
        _Column(
            "Stall a token",
            lambda run: per_token(run, run["stall_seconds"]),
            format_seconds,
            least_is_best=True,
        ),
        _Column("Of lower bound", _over_bound, lambda ratio: f"{ratio:.2f} x"),
        _Column("NVMe → HBM", lambda run: run["nbytes_moved"]["nvme_to_hbm"], format_size),
        _Column("DRAM → HBM", lambda run: run["nbytes_moved"]["dram_to_hbm"], format_size),
        _Column("HBM → DRAM", lambda run: run["nbytes_moved"]["hbm_to_dram"], format_size),
        _Column("Wasted prefetch", lambda run: run["wasted_prefetch_nbytes"], format_size),
        _Column("Evictions", lambda run: run["num_evictions"], lambda count: f"{count:,}"),
    ]
    runs = results["runs"]
    if len(results["traces"]) == 1:
        del columns[0]
    if not any(run["dram_nbytes"] for run in runs):
        columns = [column for column in columns if "DRAM" not in column.heading]
    if not any(run["bounds"]["stall_seconds_lower"] for run in runs):
        columns = [column for column in columns if column.heading != "Of lower bound"]
    return columns


def _over_bound(run: dict[str, Any]) -> float | None:
    bound = run["bounds"]["stall_seconds_lower"]
    return run["stall_seconds"] / bound if bound else None


def _filters(columns: Sequence[_Column], runs: Sequence[dict[str, Any]]) -> Iterable[str]:
    for i, column in enumerate(columns):
        values = list(dict.fromkeys(run[column.filtered] for run in runs if column.filtered))
        if len(values) > 1:
            options = "".join(f'<option value="{escape(v)}">{escape(v)}</option>' for v in values)
            yield (
                f'<label>{column.heading}<select data-column="{i}">'
                f'<option value="">all</option>{options}</select></label>'
            )


def _runs_table(columns: Sequence[_Column], runs: Sequence[dict[str, Any]]) -> str:
    order = {run["trace"]: i for i, run in reversed(list(enumerate(runs)))}
    ranked = sorted(runs, key=lambda run: (order[run["trace"]], run["hbm_nbytes"], *_worth(run)))
    best = _best(columns, runs)
    head = "".join(
        f'<th scope="col" class="{"number" if column.is_number else "name"}" aria-sort="none">'
        f'<button type="button" class="sort">{column.heading}</button></th>'
        for column in columns
    )
    body = "\n".join(
        f"<tr>{''.join(_cell(column, run, best) for column in columns)}</tr>" for run in ranked
    )
    return f'<table id="runs"><thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody></table>'


def _best(columns: Sequence[_Column], runs: Sequence[dict[str, Any]]) -> set[tuple[Any, ...]]:
    """Return (heading, trace, budget, value) of the least values."""
    least: dict[tuple[Any, ...], Any] = {}
    for column in columns:
        for run in runs if column.least_is_best else ():
            place: tuple[Any, ...] = _place(column, run)
            value: Any = column.value(run)
            least[place] = min(least.get(place, value), value)
    return {(*place, value) for place, value in least.items()}


def _place(column: _Column, run: dict[str, Any]) -> tuple[Any, ...]:
    return column.heading, run["trace"], run["hbm_nbytes"]


def _cell(column: _Column, run: dict[str, Any], best: set[tuple[Any, ...]]) -> str:
    value = column.value(run)
    text = "" if value is None else escape(column.text(value))
    if not column.is_number:
        return f'<td class="name" data-choice="{text}">{text}</td>'
    kind = "number best" if (*_place(column, run), value) in best else "number"
    sorted_by = "" if value is None else repr(value)
    choice = ""
    if column.filtered:
        written = escape(run[column.filtered])
        text = text if written.isdigit() else f"{written} · {text}"
        choice = f' data-choice="{written}"'
    return f'<td class="{kind}" data-value="{sorted_by}"{choice}>{text}</td>'


_WORDS = (
    (
        "Budget, HBM, DRAM",
        "The room for blocks in device memory and in the host memory behind it. A share is of the "
        "bytes of all experts of the model, or of all blocks that the trace names.",
    ),
    (
        "Misses",
        "The share of accesses whose block was not in HBM, ready to be read, when its layer "
        "asked for it. A block on its way counts as a miss, so prefetch that comes a little late "
        "shows up in the stall and not here. Byte misses weigh each access by the size of its "
        "block. In traces of prefixes a hit counts only as long as all blocks before it hit.",
    ),
    (
        "Stall a token",
        "How long the device waits for blocks, in simulated time, divided by the tokens (by the "
        "requests, in flat traces of caches). This is what to choose by: transfers that run while "
        "the device computes cost nothing, and misses that come together cost less than apart.",
    ),
    (
        "Wasted prefetch",
        "Bytes that a prediction moved and no event used before they were evicted. They cost the "
        "link time, and the room of other blocks.",
    ),
    (
        "Belady on demand",
        "The fewest misses that any policy without prefetch can have on this trace: it knows the "
        "future and evicts what is needed last. Dotted: every block that is read also enters, as "
        "in the runs. With bypass: a block may be read once without taking another's place. For "
        "blocks of different sizes it is a very good policy and no proof. Runs with prefetch can "
        "go below it: they move blocks before they are needed. Its stall is that of HBM alone, so "
        "it isn't shown where there is DRAM.",
    ),
    (
        "Lower bound",
        "A stall that no policy with any predictor can beat on these links: it knows the future, "
        "moves blocks before they are asked for, and still can't fill the link faster than "
        "it goes. “Of lower bound” is a run's stall over it; nothing says that 1.00 x can "
        "be reached.",
    ),
    (
        "oracle(recall, lookahead)",
        "Not a predictor but a question: what would one be worth that names this share of the "
        "blocks of an event, so many events ahead, and wrong blocks for the rest?",
    ),
    (
        "Shading",
        "The fewest misses and the least stall among the runs of a trace with the same budget.",
    ),
)
