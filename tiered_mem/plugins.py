"""Policies and predictors of other packages: entry points in the group `tiered_mem.policies`.

An entry point's name is the policy's; what it points to is an `EvictionPolicy` or `Predictor`
class. Nothing of a plug-in is imported before its name is asked for.
"""

from __future__ import annotations

from importlib.metadata import EntryPoint, entry_points
from typing import NamedTuple

from tiered_mem import _core
from tiered_mem.errors import ConfigError, PolicyError

GROUP = "tiered_mem.policies"


class PluginInfo(NamedTuple):
    """What is known of an entry point. `error` says why it can't be used; kind is empty then."""

    name: str
    kind: str
    """"eviction" or "prefetch"."""
    summary: str
    distribution: str
    error: str = ""


def names() -> list[str]:
    """Return the names of all plug-ins there are. Imports none."""
    return sorted(entry.name for entry in entry_points(group=GROUP))


def load(name: str, kind: str) -> type:
    """Import the plug-in of that name and return its class.

    Args:
        name: of the entry point.
        kind: "eviction" or "prefetch": what it is wanted for.

    Raises:
        ConfigError: there is no such plug-in, it is of the other kind, or two have that name.
        PolicyError: it can't be imported, isn't a class of either kind, or has a built-in's name.
    """
    entries = sorted(entry_points(group=GROUP, name=name), key=distribution_of)
    if not entries:
        raise ConfigError(f"there is no plug-in {name!r} in the entry point group {GROUP}")
    if len(entries) > 1:
        both = " and ".join(_describe(entry) for entry in entries)
        raise ConfigError(f"{both} have the same name: uninstall one of their packages")
    found, found_kind = _load(entries[0])
    if found_kind != kind:
        raise ConfigError(f"{_describe(entries[0])} is for {found_kind}, not for {kind}")
    return found


def distribution_of(entry: EntryPoint) -> str:
    """Return name and version of the package that an entry point belongs to."""
    package = entry.dist
    return "an unknown package" if package is None else f"{package.name} {package.version}"


def label(name: str) -> str:
    """Return what to call a plug-in in a message."""
    found = sorted(entry_points(group=GROUP, name=name), key=distribution_of)
    return _describe(found[0]) if found else f"plug-in {name!r}"


def list_plugins() -> list[PluginInfo]:
    """Import all plug-ins, and say of each what it is or what is wrong with it."""
    return [_inspect(entry) for entry in sorted(entry_points(group=GROUP), key=_order)]


def _order(entry: EntryPoint) -> tuple[str, str]:
    return entry.name, distribution_of(entry)


def _inspect(entry: EntryPoint) -> PluginInfo:
    package = distribution_of(entry)
    try:
        load(entry.name, (found := _load(entry))[1])  # the name may stand for two
    except (ConfigError, PolicyError) as error:
        return PluginInfo(entry.name, "", "", package, str(error))
    cls, kind = found
    summary = str(getattr(cls, "summary", "") or (cls.__doc__ or "").strip().partition("\n")[0])
    return PluginInfo(entry.name, kind, summary, package)


def _load(entry: EntryPoint) -> tuple[type, str]:
    # The two kinds know of this module: they resolve names with it.
    from tiered_mem.policies.prefetch import BUILT_INS, Predictor
    from tiered_mem.policy import EvictionPolicy

    who = _describe(entry)
    taken = {row[0].partition("(")[0] for row in _core.eviction_policies()} | set(BUILT_INS)
    if entry.name in taken:
        raise PolicyError(f"{who} has the name of a built-in: rename its entry point")
    try:
        found = entry.load()
    except Exception as error:  # whatever its module raises
        raise PolicyError(f"{who} can't be imported: {error!r}") from error
    for kind, base in (("eviction", EvictionPolicy), ("prefetch", Predictor)):
        if isinstance(found, type) and issubclass(found, base):
            return found, kind
    raise PolicyError(
        f"{who} is {found!r}, and no class of tiered_mem.policy.EvictionPolicy or "
        "tiered_mem.policies.prefetch.Predictor"
    )


def _describe(entry: EntryPoint) -> str:
    return f"plug-in {entry.name!r} ({entry.value}, of {distribution_of(entry)})"
