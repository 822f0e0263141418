"""A model's KV memory: caches whose blocks lie in HBM, DRAM and NVMe."""

from __future__ import annotations

import inspect
import os
import shutil
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

from tiered_mem.config import Budgets, Size
from tiered_mem.errors import (
    AlreadyWrappedError,
    ChecksumError,
    ConfigError,
    RuntimeClosedError,
    TieredMemError,
    UnsupportedModelError,
)
from tiered_mem.hf import (
    kv_attention,
    kv_indexed,  # noqa: F401  adds its layers
    kv_quest,
)
from tiered_mem.hf.device import require_one_device, usable
from tiered_mem.hf.kv_cache import BLOCK_TOKENS, TieredCache
from tiered_mem.hf.kv_latent import expand_lazily
from tiered_mem.hf.kv_prefixes import Prefixes, prompt_of
from tiered_mem.hf.kv_record import KvRecorder
from tiered_mem.hf.kv_saving import Chain
from tiered_mem.hf.overrides import Overrides
from tiered_mem.policy import DEFAULT_EVICTION, EvictionPolicy, resolve_eviction
from tiered_mem.runtime import Runtime
from tiered_mem.scratch import make_scratch, store_in
from tiered_mem.stats import Stats
from tiered_mem.store import Store

# Blocks of KV are small, and a disk needs so many of them under way to be at its fastest.
_NUM_IO_THREADS = 8


class KvPool:
    """The KV memory of a model, shared by all its caches: a runtime and a store of its own.

    `generate` of the model makes a cache here unless it is given one.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        kv: Size,
        *,
        dram: Size = 0,
        nvme: str | Path | None = None,
        eviction: str | type[EvictionPolicy] = DEFAULT_EVICTION,
        prefixes: str | Path | None = None,
        prefixes_capacity: int | None = None,
        prefix_states: str | int = "full",
        block_tokens: int = BLOCK_TOKENS,
        quest_tokens: int | None = None,
    ) -> None:
        policy = resolve_eviction(eviction)
        _check_model(model)
        device = torch.device(model.device)
        require_one_device(model, device)
        backend = usable(device)
        budgets = Budgets.for_backend(kv, dram, whole=0, backend=backend)
        self.model, self.block_tokens = model, block_tokens
        self.quest_tokens = quest_tokens
        if quest_tokens is not None:
            kv_quest.check(model, quest_tokens, block_tokens)
            if prefixes is not None:
                raise ConfigError(
                    "quest_tokens needs bounds of the keys, which a store of prefixes doesn't "
                    "have: leave one of them out"
                )
        self.num_restored_tokens = 0  # that were stored, and so needn't be computed
        TieredCache.check(model.config, block_tokens)
        with ExitStack() as undo:
            scratch = make_scratch(nvme)
            undo.callback(shutil.rmtree, scratch, ignore_errors=True)
            # What is in it is of no use after this process, and so needn't reach the disk in time.
            store = Store.open(store_in(scratch), mode="w", durable=False)
            undo.callback(store.close)
            self.runtime = Runtime.from_budgets(
                budgets, eviction=policy, num_io_threads=_NUM_IO_THREADS, device=backend
            )
            undo.callback(self.runtime.close)
            self.space = self.runtime.attach_kv(store)
            undo.callback(self.space.close)
            self.prefixes: Prefixes | None = None
            if prefixes is not None:
                self.prefixes = Prefixes(
                    model, self.space, block_tokens, prefixes, prefixes_capacity, prefix_states
                )
                undo.callback(self.prefixes.close)
            self._overrides = Overrides(model)
            self._baseline = self.runtime.stats()
            self._stock_attention = kv_attention.use_tiered_attention(model)
            self._expansions = expand_lazily(model)
            self._overrides.set("generate", _with_cache(self, model.generate))
            self._give_back = weakref.finalize(self, _give_back, undo.pop_all(), os.getpid())

    @property
    def closed(self) -> bool:
        return not self._give_back.alive

    @property
    def budgets(self) -> Budgets:
        return self.runtime.budgets

    def cache(self, prompt: torch.Tensor | None = None) -> TieredCache:
        """Return a new cache for `generate(past_key_values=...)` or the model's forward.

        It starts with the longest stored prefix of `prompt` (token ids, 1-D), if that is given and
        there is a store of prefixes: give the whole prompt to `generate`, which computes the rest.

        Raises `RuntimeClosedError`.
        """
        if self.closed:
            raise RuntimeClosedError("this model's KV memory was given back: load the model again")
        made = (self.space, self.model.config, self.block_tokens)
        cache = (
            TieredCache(*made)
            if self.quest_tokens is None
            else kv_quest.QuestCache(self.quest_tokens, *made)
        )
        if self.prefixes is not None:
            self.prefixes.states.prepare(cache)
        if prompt is not None and self.prefixes is not None:
            self.num_restored_tokens += self.prefixes.restore(cache, prompt)
        return cache

    def save(self, cache: TieredCache, token_ids: torch.Tensor) -> int:
        """Store the whole blocks of a cache of one sequence with these tokens (1-D, all of them).

        Returns how many tokens are stored. Raises `ConfigError`, `StoreFullError`.
        """
        if self.prefixes is None:
            raise ConfigError("there is no store of prefixes: give prefixes=DIRECTORY to tier_kv")
        return self.prefixes.save(cache, token_ids)

    def watch(self, cache: TieredCache, prompt: torch.Tensor | None) -> _Watch:
        """Return what stores a cache's blocks while `generate` goes on from `prompt`, if that is
        given and there is a store."""
        chain = None
        if self.prefixes is not None and prompt is not None:
            chain = self.prefixes.follow(cache, prompt)
        return _Watch(self.prefixes, chain)

    def flush(self) -> None:
        """Wait until all sealed blocks of what was generated are stored, if they are to be."""
        if self.prefixes is not None:
            self.prefixes.flush()

    def record(self) -> KvRecorder:
        """Return a context manager: what the caches do inside it becomes a `Trace`.

        See `TieredModel.record`; experts and KV blocks, which have budgets of their own, are
        recorded apart. Raises `RuntimeClosedError` when it is entered.
        """
        return KvRecorder(self)

    @property
    def num_damaged(self) -> int:
        """Stored groups of tokens that were found damaged and are computed again."""
        return 0 if self.prefixes is None else self.prefixes.num_damaged

    def stats(self) -> Stats:
        """Return what was counted since the start, or `reset_stats`."""
        return self.runtime.stats() - self._baseline

    def reset_stats(self) -> None:
        self._baseline = self.runtime.stats()

    def __reduce__(self) -> Any:
        raise TieredMemError("a model's KV memory can't be pickled or copied: close() it first")

    def close(self) -> None:
        """Give memory and store back; the model is a stock one again. Closing twice is fine."""
        if not self.closed:
            for overrides in (self._overrides, *self._expansions):
                overrides.undo()
            if self._stock_attention is not None:
                self.model.set_attn_implementation(self._stock_attention)
        self._give_back()


def tier_kv(
    model: PreTrainedModel,
    kv: Size,
    *,
    dram: Size = 0,
    nvme: str | Path | None = None,
    eviction: str | type[EvictionPolicy] = DEFAULT_EVICTION,
    prefixes: str | Path | None = None,
    prefixes_capacity: int | None = None,
    prefix_states: str | int = "full",
    block_tokens: int = BLOCK_TOKENS,
    quest_tokens: int | None = None,
) -> PreTrainedModel:
    """Give a model in memory, dense or a wrapped Mixture of Experts, tiered KV; return it.

    Its tokens stay those of the stock cache. `model.tiered_mem.cache()` makes a cache, and
    `generate` does where none is given.

    Args:
        kv: HBM for blocks of keys and values of all the model's caches together: bytes, "2GiB", or
            "auto". The open block of each sequence, sliding windows and recurrent states come on
            top, and a whole prompt while it is computed, unless `generate` gets a
            `prefill_chunk_size`.
        dram: A second tier, in host memory.
        nvme: A directory on a fast disk. Blocks go into a store under it that is removed at the
            end; None: the system's temporary directory.
        prefixes: A directory where whole blocks of single sequences are stored after `generate`,
            under a hash of the model and all tokens before them. A prompt that starts with stored
            ones, in this process or a later one, computes only the rest.
        prefixes_capacity: Bytes that their file may have; what was used least recently goes.
        prefix_states: Where stored prefixes of a model with sliding windows can end: "full", after
            every block; a number, after every so many tokens, which takes less space. "none" is for
            models without windows.
        block_tokens: Tokens of a block.
        quest_tokens: An approximation: attention of each new token reads the blocks of about so
            many tokens, those whose keys may match it best (see `tiered_mem.hf.kv_quest`). Its
            tokens aren't those of the stock cache. None: all that the model attends to.

    Raises:
        ConfigError, BudgetError: options that can't be used.
        UnsupportedModelError: a model without attention that transformers lets us replace.
        AlreadyWrappedError: it has tiered KV already.
    """
    handle = getattr(model, "tiered_mem", None)
    if isinstance(handle, KvPool) or getattr(handle, "kv", None) is not None:
        raise AlreadyWrappedError("this model's KV is tiered already (model.tiered_mem)")
    pool = KvPool(
        model,
        kv,
        dram=dram,
        nvme=nvme,
        eviction=eviction,
        prefixes=prefixes,
        prefixes_capacity=prefixes_capacity,
        prefix_states=prefix_states,
        block_tokens=block_tokens,
        quest_tokens=quest_tokens,
    )
    if handle is None:
        model.tiered_mem = pool
    else:
        handle.kv = pool
    return model


def _check_model(model: PreTrainedModel) -> None:
    kind = f"model type {model.config.model_type!r} ({type(model).__name__})"
    if getattr(model.config, "is_encoder_decoder", False):
        raise UnsupportedModelError(
            f"{kind} is an encoder with a decoder, whose caches come in pairs: load it without kv"
        )
    if not getattr(model, "_supports_default_dynamic_cache", lambda: True)():
        raise UnsupportedModelError(f"{kind} has a cache of its own kind: load it without kv")


def _with_cache(pool: KvPool, generate: Any) -> Any:
    """Return the model's `generate`, with a cache of the pool where no other is asked for."""
    owner = weakref.ref(pool)
    names = [
        name
        for name, parameter in inspect.signature(generate).parameters.items()
        if parameter.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD
    ]

    def generate_tiered(*args: Any, **kwargs: Any) -> Any:
        own = owner()
        if own is None or len(args) > len(names):
            return generate(*args, **kwargs)
        options = {**dict(zip(names, args, strict=False)), **kwargs}
        configs = [options.get("generation_config"), own.model.generation_config]

        def option(name: str) -> Any:
            values = [getattr(config, name, None) for config in configs]
            return next((v for v in (options.get(name), *values) if v is not None), None)

        given = options.get("past_key_values") is not None
        # transformers takes "hybrid", which the hub's older models say, for its default.
        another = option("cache_implementation") not in (None, "hybrid")
        if given or another or option("use_cache") is False:
            return generate(*args, **kwargs)
        # Assisted decoding of transformers goes wrong from any cache that isn't empty.
        assisted = any(option(name) for name in _ASSISTED)
        # Autocast makes keys and values of other types than the model's.
        mixed = torch.is_autocast_enabled(own.space.backend.device.type)
        prompt = None
        if own.prefixes is not None and not assisted and not mixed:
            prompt = prompt_of((), options)
        return _generate(own, generate, prompt, options)

    return generate_tiered


_ASSISTED = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


def _generate(
    own: KvPool, generate: Any, prompt: torch.Tensor | None, options: dict[str, Any]
) -> Any:
    """Generate with a new cache, from what is stored of `prompt`; store its whole blocks.

    Starts over if stored blocks prove damaged, without them: with the same random numbers, and
    a streamer gets every token once. Other state of the caller's (in a logits processor of its
    own, say) goes on.
    """
    streamer = None
    if options.get("streamer") is not None:
        streamer = _Once(options["streamer"])
        options = {**options, "streamer": streamer}
    device = own.space.backend.device
    while True:
        num_damaged = own.num_damaged
        cache = own.cache(prompt)
        random_state = _random_states(device)
        watch = own.watch(cache, prompt)
        try:
            result = generate(**{**watch.added_to(options), "past_key_values": cache})
            break
        except ChecksumError:
            cache.close()
            if own.num_damaged == num_damaged:
                raise
        for module, state in random_state:
            module.set_rng_state(state)
        if streamer is not None:
            streamer.start_over()
    if not isinstance(result, torch.Tensor):  # return_dict_in_generate: the caller gets the cache
        return result
    watch.note(result)
    cache.close()
    return result


class _Watch(StoppingCriteria):  # type: ignore[misc]
    """Has blocks stored as they are sealed. Stops nothing: that is how `generate` tells tokens."""

    def __init__(self, prefixes: Prefixes | None, chain: Chain | None) -> None:
        self._prefixes, self._chain = prefixes, chain

    def added_to(self, options: dict[str, Any]) -> dict[str, Any]:
        if self._chain is None:
            return options
        given = options.get("stopping_criteria") or []
        return {**options, "stopping_criteria": StoppingCriteriaList([*given, self])}

    def note(self, token_ids: torch.Tensor) -> None:
        if self._prefixes is not None and self._chain is not None:
            self._prefixes.advance(self._chain, token_ids)
            self._prefixes.report()

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        self.note(input_ids)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


class _Once:
    """A streamer that gets what comes again, when generation starts over, only once."""

    def __init__(self, inner: Any) -> None:
        self._inner = inner
        self._num_passed = self._num_seen = 0

    def start_over(self) -> None:
        self._num_seen = 0

    def put(self, value: Any) -> None:
        self._num_seen += 1
        if self._num_seen > self._num_passed:
            self._num_passed += 1
            self._inner.put(value)

    def end(self) -> None:
        self._inner.end()


def _random_states(device: torch.device) -> list[tuple[Any, torch.Tensor]]:
    modules: list[Any] = [torch]
    if device.type != "cpu":
        modules.append(torch.get_device_module(device))
    return [(module, module.get_rng_state()) for module in modules]


def _give_back(resources: ExitStack, process: int) -> None:
    if os.getpid() == process:  # a forked child shares the store's files, but doesn't own them
        resources.close()
