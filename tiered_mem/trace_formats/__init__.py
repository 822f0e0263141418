"""Traces of others: one file a format, this one to choose among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tiered_mem.config import Size, parse_size
from tiered_mem.errors import ConfigError, TraceError
from tiered_mem.trace import Trace
from tiered_mem.trace_formats import moe_logger, oracle_general, prefix_jsonl, route_csv
from tiered_mem.trace_formats.source import Source

_START_NBYTES = 4096


@dataclass(frozen=True)
class Format:
    """A format that can be imported. `recognise` sees the start of a file."""

    name: str
    summary: str
    recognise: Callable[[bytes], bool]
    read: Callable[..., Trace]
    options: tuple[str, ...] = ()  # what `read` takes beside the source: sizes the file lacks


# In the order in which they are tried: text that names itself first, bare records last.
FORMATS = (
    Format("route-csv", "expert routes of BigMoeOnEdge", route_csv.recognise, route_csv.read),
    Format(
        "moe-logger",
        "expert routes of the MoE loggers for vLLM",
        moe_logger.recognise,
        moe_logger.read,
        ("expert_nbytes",),
    ),
    Format(
        "bailian",
        "KV prefixes of Alibaba Bailian, blocks of 16 tokens",
        prefix_jsonl.recognise_bailian,
        prefix_jsonl.read_bailian,
        ("token_nbytes",),
    ),
    Format(
        "mooncake",
        "KV prefixes of Mooncake, blocks of 512 tokens",
        prefix_jsonl.recognise_mooncake,
        prefix_jsonl.read_mooncake,
        ("token_nbytes",),
    ),
    Format(
        "oracle-general",
        "flat requests of libCacheSim",
        oracle_general.recognise,
        oracle_general.read,
    ),
)


def import_trace(
    path: str | Path,
    *,
    format: str | None = None,
    token_nbytes: Size | None = None,
    expert_nbytes: Size | None = None,
) -> Trace:
    """Read a trace in a foreign format, compressed with zstd or not.

    `format` is a name in `FORMATS`, or None to tell by the content. `token_nbytes` (of KV, over all
    layers) and `expert_nbytes` are sizes that some formats lack; each has a default there.

    Raises:
        TraceError: the file is malformed, which names the line, or in no known format.
        ConfigError: an unknown format, not a size, or a size that the format doesn't lack.
    """
    named = _find_format(format)
    source = Source.open(Path(path))
    chosen = named or _recognise(source)
    given = {"token_nbytes": token_nbytes, "expert_nbytes": expert_nbytes}
    sizes = {name: parse_size(size) for name, size in given.items() if size is not None}
    for name, size in sizes.items():
        if name not in chosen.options:
            raise ConfigError(f"{chosen.name} has no use for {name}; leave it out")
        if not 0 < size < 1 << 40:
            raise ConfigError(f"{name} is {size}: give a size above 0 and below 1 TiB")
    return chosen.read(source, **sizes)


def export_trace(trace: Trace, path: str | Path, *, overwrite: bool = False) -> None:
    """Write a trace's rows, flat, as libCacheSim's oracleGeneral; see `oracle_general.write`."""
    oracle_general.write(trace, Path(path), overwrite=overwrite)


def _find_format(name: str | None) -> Format | None:
    if name is None:
        return None
    for format in FORMATS:
        if format.name == name:
            return format
    raise ConfigError(f"no such format: {name!r}; there are {_list_names()}")


def _recognise(source: Source) -> Format:
    start = source.data[:_START_NBYTES]
    if start.startswith(b"PK"):
        raise TraceError(f"{source.path} is an archive, perhaps a trace that is imported already")
    for format in FORMATS:
        if format.recognise(start):
            return format
    raise TraceError(
        f"{source.path} is in no format known here; name it by --format: {_list_names()}"
    )


def _list_names() -> str:
    return ", ".join(format.name for format in FORMATS)
