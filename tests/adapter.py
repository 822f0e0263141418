"""A saved tiny model beside the same model on tiers, and what a process holds."""

from __future__ import annotations

import gc
import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import families
import torch
from transformers import PreTrainedModel

import tiered_mem
from tiered_mem.hf.detect import find_experts
from tiered_mem.hf.layout import ExpertLayout
from tiered_mem.store import Store

PAD = 0


class Saved(NamedTuple):
    """A random model in memory (experts eager), the same as a checkpoint, and a slot's bytes."""

    path: Path
    model: PreTrainedModel
    slot_nbytes: int

    @classmethod
    def make(cls, name: str, path: Path) -> Saved:
        model, _ = families.build(name)
        model.save_pretrained(path)
        layouts = [ExpertLayout.of_module(e.module) for e in find_experts(model)]
        return cls(path, model, max(layout.slot_nbytes for layout in layouts))

    def load(self, *, hbm_slots: int = 3, dram_slots: int = 3, **options: Any) -> Any:
        """The model on tiers: too small for a prompt's experts, so that events run in waves."""
        if options.get("runtime") is None:
            options = {
                "hbm": hbm_slots * self.slot_nbytes,
                "dram": dram_slots * self.slot_nbytes,
            } | options
        options = {"dtype": torch.float32, "experts_implementation": "eager"} | options
        return tiered_mem.from_pretrained(self.path, **options)

    @contextmanager
    def on_tiers(self, **options: Any) -> Iterator[Any]:
        model = self.load(**options)
        try:
            yield model
        finally:
            model.tiered_mem.close()


def prompt(seed: int = 0, num_tokens: int = 12) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(3, families.VOCABULARY, (1, num_tokens), generator=generator)
    return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}


def padded_batch(lengths: tuple[int, ...] = (12, 5, 9)) -> dict[str, torch.Tensor]:
    """Prompts of several lengths, padded on the left."""
    prompts = [prompt(seed, length)["input_ids"][0] for seed, length in enumerate(lengths)]
    longest = max(lengths)
    pads = [torch.full((longest - len(p),), PAD) for p in prompts]
    tokens = torch.stack([torch.cat([pad, p]) for pad, p in zip(pads, prompts, strict=True)])
    return {"input_ids": tokens, "attention_mask": (tokens != PAD).long()}


@torch.no_grad()
def generate(
    model: Any, inputs: dict[str, torch.Tensor], seed: int = 0, **options: Any
) -> torch.Tensor:
    """Tokens [batch, length]; options are those of `generate`."""
    torch.manual_seed(seed)
    tokens: torch.Tensor = model.generate(
        **inputs, **({"max_new_tokens": 6, "do_sample": False, "pad_token_id": PAD} | options)
    )
    return tokens


def in_threads(calls: list[Callable[[], Any]]) -> list[Any]:
    """What the calls return or raise, each in a thread of its own."""
    results: list[Any] = [None] * len(calls)

    def run(position: int) -> None:
        try:
            results[position] = calls[position]()
        except Exception as error:
            results[position] = error

    threads = [threading.Thread(target=run, args=(i,), daemon=True) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not any(thread.is_alive() for thread in threads), "a thread hangs"
    return results


def num_threads() -> int:
    """Threads of this process, those made in C++ among them; one that ended may show a moment."""
    return len(os.listdir("/proc/self/task"))


def open_files(*folders: Path) -> list[str]:
    """Files open below the folders, deleted ones too."""
    gc.collect()
    found = []
    for fd in os.listdir("/proc/self/fd"):
        with suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{fd}"))
    return [file for file in found if file.startswith(tuple(map(str, folders)))]


def wait_until(true: Callable[[], bool]) -> None:
    """Wait for something that comes about in another thread; fail if it doesn't."""
    for _ in range(6000):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError("it never came about")


def damage(store: Path, *, every: int = 1) -> int:
    """Flip a bit in the payloads of a closed store; returns of how many."""
    with Store.open(store) as opened, opened.snapshot() as snapshot:
        offsets = [snapshot.extent(int(key)).offset for key in snapshot.keys()[::every]]
    with (store / "data.mdb").open("r+b") as file:
        for offset in offsets:
            file.seek(offset + 5)
            byte = file.read(1)[0]
            file.seek(offset + 5)
            file.write(bytes([byte ^ 16]))
        file.flush()
        os.fsync(file.fileno())
    return len(offsets)
