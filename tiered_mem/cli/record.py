"""`tiered-mem trace record`: a trace of a model of one's own."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tiered_mem.cli import output

if TYPE_CHECKING:
    from tiered_mem.hf.kv_record import KvRecorder
    from tiered_mem.hf.record import Recorder


def record(
    checkpoint: Annotated[str, typer.Argument(help="A directory or hub id of a model.")],
    out: Annotated[Path, typer.Option("-o", "--output", help="The trace to write, an .npz.")],
    text: Annotated[
        Path | None, typer.Option(help="Read this file token by token, as if it were generated.")
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Or go on from this text by the model's own tokens.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=2, help="Tokens in all.")] = 1024,
    window: Annotated[
        int | None,
        typer.Option(
            min=2,
            help="Tokens of a sequence of --text, then the next one begins. Default: 256; all with "
            "--kv.",
        ),
    ] = None,
    num_prefill: Annotated[
        int, typer.Option(min=1, help="Of these, read at once at the start, as a prompt is.")
    ] = 32,
    temperature: Annotated[float, typer.Option(min=0, help="Of sampling after --prompt.")] = 1.0,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Of sampling.")] = 0,
    hidden: Annotated[
        bool, typer.Option("--hidden", help="Keep residuals too, to train a head on: larger.")
    ] = False,
    hbm: Annotated[str, typer.Option(help="Budget: 6GiB, 500MB, 25% of the experts.")] = "auto",
    dram: Annotated[str, typer.Option(help="Budget of the second tier, 0 for none.")] = "0",
    kv: Annotated[
        str | None,
        typer.Option(
            help="Record blocks of keys and values instead, of dense models too, with this budget."
        ),
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Overwrite a file that is there.")] = False,
    as_json: output.JsonOption = False,
) -> None:
    """Record which experts a model asks for, what its gates predict and what computing takes.

    With --kv: which blocks of keys and values it makes and reads, of 128 tokens each.
    """
    import tiered_mem
    from tiered_mem.atomic_file import check_new
    from tiered_mem.cli.run import load_tokenizer, quiet_transformers
    from tiered_mem.errors import ConfigError

    if (text is None) == (prompt is None):
        raise ConfigError("give either --text FILE or --prompt TEXT")
    if kv is not None and hidden:
        raise ConfigError("--hidden is of experts' routers: leave it out with --kv")
    check_new(out, overwrite=force)
    quiet_transformers()
    tokenizer = load_tokenizer(checkpoint)
    ids = tokenizer(text.read_text() if text else prompt, return_tensors="pt")["input_ids"]
    if ids.shape[1] < 2:
        raise ConfigError("the text has fewer than two tokens: give more of it")
    with output.progress_bar("packing", hidden=as_json) as progress:
        model = tiered_mem.from_pretrained(
            checkpoint, hbm=hbm, dram=dram, prefetch="none", kv=kv, progress=progress
        )
    with closing(model.tiered_mem) as handle, output.status("recording", hidden=as_json):
        recorder: Recorder | KvRecorder
        if kv is None:
            _warm_up(model, ids)
            recorder = handle.record(hidden=hidden)
        else:
            recorder = (handle if isinstance(handle, tiered_mem.KvPool) else handle.kv).record()
        with recorder:
            if text:
                every = 256 if kv is None else max_tokens
                _read(model, ids[:, :max_tokens], window or every, num_prefill)
            else:
                _generate(model, ids, max_tokens, temperature, seed)
        source = f"text {text.name}" if text else "a prompt"
        trace = recorder.trace(out.stem, source=f"tiered-mem trace record, {source}")
        trace.save(out, overwrite=force)
    counts = {
        "path": str(out),
        "num_tokens": trace.num_tokens,
        "num_events": trace.reads.num_events,
        "num_accesses": trace.reads.num_accesses,
    }
    if as_json:
        output.print_json(counts)
    else:
        print(
            f"{out} holds {counts['num_tokens']} tokens, {counts['num_events']} events with "
            f"{counts['num_accesses']} accesses"
        )


def _warm_up(model: Any, ids: Any) -> None:
    """Run what recording hooks into a few times: residuals and predictions are known from then."""
    import torch

    with model.tiered_mem.record(), torch.no_grad():
        for _ in range(3):
            model(input_ids=ids[:, :2])


def _read(model: Any, ids: Any, window: int, num_prefill: int) -> None:
    import torch

    with torch.no_grad():
        for start in range(0, ids.shape[1], window):
            tokens = ids[:, start : start + window]
            cache = _new_cache(model.tiered_mem)
            first = tokens[:, :num_prefill]
            done = model(input_ids=first, past_key_values=cache, use_cache=True)
            for position in range(num_prefill, tokens.shape[1]):
                done = model(
                    input_ids=tokens[:, position : position + 1],
                    past_key_values=done.past_key_values,
                    use_cache=True,
                )
            if cache is not None:
                cache.close()


def _new_cache(handle: Any) -> Any:
    """Return a cache of the model's tiered KV; None if it has none."""
    from tiered_mem import KvPool

    return handle.cache() if isinstance(handle, KvPool) or handle.kv is not None else None


def _generate(model: Any, ids: Any, max_tokens: int, temperature: float, seed: int) -> None:
    import torch

    torch.manual_seed(seed)
    options = {"do_sample": True, "temperature": temperature} if temperature else {}
    model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max(max_tokens - ids.shape[1], 1),
        **({"do_sample": False} | options),
    )
