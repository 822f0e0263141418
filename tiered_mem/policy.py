"""Eviction policies: the names there are, and how to write one."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, NamedTuple

from tiered_mem import _core
from tiered_mem.errors import ConfigError, PolicyError

#: What a runtime uses unless told otherwise; docs/policies.md says why.
DEFAULT_EVICTION = "adaptive"


class EvictionPolicy(ABC):
    """Ranks the blocks of one tier. It chooses; the runtime acts.

    Derive from it, and pass the class as `eviction=` or name it in an entry point of the group
    `tiered_mem.policies`; each tier makes its own object. Keys are integers, sizes bytes. Guesses
    (prefetched blocks that no event has used) never reach a policy. Calls come one at a time, but
    from any thread, and may not call the runtime. What a policy raises, or a key it may not return,
    becomes a `PolicyError` of the event that asked; nothing is lost by it.
    """

    name: ClassVar[str]
    summary: ClassVar[str] = ""
    source: ClassVar[str] = ""
    """Where the algorithm comes from."""

    @abstractmethod
    def insert(self, key: int, nbytes: int) -> None:
        """`key` became resident. It wasn't before."""

    @abstractmethod
    def touch(self, key: int) -> None:
        """An event used `key`, which is resident."""

    @abstractmethod
    def erase(self, key: int) -> None:
        """`key`, which was resident, left for another reason than `evict`."""

    @abstractmethod
    def evict(self, evictable: Callable[[int], bool], incoming: int | None) -> int | None:
        """Choose a resident key for which `evictable(key)` holds, forget it, and return it.

        None if there is none. Blocks that are pinned or on their way may not be evicted.
        `evictable` is good during the call only. `incoming` is inserted next, if anything is.
        """

    def set_budget(self, nbytes: int) -> None:  # noqa: B027
        """Take note of the bytes that blocks may hold together. Called first, and at a resize."""

    def begin_event(self, layer: int) -> None:  # noqa: B027
        """Take note that an event on `layer` begins."""

    def hint(self, key: int, probability: float) -> None:  # noqa: B027
        """Take note that the next event of the key's layer uses it so probably; 0 takes it back."""


class PolicyInfo(NamedTuple):
    """A policy's name, what it does in a line, and where it comes from."""

    name: str
    summary: str
    source: str


def list_policies() -> list[PolicyInfo]:
    """Return all built-in eviction policies."""
    return [PolicyInfo(*row) for row in _core.eviction_policies()]


def resolve_eviction(eviction: str | type[EvictionPolicy]) -> str:
    """Make a policy known to the core and return the name by which it makes it.

    `eviction` is a built-in's name, a plug-in's, either inside `per-layer(...)`, or a class derived
    from `EvictionPolicy`. Raises `ConfigError` with the choices, `PolicyError` for a plug-in that
    can't be loaded and for a class whose name another class has.
    """
    if isinstance(eviction, type) and issubclass(eviction, EvictionPolicy):
        return _register(eviction)
    if not isinstance(eviction, str):
        raise ConfigError(
            f"eviction={eviction!r} is neither a policy's name nor a class derived from "
            "tiered_mem.policy.EvictionPolicy"
        )
    match = re.fullmatch(r"per-layer\((.*)\)", eviction)
    if match:
        return f"per-layer({resolve_eviction(match[1])})"
    if eviction not in {policy.name for policy in list_policies()}:
        from tiered_mem import plugins

        if eviction in plugins.names():
            return _register(plugins.load(eviction, "eviction"), eviction)
    _core.check_eviction(eviction)
    return eviction


def _register(policy: type[EvictionPolicy], name: str | None = None) -> str:
    own = name or getattr(policy, "name", "") or policy.__name__
    if not isinstance(own, str):
        raise ConfigError(f"the name of class {policy.__name__} is {own!r}; a name is a string")
    known = _registered.get(own)
    if known is not None and _identity(known) != _identity(policy):
        raise PolicyError(
            f"{_identity(policy)} and {_identity(known)} both call themselves {own!r}: give one of "
            "them another name"
        )
    _core.register_eviction(own, policy)
    _registered[own] = policy
    return own


# The classes made known to the core so far, by name.
_registered: dict[str, type[EvictionPolicy]] = {}


def _identity(policy: type) -> str:
    """What stays the same when a module is loaded again."""
    return f"{policy.__module__}.{policy.__qualname__}"
