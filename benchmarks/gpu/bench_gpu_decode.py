"""Decode a model many times its HBM: tokens/s beside all-resident, accelerate and the bound.

Qwen3-30B-A3B's layers in random weights (see big_model.py), one token at a time, the experts of
each token forced from a recorded trace. HBM holds 10, 25 and 50 % of the experts and DRAM the rest;
then DRAM holds half and NVMe the rest; then all are resident. Each with no prefetch and with
`oracle(0.886,1)`: the published recall of this model's next-layer gates. All peers get the same
tokens and routes; medians of rounds are reported and every token's seconds kept.

The bound is the longer of computing (the unmodified model with all weights on the card) and moving
what was missed at the link's rate, measured in this run (see gpu_common.bound_seconds).

    python benchmarks/gpu/bench_gpu_decode.py --trace ROUTES.csv [--smoke] [--json FILE]
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import traceback
from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import gpu_common
import torch
from bars import bar, common, print_bars
from big_model import BigModel, add_arguments, big_model
from feeding import Feeder, host_syncs, layer_seconds
from forced_routes import Foresight, as_trace, load_trace, routes_of
from gpu_common import Links, bound_seconds
from gpu_peers import ACCELERATE, UNMODIFIED, accelerated, ours, release, resident_model

RECALL = 0.886  # of Qwen3-30B-A3B's next-layer gates, published by BigMoeOnEdge
BUDGETS = (10, 25, 50)  # % of the experts in HBM
RESIDENT = "ours, all resident"
_WATCHED = (1, 20)  # tokens after which logits are compared


class Plan(NamedTuple):
    """Tokens: before the clock starts, of a round, and to look at layers and host waits."""

    warmup: int
    round: int
    looks: int


class Setting(NamedTuple):
    """What ours runs with: shares of the experts in each tier, in %."""

    name: str
    hbm: int
    dram: int
    prefetch: bool


def _as_generate_does(model: Any) -> Any:
    """Return the context in which `generate` decodes: on a GPU it takes faster experts for it."""
    switch = getattr(model, "_optimize_model_for_decode", None)
    return switch() if switch is not None else nullcontext()


class Decode:
    """The model under measurement, and all that has been measured."""

    def __init__(self, options: argparse.Namespace, big: BigModel) -> None:
        ids = routes_of(load_trace(options.trace, smoke=options.smoke), big.shape)
        self.options, self.big, self.device = options, big, options.device
        self.feeder = Feeder(ids, big.shape.vocab, self.device)
        trace = as_trace(ids, big.shape.num_experts, big.block_nbytes)
        self.foresight = Foresight(trace, self.feeder.routes, RECALL)
        self.links = Links(self.device, big.block_nbytes, big.store_file, smoke=options.smoke)
        self.runs: list[dict[str, Any]] = []
        self.failures: dict[str, str] = {}
        self.expected: dict[int, torch.Tensor] = {}
        self.model: Any = None

    def run(self, name: str, work: Callable[[], dict[str, Any]]) -> None:
        """Measure one peer; a failure is kept and said, and the next peer starts afresh."""
        try:
            self.runs.append({"name": name} | work())
        except Exception as error:
            traceback.print_exc()
            self.failures[name] = repr(error)
            self.close()
        self.write()

    def unmodified(self) -> dict[str, Any]:
        self.model = resident_model(self.big, self.device)
        run = self._measure(self._plan())
        self.close()
        return run

    def accelerate(self) -> dict[str, Any]:
        self.close()
        self.model = accelerated(self.big, self.device)
        run = self._measure(Plan(warmup=1, round=1, looks=0))
        self.close()
        return run

    def ours(self, setting: Setting) -> dict[str, Any]:
        hbm, dram = (s * self.big.shape.experts_nbytes // 100 for s in (setting.hbm, setting.dram))
        if self.model is None:
            self.model = ours(self.big, self.device, hbm=hbm, dram=dram, prefetch=self.foresight)
        else:
            self.model.tiered_mem.runtime.resize(hbm=hbm, dram=dram)
        self.foresight.on = setting.prefetch
        self.model.tiered_mem.fill()
        self.links.measure()
        return setting._asdict() | self._measure(self._plan(slow=setting.dram < 100))

    def _plan(self, *, slow: bool = False) -> Plan:
        num_rounds, total = self.options.rounds, self.feeder.routes.num_tokens
        looks = 1 if self.options.smoke else 4
        length = (total - 2 * looks) // (num_rounds + 2)  # two rounds' worth to warm up
        length = min(length, 2 if self.options.smoke else 6 if slow else length)
        return Plan(2 * length, length, looks)

    def _measure(self, plan: Plan) -> dict[str, Any]:
        model, feeder = self.model, self.feeder
        handle = getattr(model, "tiered_mem", None)
        with ExitStack() as undo:
            for hook in feeder.routes.force(model):
                undo.callback(hook.remove)
            undo.enter_context(_as_generate_does(model))
            feeder.start(model)
            run: dict[str, Any] = {"warmup_seconds": feeder.seconds(model, plan.warmup)}
            run["rounds"] = []
            for _ in range(self.options.rounds):
                before = handle.stats() if handle else None
                measured: dict[str, Any] = {"seconds": feeder.seconds(model, plan.round)}
                if handle is not None:
                    measured["stats"] = (handle.stats() - before).as_dict()
                run["rounds"].append(measured)
            if plan.looks:
                run["layer_seconds"] = layer_seconds(feeder, model, plan.looks)
                run["host_syncs_per_token"] = host_syncs(feeder, model, plan.looks)
            run |= self._compare_logits()
        rates = [len(r["seconds"]) / sum(r["seconds"]) for r in run["rounds"]]
        run["tokens_per_second"] = statistics.median(rates)
        if handle is not None:
            run["prefetch_report"] = handle.prefetch_report()["layers"]
        return run

    def _compare_logits(self) -> dict[str, Any]:
        """Feed the first tokens again and compare with the unmodified model, which comes first."""
        watched = _WATCHED[:1] if self.options.smoke else _WATCHED
        if not hasattr(self.model, "tiered_mem") and self.expected:
            watched = _WATCHED[:1]  # accelerate takes seconds a token
        self.feeder.start(self.model)
        found = {}
        for token in range(watched[-1] + 1):
            logits = self.feeder.step(self.model)
            if token in watched:
                found[token] = logits.float().cpu()
        self.expected = self.expected or found
        differences = [
            float((found[token] - self.expected[token]).abs().max())
            for token in watched
            if token in self.expected
        ]
        return {"max_abs_dlogit": max(differences, default=None)}

    def close(self) -> None:
        """Let go of the model, whatever state it is in."""
        model, self.model = self.model, None
        if model is not None and hasattr(model, "tiered_mem"):
            model.tiered_mem.close()
        del model
        gc.collect()
        release(self.device)

    # --- what came of it ---

    def write(self) -> dict[str, Any]:
        """Write all that there is so far: a run that is cut off keeps what it had measured."""
        summary = self._summary()
        results = gpu_common.describe(self.options) | {
            "model": self.big.as_dict(),
            "settings": {
                "trace": str(self.options.trace.name) if self.options.trace else "made up",
                "rounds": self.options.rounds,
                "recall": RECALL,
                "weights_of_routes": "uniform",
            },
            "links": self.links.as_dict() if self.links.samples["nvme"] else None,
            "bars": _bars(summary),
            "summary": summary,
            "failures": self.failures,
            "runs": self.runs,
        }
        gpu_common.write(self.options, results)
        return results

    def _summary(self) -> dict[str, dict[str, Any]]:
        speeds = {run["name"]: run["tokens_per_second"] for run in self.runs}
        layers = {run["name"]: run.get("layer_seconds") for run in self.runs}
        summary: dict[str, dict[str, Any]] = {}
        for run in self.runs:
            row: dict[str, Any] = {"tokens_per_second": run["tokens_per_second"]}
            for peer, key in ((UNMODIFIED, "of_unmodified"), (ACCELERATE, "times_accelerate")):
                if peer in speeds:
                    row[key] = run["tokens_per_second"] / speeds[peer]
            if "hbm" in run and UNMODIFIED in speeds:
                row |= self._against_bound(run, 1 / speeds[UNMODIFIED])
            if run.get("layer_seconds") and layers.get(UNMODIFIED):
                pairs = zip(run["layer_seconds"], layers[UNMODIFIED], strict=True)
                waits = [max(0.0, 1e3 * (took - least)) for took, least in pairs]
                row["layer_stall_ms"] = {"median": statistics.median(waits), "most": max(waits)}
            row["host_syncs_per_token"] = run.get("host_syncs_per_token")
            row["max_abs_dlogit"] = run["max_abs_dlogit"]
            summary[run["name"]] = row
        return summary

    def _against_bound(self, run: dict[str, Any], compute_seconds: float) -> dict[str, Any]:
        shares, missed, hits = [], [], []
        for measured in run["rounds"]:
            num_tokens, stats = len(measured["seconds"]), measured["stats"]
            least, nbytes = bound_seconds(
                stats, self.big.block_nbytes, compute_seconds * num_tokens, self.links
            )
            shares.append(least / sum(measured["seconds"]))
            missed.append(sum(nbytes.values()) / num_tokens / 1e6)
            hits.append(stats["hit_rate"])
        return {
            "of_bound": statistics.median(shares),
            "missed_mb_per_token": statistics.median(missed),
            "hit_rate": statistics.median(hits),
        }


def _bars(summary: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    lines = []
    for name, row in summary.items():
        if name == RESIDENT and "of_unmodified" in row:
            lines.append(bar(f"decode, {name}, of the unmodified", row["of_unmodified"], 0.97))
        elif "of_bound" in row:
            lines.append(bar(f"decode, {name}, of the bound", row["of_bound"], 0.9))
            if "times_accelerate" in row:
                what = f"decode, {name}, times accelerate"
                lines.append(bar(what, row["times_accelerate"], 10))
    return lines


def _settings() -> list[Setting]:
    """Return what ours runs with, by growing HBM; the one that needs NVMe shrinks DRAM, last."""
    settings = []
    for hbm, dram in [*((share, 100) for share in BUDGETS), (25, 50)]:
        rest = "DRAM" if dram == 100 else f"DRAM {dram} %, NVMe"
        for prefetch in (True, False):
            how = f"oracle({RECALL},1)" if prefetch else "none"
            settings.append(Setting(f"HBM {hbm} %, {rest}, {how}", hbm, dram, prefetch))
    settings.insert(2 * len(BUDGETS), Setting(RESIDENT, 100, 100, False))
    return settings


def main() -> None:
    options = _options()
    big = big_model(options)
    decode = Decode(options, big)
    decode.run(UNMODIFIED, decode.unmodified)
    for setting in _settings():
        decode.run(setting.name, lambda setting=setting: decode.ours(setting))
    decode.run(ACCELERATE, decode.accelerate)
    results = decode.write()
    _print(results)
    if decode.failures:
        sys.exit(f"failed: {', '.join(decode.failures)}")


def _options() -> argparse.Namespace:
    parser = gpu_common.parser(__doc__.splitlines()[0], "decode")
    parser.add_argument("--trace", type=Path, help="expert routes: a CSV or npz of 128 experts")
    add_arguments(parser)
    parser.add_argument("--rounds", type=int, default=5, help="medians are over so many")
    return gpu_common.parse(parser)


def _print(results: dict[str, Any]) -> None:
    columns = {
        "tokens_per_second": "tok/s",
        "of_bound": "of bound",
        "of_unmodified": "of unmodified",
        "times_accelerate": "x accelerate",
        "hit_rate": "hits",
        "missed_mb_per_token": "missed MB/tok",
        "host_syncs_per_token": "syncs/tok",
        "max_abs_dlogit": "|dlogit|",
    }
    rows = [
        [name, *("" if row.get(key) is None else row[key] for key in columns)]
        for name, row in results["summary"].items()
    ]
    common.print_table(rows, ["peer", *columns.values()])
    print_bars(results)


if __name__ == "__main__":
    main()
