"""Policies and predictors of other packages: entry points in the group `tiered_mem.policies`.

An entry point's name is the policy's; what it points to is an `EvictionPolicy` or `Predictor`
class. Nothing of a plug-in is imported before its name is asked for.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import Any, NamedTuple

from tiered_mem import _core
from tiered_mem.errors import ConfigError, PolicyError

GROUP = "tiered_mem.policies"


class PluginInfo(NamedTuple):
    """What is known of a plug-in. Where `error` says why it can't be used, kind is empty."""

    name: str
    kind: str
    """"eviction" or "prefetch"."""
    summary: str
    source: str
    """The package that it is of, and the version."""
    error: str = ""


def names() -> list[str]:
    """Return the names of all plug-ins, of either kind. Imports none."""
    return sorted({entry.name for entry in entry_points(group=GROUP)})


def load(name: str, kind: str) -> type[Any]:
    """Import the plug-in of that name and return its class.

    Args:
        name: of the entry point.
        kind: "eviction" or "prefetch": what it is wanted for.

    Raises:
        ConfigError: there is none of that name, it is of the other kind, or two have that name.
        PolicyError: it can't be imported, isn't a class of either kind, or has a built-in's name.
    """
    entries = _entries(name)
    if not entries:
        raise ConfigError(f"there is no plug-in {name!r} in the entry point group {GROUP}")
    entry = entries[0]
    _require_alone(entry)
    found, found_kind = _load(entry)
    if found_kind != kind:
        raise ConfigError(f"{_describe(entry)} is for --{found_kind}, not for --{kind}")
    return found


def describe(name: str) -> str:
    """Return what to call a plug-in in a message."""
    entries = _entries(name)
    return _describe(entries[0]) if entries else f"plug-in {name!r}"


def list_plugins() -> list[PluginInfo]:
    """Import all plug-ins, and say of each what it is or what is wrong with it."""
    return [_inspect(entry) for name in names() for entry in _entries(name)]


def _inspect(entry: EntryPoint) -> PluginInfo:
    try:
        _require_alone(entry)
        found, kind = _load(entry)
    except (ConfigError, PolicyError) as error:
        return PluginInfo(entry.name, "", "", _package(entry), str(error))
    lines = (found.__doc__ or "").strip().splitlines()
    summary = getattr(found, "summary", "") or (lines[0] if lines else "")
    return PluginInfo(entry.name, kind, str(summary), _package(entry))


def _load(entry: EntryPoint) -> tuple[type[Any], str]:
    # These resolve names by this module.
    from tiered_mem.policies.prefetch import BUILT_INS, Predictor
    from tiered_mem.policy import EvictionPolicy

    who = _describe(entry)
    taken = {row[0].partition("(")[0] for row in _core.eviction_policies()} | set(BUILT_INS)
    if entry.name in taken:
        raise PolicyError(f"{who} has the name of a built-in: its package must rename it")
    try:
        found = entry.load()
    except Exception as error:  # whatever its module raises
        raise PolicyError(f"{who} can't be imported: {error!r}") from error
    for kind, base in (("eviction", EvictionPolicy), ("prefetch", Predictor)):
        if isinstance(found, type) and issubclass(found, base):
            return found, kind
    raise PolicyError(
        f"{who} is {found!r}, not a class derived from tiered_mem.policy.EvictionPolicy or "
        "tiered_mem.policies.prefetch.Predictor"
    )


def _entries(name: str) -> list[EntryPoint]:
    return sorted(set(entry_points(group=GROUP, name=name)), key=_describe)


def _require_alone(entry: EntryPoint) -> None:
    others = [other for other in _entries(entry.name) if other != entry]
    if others:
        raise ConfigError(
            f"{_describe(entry)} and {_describe(others[0])} have the same name: uninstall one"
        )


def _package(entry: EntryPoint) -> str:
    package = entry.dist
    return "an unknown package" if package is None else f"{package.name} {package.version}"


def _describe(entry: EntryPoint) -> str:
    return f"plug-in {entry.name!r} ({entry.value}, of {_package(entry)})"
