"""What people write to `tiered-mem compare`: lists, links and rates."""

from __future__ import annotations

import math
import re
from dataclasses import replace

from tiered_mem.config import parse_size
from tiered_mem.errors import ConfigError
from tiered_mem.simulate import LinkSpeed, Machine

DEFAULT_LINKS = "hbm=50GB/s:10us,nvme=3GB/s:80us"
"""A PCIe 5 slot, and one good NVMe drive behind a file system."""
DEFAULT_COMPUTE = "300GB/s"

_PER_SECOND = {"s": 1.0, "ms": 1e3, "us": 1e6, "µs": 1e6, "ns": 1e9}
_LATENCY = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(s|ms|us|µs|ns)")


def split_list(text: str) -> list[str]:
    """Cut a list at its commas, but for those in parentheses: "lru,per-layer(lfu),oracle(0.8,2)".

    Raises `ConfigError` for parentheses that don't match, and for nothing between two commas.
    """
    items, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
        if letter == "," and depth == 0:
            items.append("")
        else:
            items[-1] += letter
    if depth:
        raise ConfigError(f"{text!r} has parentheses that don't match")
    items = [item.strip() for item in items]
    if "" in items:
        raise ConfigError(f"{text!r} has nothing at one of its places: write a,b,c")
    return items


def parse_machine(links: str, compute: str) -> Machine:
    """Read "hbm=50GB/s,nvme=3GB/s:80us" and "300GB/s"; what `links` leaves out is as by default.

    A link is a bandwidth and, after a colon, what a transfer takes beside it: 0 if it isn't said.
    Raises `ConfigError`.
    """
    machine = _with_links(
        Machine(nvme=LinkSpeed(1), hbm=LinkSpeed(1), compute=_parse_rate(compute)), DEFAULT_LINKS
    )
    return _with_links(machine, links)


def _with_links(machine: Machine, links: str) -> Machine:
    seen: set[str] = set()
    for item in split_list(links):
        name, equals, speed = (part.strip() for part in item.partition("="))
        if name not in ("hbm", "nvme") or not equals:
            raise ConfigError(f"{item!r} is no link; write hbm=50GB/s, or nvme=3GB/s:80us")
        if name in seen:
            raise ConfigError(f"{links!r} names the link {name} twice")
        seen.add(name)
        bandwidth, _, latency = speed.partition(":")
        link = LinkSpeed(_parse_rate(bandwidth), _parse_latency(latency, item))
        machine = replace(machine, nvme=link) if name == "nvme" else replace(machine, hbm=link)
    return machine


def _parse_rate(text: str) -> float:
    size, slash, second = text.strip().rpartition("/")
    try:
        rate = parse_size(size) if (slash, second.strip()) == ("/", "s") else 0
    except ConfigError:
        rate = 0
    if not rate:
        raise ConfigError(f"{text!r} is no rate; write 50GB/s, 800MB/s or 3GiB/s")
    return float(rate)


def _parse_latency(text: str, link: str) -> float:
    if not text:
        if link.rstrip().endswith(":"):
            raise ConfigError(f"{link!r} has no latency after its colon; write 80us or 0.1ms")
        return 0.0
    match = _LATENCY.fullmatch(text.strip())
    seconds = float(match[1]) / _PER_SECOND[match[2]] if match else math.inf
    if seconds > 3600:
        raise ConfigError(f"{text!r} in {link!r} is no latency; write 80us or 0.1ms")
    return seconds
