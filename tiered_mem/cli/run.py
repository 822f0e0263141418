"""`tiered-mem run`: generate text with a model whose experts needn't fit in memory."""

from __future__ import annotations

import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

from tiered_mem.cli import output
from tiered_mem.cli.conversation import Conversation
from tiered_mem.cli.pack import Codec, CodecOption, Dtype, DtypeOption


def run(
    checkpoint: Annotated[str, typer.Argument(help="A directory or hub id of a model.")],
    prompt: Annotated[str, typer.Option(help="The text to go on from.")],
    device: Annotated[
        str, typer.Option(help="cpu, cuda:0, ... or auto: torch's accelerator if there is one.")
    ] = "auto",
    hbm: Annotated[str, typer.Option(help="Budget: 6GiB, 500MB, 25% of the experts.")] = "auto",
    dram: Annotated[str, typer.Option(help="Budget of the second tier, 0 for none.")] = "auto",
    nvme: Annotated[
        Path | None,
        typer.Option(help="The store's directory, packed on first use. Default: a temporary one."),
    ] = None,
    kv: Annotated[
        str | None, typer.Option(help="Budget of keys and values: 256MiB. Default: all in memory.")
    ] = None,
    kv_dram: Annotated[
        str | None, typer.Option(help="Second tier of keys and values. Default: none.")
    ] = None,
    session: Annotated[
        str | None,
        typer.Option(
            help="Go on with the conversation stored under this name, and store it again. Needs "
            "--kv and --nvme, where it is kept."
        ),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    check: Annotated[
        bool, typer.Option("--check", help="Compare with the model without offload.")
    ] = False,
    eviction: Annotated[str, typer.Option(help="See tiered-mem policies.")] = "adaptive",
    prefetch: Annotated[str, typer.Option(help="See tiered-mem policies.")] = "next-gate",
    temperature: Annotated[
        float, typer.Option(min=0, help="Of sampling; 0 takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(min=0, max=(1 << 63) - 1, help="Of sampling.")] = 0,
    dtype: DtypeOption = Dtype.auto,
    codec: CodecOption = Codec.none,
    as_json: output.JsonOption = False,
) -> None:
    """Generate text within byte budgets and show what moved. Exits with 1 if --check fails."""
    import tiered_mem

    quiet_transformers()
    conversation = None
    if session is not None:
        if kv is None or nvme is None:
            raise typer.BadParameter("a session needs --kv and --nvme, the directory it is kept in")
        conversation = Conversation(nvme, session)
    question = _Question(
        checkpoint, prompt, max_new_tokens, temperature, seed, dtype.value, conversation
    )
    with output.progress_bar("packing", hidden=as_json) as progress:
        model = tiered_mem.from_pretrained(
            checkpoint,
            device=device,
            hbm=hbm,
            dram=dram,
            nvme=nvme,
            eviction=eviction,
            prefetch=prefetch,
            codec=codec.value,
            kv=kv,
            kv_dram=kv_dram,
            prefixes=None if conversation is None else conversation.prefixes,
            dtype=dtype.value,
            progress=progress,
        )
    handle = model.tiered_mem
    with closing(handle):
        if conversation is not None:
            conversation.check(model.get_input_embeddings().num_embeddings)
        dense = isinstance(handle, tiered_mem.KvPool)
        pool = handle if dense else handle.kv
        if not dense:
            with output.progress_bar("loading", hidden=as_json) as progress:
                handle.fill(progress)
            handle.reset_stats()
        answer = question.ask(model, stream=not as_json)
        report = {"layers": {}} if dense else handle.prefetch_report()
        stats, budgets, backend = handle.stats(), handle.budgets, handle.runtime.backend
        kv_report = None if pool is None else _kv_report(pool)
        if conversation is not None:
            conversation.save(answer.sequence)
    place = backend.name
    same = question.ask(question.load_stock(place)).tokens == answer.tokens if check else None
    if as_json:
        output.print_json(
            {
                "text": answer.text,
                "tokens": answer.tokens,
                "num_prompt_tokens": answer.num_prompt_tokens,
                "first_token_seconds": answer.first_token_seconds,
                "tokens_per_second": answer.tokens_per_second,
                "device": place,
                "hbm_nbytes": budgets.hbm,
                "dram_nbytes": budgets.dram,
                "stats": stats.as_dict(),
                "prefetch": report,
                "kv": kv_report,
                "same_as_without_offload": same,
            }
        )
    else:
        print()
        rows = _rows(answer, stats, report, budgets, backend)
        if kv_report is not None:
            rows = (rows[:2] if dense else rows) + _kv_rows(kv_report)
        output.print_table(rows)
        if same is not None:
            verdict = "identical to" if same else "DIFFERENT from"
            print(f"\nThe tokens are {verdict} those of the model without offload.")
    if same is False:
        raise typer.Exit(1)


@dataclass(frozen=True)
class _Answer:
    """The new tokens. The first one includes the prompt's time; the rate is of those after it."""

    sequence: list[int]  # prompt and answer
    tokens: list[int]
    text: str
    num_prompt_tokens: int
    first_token_seconds: float
    tokens_per_second: float | None


class _Question:
    """A prompt and how to go on from it, asked the same way of either model."""

    def __init__(
        self,
        checkpoint: str,
        prompt: str,
        max_new_tokens: int,
        temperature: float,
        seed: int,
        dtype: str,
        conversation: Conversation | None,
    ) -> None:
        import torch

        from tiered_mem.errors import ConfigError

        self._checkpoint, self._prompt, self._seed, self._dtype = checkpoint, prompt, seed, dtype
        self._tokenizer = load_tokenizer(checkpoint)
        # What a tokenizer puts in front belongs to the start of a conversation alone.
        starts = conversation is None or not conversation.tokens
        self._inputs = self._tokenizer(prompt, return_tensors="pt", add_special_tokens=starts)
        if self._inputs["input_ids"].shape[1] == 0:
            raise ConfigError(
                "the prompt has no token: give --prompt some text, and the model its tokenizer"
            )
        if conversation is not None:
            before = torch.tensor([conversation.tokens], dtype=torch.long)
            ids = torch.cat([before, self._inputs["input_ids"]], 1)
            self._inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        self._options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": False}
        if temperature > 0:
            self._options |= {"do_sample": True, "temperature": temperature}

    def load_stock(self, device: str) -> Any:
        """Return the unmodified model, all of it in memory of the device."""
        from tiered_mem.hf.loading import default_model_class

        model = default_model_class(self._checkpoint).from_pretrained(
            self._checkpoint, dtype=self._dtype
        )
        return model.to(device)

    def ask(self, model: Any, *, stream: bool = False) -> _Answer:
        """Generate; `stream` prints prompt and words as they come."""
        import torch
        from transformers import TextStreamer

        clock = _Clock(TextStreamer(self._tokenizer, skip_prompt=True) if stream else None)
        if stream:
            print(self._prompt, end="", flush=True)
        torch.manual_seed(self._seed)
        whole = model.generate(
            input_ids=self._inputs["input_ids"].to(model.device),
            attention_mask=self._inputs["attention_mask"].to(model.device),
            streamer=clock,
            **self._options,
        )
        num_prompt_tokens = self._inputs["input_ids"].shape[1]
        tokens = whole[0, num_prompt_tokens:].tolist()
        first, last = clock.ticks[1] - clock.ticks[0], clock.ticks[-1] - clock.ticks[1]
        return _Answer(
            sequence=whole[0].tolist(),
            tokens=tokens,
            text=self._tokenizer.decode(tokens, skip_special_tokens=True),
            num_prompt_tokens=num_prompt_tokens,
            first_token_seconds=first,
            tokens_per_second=(len(tokens) - 1) / last if len(tokens) > 1 else None,
        )


@dataclass
class _Clock:
    """A streamer that notes when the prompt and each token came, and passes them on."""

    inner: Any = None
    ticks: list[float] = field(default_factory=list)

    def put(self, value: Any) -> None:
        self.ticks.append(time.perf_counter())
        if self.inner is not None:
            self.inner.put(value)

    def end(self) -> None:
        if self.inner is not None:
            self.inner.end()


def load_tokenizer(checkpoint: str) -> Any:
    from transformers import AutoTokenizer

    from tiered_mem.errors import CheckpointError
    from tiered_mem.hf.checkpoint import Checkpoint

    try:
        return AutoTokenizer.from_pretrained(checkpoint)
    except (OSError, ValueError) as error:
        Checkpoint.open(checkpoint).close()  # says it better if more than the tokenizer is missing
        raise CheckpointError(
            f"{checkpoint} has no tokenizer that can be loaded ({error}); put its tokenizer files "
            "there"
        ) from error


def quiet_transformers() -> None:
    """Its bars and remarks on generation options would run into the text."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _rows(
    answer: _Answer, stats: Any, report: dict[str, Any], budgets: Any, backend: Any
) -> list[list[str]]:
    from tiered_mem.config import format_size as size

    def share(count: int) -> str:
        return f"{count} ({100 * count / max(1, stats.num_accesses):.1f} %)"

    def percent(part: float | None) -> str:
        return "none was made" if part is None else f"{100 * part:.1f} %"

    rate = answer.tokens_per_second
    off = [str(layer) for layer, seen in report["layers"].items() if not seen["on"]]
    rows = [
        ["tokens/s", "only one token" if rate is None else f"{rate:.1f}"],
        [
            "first token",
            f"{answer.first_token_seconds:.2f} s, {answer.num_prompt_tokens} in prompt",
        ],
        ["HBM", f"{size(budgets.hbm)}{_what_plays_hbm(backend)}"],
        ["DRAM", size(budgets.dram)],
        ["hits in HBM", share(stats.num_hbm_hits)],
        ["on the way to it", share(stats.num_in_flight)],
        ["hits in DRAM", share(stats.num_dram_hits)],
        ["reads from NVMe", share(stats.num_nvme_reads)],
    ]
    for link, nbytes in stats.nbytes_moved.items():
        source, target = link.split("_to_")
        rows.append([f"{_TIERS[source]} to {_TIERS[target]}", size(nbytes)])
    rows += [
        ["stall", f"{stats.stall_seconds:.2f} s"],
        ["prefetch precision", percent(stats.prefetch_precision)],
        ["prefetch recall", percent(stats.prefetch_recall)],
    ]
    if off:
        rows.append(["prefetch is off", f"for layers where it doesn't pay: {', '.join(off)}"])
    if stats.num_failed or stats.num_repaired:
        rows.append(["failed, repaired", f"{stats.num_failed}, {stats.num_repaired}"])
    return rows


def _what_plays_hbm(backend: Any) -> str:
    if not backend.in_place:
        return f" of {backend.name}"
    if backend.name == "cpu":
        return "; host memory plays its part"
    return f" of the memory that {backend.name} shares with the CPU"


def _kv_report(pool: Any) -> dict[str, Any]:
    return {
        "hbm_nbytes": pool.budgets.hbm,
        "dram_nbytes": pool.budgets.dram,
        "num_restored_tokens": pool.num_restored_tokens,
        "num_damaged": pool.num_damaged,
        "stats": pool.stats().as_dict(),
    }


def _kv_rows(report: dict[str, Any]) -> list[list[str]]:
    from tiered_mem.config import format_size as size

    moved = report["stats"]["nbytes_moved"]
    rows = [
        ["KV in HBM", size(report["hbm_nbytes"])],
        ["KV in DRAM", size(report["dram_nbytes"])],
        ["KV from DRAM", size(moved["dram_to_hbm"])],
        ["KV from NVMe", size(moved["nvme_to_hbm"])],
    ]
    if report["num_restored_tokens"]:
        rows.append(["restored", f"{report['num_restored_tokens']} tokens, not computed again"])
    if report["num_damaged"]:
        rows.append(["damaged", f"{report['num_damaged']} stored blocks, computed again"])
    return rows


_TIERS = {"nvme": "NVMe", "dram": "DRAM", "hbm": "HBM"}
