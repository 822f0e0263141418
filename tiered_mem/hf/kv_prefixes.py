"""Prefixes of a model's caches that survive a restart: only what is new of a prompt is computed."""

from __future__ import annotations

import hashlib
import threading
import warnings
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel

from tiered_mem.callers import stacklevel
from tiered_mem.errors import ChecksumError, ConfigError, TransferError
from tiered_mem.hf.kv_cache import TieredCache
from tiered_mem.hf.kv_saving import Chain, Pending, Saver
from tiered_mem.hf.kv_states import States
from tiered_mem.keys import BlockKey
from tiered_mem.kv_payloads import KvPayloads
from tiered_mem.kv_space import KvSpace
from tiered_mem.payload_file import Source
from tiered_mem.prefix_index import Group, Record
from tiered_mem.prefixes import PrefixStore

_SAMPLE_NBYTES = 4096  # of every parameter, to tell models apart

TokenIds = npt.NDArray[np.int64]


class Prefixes:
    """The stored prefixes of one model. Safe to share between threads."""

    def __init__(
        self,
        model: PreTrainedModel,
        space: KvSpace,
        block_tokens: int,
        directory: str | Path,
        capacity: int | None,
        states: str | int = "full",
    ) -> None:
        """Open the store in `directory`, or make one. `capacity` limits its file's bytes.

        `states`: see `tier_kv`. Raises as `States` and `PrefixStore.open`.
        """
        self.states = States(
            model, TieredCache(space, model.config, block_tokens), block_tokens, states
        )
        layout = {"block_tokens": block_tokens, "dtype": str(model.dtype), **self.states.layout}
        self._space = space
        self._payloads = KvPayloads(space)
        self._block_tokens = block_tokens
        self._lock = threading.RLock()
        self._saver = Saver(self._save, capacity)
        self._chains: weakref.WeakSet[Chain] = weakref.WeakSet()
        self._store = PrefixStore.open(
            directory, fingerprint=fingerprint(model), layout=layout, capacity=capacity
        )

    @property
    def num_damaged(self) -> int:
        """Groups that were found damaged, and dropped with what came after them."""
        return self._store.num_damaged

    def restore(self, cache: TieredCache, token_ids: torch.Tensor) -> int:
        """Put the longest stored prefix of `token_ids` (1-D) into an empty cache.

        Nothing is read yet: its blocks are where they are. At least one token stays to be computed.
        Returns the number of tokens restored.
        """
        self.flush()  # a prompt goes on most often from what was just generated
        with self._lock, ExitStack() as held:
            records = self._store.match(_as_ids(token_ids)[:-1])
            places = self._store.places(records)
            if not places:
                return 0
            places = places[: self.states.cut(records[: len(places)])]
            if not places:
                return 0
            records = records[: len(places)]
            if not self._put_back(cache, records):
                return self.restore(cache, token_ids)
            held.enter_context(self._store.hold(records))
            owner = {record.index: record for record in records}

            def damaged(key: BlockKey) -> None:
                with self._lock:
                    self._store.damaged(owner[key.index])

            for layer in cache.tiered_layers():
                own = [
                    (key, extent)
                    for group in places
                    for key, extent in group.items()
                    if key.layer == layer.number
                ]
                layer.adopt(own, damaged)
            # Places are right while the records are held: as long as the cache is there.
            weakref.finalize(cache, held.pop_all().close)
            return len(records) * self._block_tokens

    def follow(self, cache: TieredCache, token_ids: torch.Tensor) -> Chain:
        """Return what `advance` saves the groups of a cache by, whose tokens so far are these."""
        with self._lock:
            known = self._store.match(_as_ids(token_ids))
            parent = known[-1].hash if known else self._store.root
            chain = Chain(cache, parent, len(known))
        self._chains.add(chain)
        return chain

    def advance(self, chain: Chain, token_ids: torch.Tensor) -> None:
        """Begin to store what is sealed of a chain's cache since the last call.

        `token_ids` [sequences, tokens] are those of the cache, and maybe more; several sequences
        are no prefix, and aren't stored. Quick: the work is another thread's.
        """
        if len(token_ids) == 1 and chain.may_advance(token_ids.shape[1], self._block_tokens):
            self._saver.put(chain.advance(_as_ids(token_ids[0]), self._block_tokens))

    def save(self, cache: TieredCache, token_ids: torch.Tensor) -> int:
        """Store the whole blocks of a cache of one sequence, whose tokens `token_ids` (1-D) are.

        Returns the number of tokens that are stored now. Raises `ConfigError` if they are fewer
        than the cache has, or it has several sequences; `StoreFullError`.
        """
        layers = cache.tiered_layers()
        if any(len(layer.rows) > 1 for layer in layers):
            raise ConfigError("a stored prefix is of one sequence: this cache has several")
        if len(_as_ids(token_ids)) < cache.get_seq_length():
            raise ConfigError(
                f"{len(token_ids)} token ids for a cache of {cache.get_seq_length()} tokens: "
                "give all"
            )
        self._saver.drain()
        num_tokens = min(layer.num_sealed for layer in layers)
        chain = self.follow(cache, token_ids[:num_tokens])
        self.advance(chain, torch.as_tensor(token_ids)[None])
        self._saver.drain()
        if chain.error is not None:
            chain.reported = True
            raise chain.error
        return num_tokens

    def flush(self) -> None:
        """Wait until all that is sealed is stored. What couldn't be is warned of, once."""
        self._saver.drain()
        self.report()

    def report(self) -> None:
        """Warn of answers that couldn't be stored, each once."""
        for chain in list(self._chains):
            if chain.error is not None and not chain.reported:
                chain.reported = True
                warnings.warn(f"an answer wasn't stored: {chain.error}", stacklevel=stacklevel())

    def close(self) -> None:
        """Store what is sealed, and close the store."""
        self.flush()
        with self._lock:
            self._store.close()

    def _save(self, pending: list[Pending]) -> None:
        """Store groups of one chain. In the saver's thread."""
        new = [group for group in pending if group.hash not in self._store.index.records]
        self._store.save([self._group(group) for group in new], self._lock)

    def _group(self, pending: Pending) -> Group:
        blocks = [(layer, self._source(layer, index)) for layer, index in pending.blocks]
        return Group(pending.parent, pending.token_ids, blocks)

    def _source(self, layer: int, index: int) -> Source:
        return Source(self._space.block_nbytes(layer), self._payloads, (layer, index))

    def _put_back(self, cache: TieredCache, records: Sequence[Record]) -> bool:
        """Put the windows into the cache; return False if one was found damaged, and dropped."""
        for number, groups in self.states.of_windows(records).items():
            blocks = []
            for group in groups:
                try:
                    blocks.append(self._store.read_layer(records[group], number))
                except (ChecksumError, TransferError):
                    self._store.damaged(records[group])
                    return False
            cache.layers[number].restore(len(records), blocks)
        return True


def fingerprint(model: PreTrainedModel) -> str:
    """Return what tells models apart: config, and a sample of every parameter there is.

    Parameters on meta (experts of a wrapped model) count by the fingerprint of their store.
    """
    digest = hashlib.blake2b(digest_size=32)
    config = model.config.to_diff_dict()
    for volatile in ("_name_or_path", "transformers_version", "architectures"):
        config.pop(volatile, None)
    digest.update(repr(sorted(config.items(), key=lambda item: item[0])).encode())
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {tuple(parameter.shape)} {parameter.dtype}".encode())
        if parameter.device.type != "meta":
            sample = parameter.detach().reshape(-1)[: _SAMPLE_NBYTES // parameter.element_size()]
            digest.update(sample.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    store = getattr(getattr(model, "tiered_mem", None), "store", None)
    if store is not None:
        digest.update(str(store.metadata.get("experts", {}).get("fingerprint")).encode())
    return digest.hexdigest()


def _as_ids(token_ids: torch.Tensor | Sequence[int]) -> TokenIds:
    ids = np.asarray(torch.as_tensor(token_ids).cpu().numpy(), np.int64)
    if ids.ndim != 1:
        raise ConfigError(f"token ids of one sequence have one dimension, not {ids.ndim}")
    return ids


def prompt_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor | None:
    """Return the token ids (1-D) of a call of `generate` that nothing but they decide.

    None where there are several sequences, padding, or other tensors (images, embeddings ...),
    which would make other keys and values of the same ids.
    """
    kwargs = dict(kwargs)
    ids = kwargs.pop("input_ids", None)
    if ids is None:
        ids = kwargs.pop("inputs", args[0] if args else None)
    mask = kwargs.pop("attention_mask", None)
    if not isinstance(ids, torch.Tensor) or ids.ndim != 2 or ids.shape[0] != 1:
        return None
    if ids.is_floating_point() or (mask is not None and not bool((mask == 1).all())):
        return None
    if any(isinstance(value, torch.Tensor) for value in kwargs.values()):
        return None
    return ids[0]
