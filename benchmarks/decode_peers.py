"""One peer of `bench_decode.py`, in a process of its own so that its memory is its own.

    python decode_peers.py PEER --shape full --work-dir DIR --out result.json

Decodes given token ids one by one (teacher-forced: a random model's own text repeats itself) and
records for every token the seconds, the bytes fetched from storage and what the page cache held.
Before each measured token the peer's files leave the page cache, but for a fixed quarter: what the
page cache of a machine that has room for a quarter of the experts would hold (`--page-cache`).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cold
import numpy as np
import torch
import transformers
from random_model import SHAPES, Shape, random_model, random_tokens

BUDGET = "25%"
BUDGET_SHARE = 0.25


@dataclass
class Peer:
    """A model that is ready to decode, and the files its weights come from while it does."""

    forward: Callable[..., Any]
    config: Any
    files: list[Path] = field(default_factory=list)
    handle: Any = None  # model.tiered_mem, if it is ours


def all_in_ram(checkpoint: Path, folder: Path) -> Peer:
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    return Peer(model, model.config)


def accelerate_disk_offload(checkpoint: Path, folder: Path) -> Peer:
    from accelerate import disk_offload

    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16)
    disk_offload(model, folder, execution_device=torch.device("cpu"))
    return Peer(model, model.config, _files(folder))


def device_map_experts(checkpoint: Path, folder: Path) -> Peer:
    return _device_map(checkpoint, folder, whole_layers=False)


def device_map_layers(checkpoint: Path, folder: Path) -> Peer:
    return _device_map(checkpoint, folder, whole_layers=True)


def _device_map(checkpoint: Path, folder: Path, *, whole_layers: bool) -> Peer:
    num_layers = json.loads((checkpoint / "config.json").read_text())["num_hidden_layers"]
    places = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
    places["lm_head"] = "cpu"
    for name in (f"model.layers.{layer}" for layer in range(num_layers)):
        if whole_layers:
            places[name] = "disk"
            continue
        for part in ("self_attn", "input_layernorm", "post_attention_layernorm", "mlp.gate"):
            places[f"{name}.{part}"] = "cpu"
        places[f"{name}.mlp.experts"] = "disk"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        checkpoint, dtype=torch.bfloat16, device_map=places, offload_folder=folder
    )
    return Peer(model, model.config, _files(folder) + _files(checkpoint))


def airllm(checkpoint: Path, folder: Path) -> Peer:
    from airllm import AutoModel

    model = AutoModel.from_pretrained(
        str(checkpoint), device="cpu", layer_shards_saving_path=str(folder)
    )
    return Peer(model, model.model.config, _files(folder) + _files(checkpoint))


def tiered(checkpoint: Path, folder: Path, *, hbm: str, eviction: str, prefetch: str) -> Peer:
    import tiered_mem

    model = tiered_mem.from_pretrained(
        checkpoint,
        hbm=hbm,
        dram=0,
        nvme=folder,
        eviction=eviction,
        prefetch=prefetch,
        dtype=torch.bfloat16,
    )
    model.tiered_mem.fill()  # the state after a while of use; the warm-up tokens order it
    return Peer(model, model.config, _files(folder), model.tiered_mem)


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# name -> (how it is loaded, folder of its own files: shared by the peers that read the same)
PEERS: dict[str, tuple[Callable[[Path, Path], Peer], str]] = {
    "all-in-ram": (all_in_ram, "none"),
    "accelerate.disk_offload": (accelerate_disk_offload, "accelerate"),
    "device_map experts": (device_map_experts, "device-map-experts"),
    "device_map layers": (device_map_layers, "device-map-layers"),
    "airllm": (airllm, "airllm"),
}


def _ours(hbm: str, eviction: str, prefetch: str) -> Callable[[Path, Path], Peer]:
    return lambda checkpoint, folder: tiered(
        checkpoint, folder, hbm=hbm, eviction=eviction, prefetch=prefetch
    )


OURS = "tiered_mem"
RESIDENT = f"{OURS} all resident"
PEERS[RESIDENT] = (_ours("100%", "lru", "none"), "store")
for _prefetch in ("none", "next-gate", "previous-token"):
    for _eviction in ("lru", "per-layer(lru)"):
        _name = f"{OURS} {_prefetch} {_eviction}"
        PEERS[_name] = (_ours(BUDGET, _eviction, _prefetch), "store")


def rss_anon() -> int:
    """Return this process's memory that no file stands behind, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":\t") for line in lines)
    return sum(int(fields[name].split()[0]) << 10 for name in ("RssAnon", "RssShmem"))


def decode(peer: Peer, tokens: list[int]) -> Iterator[tuple[float, torch.Tensor]]:
    """Feed tokens one by one; yield each one's seconds and the logits after it."""
    cache = transformers.DynamicCache(config=peer.config)
    for token in tokens:
        ids = torch.tensor([[token]])
        start = time.perf_counter()
        with torch.inference_mode():
            logits = peer.forward(input_ids=ids, past_key_values=cache, use_cache=True).logits
        yield time.perf_counter() - start, logits[0, -1].float()


def measure(peer: Peer, tokens: list[int], num_warmup: int, keep_share: float) -> dict[str, Any]:
    """Decode, cold from token `num_warmup` on; return what was seen of each measured token."""
    seconds: list[float] = []
    read: list[int] = []
    cached: list[int] = []
    logits: list[torch.Tensor] = []
    stepper = decode(peer, tokens)
    before = None
    for number in range(len(tokens)):
        if number == num_warmup and peer.handle is not None:
            before = peer.handle.stats()
        if peer.handle is None or number <= num_warmup:
            # Warm-up fills the page cache too, down to the share that is kept.
            held = cold.drop(peer.files, keep_share=keep_share)
        else:
            # O_DIRECT leaves the page cache as it is. A pause here would be time for prefetches
            # that nobody counts.
            held = sum(cold.cached_nbytes(path) for path in peer.files)
        already_read = cold.block_read_nbytes()
        took, scores = next(stepper)
        if number >= num_warmup:
            seconds.append(took)
            read.append(cold.block_read_nbytes() - already_read)
            cached.append(held)
            logits.append(scores)
    result: dict[str, Any] = {
        "seconds": seconds,
        "block_read_nbytes": read,
        "cached_nbytes_before": cached,
        "logits": torch.stack(logits).numpy(),
    }
    if before is not None:
        result["stats"] = (peer.handle.stats() - before).as_dict()
        result["prefetch_report"] = peer.handle.prefetch_report()
        result["budget_nbytes"] = peer.handle.budgets.hbm + peer.handle.budgets.dram
    return result


def folder_of(name: str, shape: Shape, work_dir: Path) -> Path:
    return work_dir / f"{shape.name}-files" / PEERS[name][1]


def load(name: str, shape: Shape, work_dir: Path) -> Peer:
    checkpoint = random_model(shape, work_dir)
    folder = folder_of(name, shape, work_dir)
    # Files made from a checkpoint that has been replaced since would be read without a word.
    mark = folder.with_suffix(".made_from")
    made_from = (checkpoint / "made_from.json").read_text()
    if not mark.exists() or mark.read_text() != made_from:
        shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    peer = PEERS[name][0](checkpoint, folder)
    mark.write_text(made_from)
    return peer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("peer", choices=PEERS)
    parser.add_argument("--shape", choices=SHAPES, default="full")
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--num-tokens", type=int, default=24)
    parser.add_argument("--num-warmup", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--page-cache", type=float, default=BUDGET_SHARE)
    parser.add_argument("--prepare", action="store_true", help="only load, which writes its files")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    shape = SHAPES[options.shape]
    result: dict[str, Any] = {"rss_anon_imported": rss_anon(), "pid": os.getpid()}
    start = time.perf_counter()
    peer = load(options.peer, shape, options.work_dir)
    result["load_seconds"] = time.perf_counter() - start
    result["rss_anon_loaded"] = rss_anon()
    if not options.prepare:
        tokens = random_tokens(shape, options.num_warmup + options.num_tokens, seed=options.seed)
        result |= measure(peer, tokens, options.num_warmup, options.page_cache)
        np.save(options.out.with_suffix(".npy"), result.pop("logits"))
        result["rss_anon_end"] = rss_anon()
    options.out.write_text(json.dumps(result))
    if peer.handle is not None:
        peer.handle.close()


if __name__ == "__main__":
    main()
