"""The comparison: every eviction policy with every predictor at every budget, over traces.

`plan` checks all that was asked for before anything runs; `Comparison.run` simulates, on several
processes, and returns the results that `tiered_mem.report` makes files of.
"""

from __future__ import annotations

import multiprocessing
import os
import platform
import signal
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

import tiered_mem
from tiered_mem.bounds import bounds
from tiered_mem.catalogue import ALIGNMENT, round_up
from tiered_mem.config import Size, format_size, parse_size
from tiered_mem.errors import ConfigError, TieredMemError
from tiered_mem.policies.prefetch import BUILT_INS, Oracle
from tiered_mem.simulate import Machine, require_predictor, resolve_simulated, simulate
from tiered_mem.trace import Trace
from tiered_mem.trace_info import examine

FORMAT = "tiered-mem comparison 1"
"""`results["format"]`: what a results.json is known by."""
AUTO = "auto"
"""Instead of predictors: none, and all built-in ones that the trace can drive."""

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Place:
    """Where policies are compared: a trace, and tiers of so many bytes. `hbm` is as written."""

    path: Path
    trace: str
    hbm: str
    hbm_nbytes: int
    dram_nbytes: int
    machine: Machine


@dataclass(frozen=True)
class Job:
    """A run at a place; without a policy, the bounds there."""

    place: Place
    eviction: str = ""
    prefetch: str = ""

    def __str__(self) -> str:
        where = f"trace {self.place.trace}, hbm {self.place.hbm}"
        if not self.eviction:
            return f"the bounds of {where}"
        return f"{where}, eviction {self.eviction}, prefetch {self.prefetch}"


@dataclass(frozen=True)
class Comparison:
    """What is to be run. Nothing has been yet, but all of it can be."""

    traces: tuple[dict[str, Any], ...]
    jobs: tuple[Job, ...]
    machine: Machine

    def run(self, *, num_processes: int = 0, progress: Progress | None = None) -> dict[str, Any]:
        """Run everything and return the results, a document for JSON.

        `num_processes` is 0 for one a core. `progress` gets (jobs done, jobs in all). Raises what
        a run raises, naming the run; nothing else goes on then.
        """
        answers: dict[Job, dict[str, Any]] = {}
        # Closed, so that an interrupt here ends the processes too.
        with closing(_answers(self.jobs, num_processes or num_cores())) as coming:
            for job, answer in coming:
                answers[job] = answer
                if progress is not None:
                    progress(len(answers), len(self.jobs))
        limits = {job.place: answers[job] for job in self.jobs if not job.eviction}
        runs = [
            answers[job] | _describe_job(job) | {"bounds": limits[job.place]}
            for job in self.jobs
            if job.eviction
        ]
        return {
            "format": FORMAT,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "version": tiered_mem.__version__,
            "machine": _describe_machine(),
            "links": {
                "nvme": asdict(self.machine.nvme),
                "hbm": asdict(self.machine.hbm),
                "compute": {"bytes_per_second": self.machine.compute},
            },
            "traces": list(self.traces),
            "runs": runs,
        }


def plan(
    paths: Sequence[Path],
    *,
    eviction: Sequence[str],
    prefetch: Sequence[str],
    hbm: Sequence[Size],
    dram: Size = 0,
    machine: Machine,
) -> Comparison:
    """Read the traces and lay out the runs.

    Args:
        paths: trace files.
        eviction: policies, as "lru" or "per-layer(lfu)".
        prefetch: predictors, as "none" or "oracle(0.8,2)"; or `AUTO` among them.
        hbm: budgets; a share is of the bytes of the trace's blocks (`Trace.total_nbytes`).
        dram: the budget of the second tier in all runs.
        machine: the links' and the device's speed.

    Raises:
        ConfigError: something that can't be run, such as an unknown policy, or a predictor that
            needs what a trace doesn't hold.
        TraceError: a file is not a trace.
    """
    for what, values in (("trace", paths), ("eviction", eviction), ("hbm", hbm)):
        if not values:
            raise ConfigError(f"nothing to compare: name at least one {what}")
    names = _name_traces(paths)
    traces, jobs = [], []
    for path, name in names.items():
        trace = Trace.load(path)
        chosen = _choose_predictors(trace, prefetch)
        for predictor in chosen:
            _check_predictor(trace, predictor)
        dram_nbytes = parse_size(dram, whole=trace.total_nbytes)
        for policy in dict.fromkeys(eviction):
            resolve_simulated(trace, policy, dram_nbytes)
        for text, nbytes in _budgets(trace, hbm).items():
            place = Place(path, name, text, nbytes, dram_nbytes, machine)
            jobs.append(Job(place))
            jobs += [Job(place, e, p) for p in chosen for e in dict.fromkeys(eviction)]
        traces.append(
            {
                "name": name,
                "path": str(path),
                "nbytes": trace.total_nbytes,
                "info": examine(trace).as_dict(),
            }
        )
    return Comparison(tuple(traces), tuple(jobs), machine)


def num_cores() -> int:
    """Return how many processes can run at once here."""
    return len(os.sched_getaffinity(0))


def _name_traces(paths: Sequence[Path]) -> dict[Path, str]:
    """Return the distinct files with a name for each: the file's own, or its path among equals."""
    distinct = {path.resolve(): path for path in paths}
    stems = [path.stem for path in distinct.values()]
    return {
        path: path.stem if stems.count(path.stem) == 1 else str(path) for path in distinct.values()
    }


def _budgets(trace: Trace, sizes: Sequence[Size]) -> dict[str, int]:
    """Return the distinct budgets with what they were written as. Raises `ConfigError`."""
    budgets: dict[int, str] = {}
    largest = round_up(int(trace.blocks[1].max()), ALIGNMENT)  # what its slot takes
    for size in sizes:
        nbytes = parse_size(size, whole=trace.total_nbytes)
        if nbytes < largest:
            raise ConfigError(
                f"hbm={size} is {format_size(nbytes)} for {trace.name}, less than the slot of "
                f"its largest block, {format_size(largest)}: give a larger budget"
            )
        budgets.setdefault(nbytes, str(size))
    return {text: nbytes for nbytes, text in budgets.items()}


def _choose_predictors(trace: Trace, wanted: Sequence[str]) -> list[str]:
    chosen: list[str] = []
    for name in wanted:
        chosen += _drivable(trace) if name == AUTO else [name]
    return list(dict.fromkeys(chosen or ["none"]))


def _drivable(trace: Trace) -> list[str]:
    built_ins = (name for name, kind in BUILT_INS.items() if not kind.simulator_only)
    return [name for name in built_ins if _can_drive(trace, name)]


def _can_drive(trace: Trace, predictor: str) -> bool:
    try:
        _check_predictor(trace, predictor)
    except ConfigError:
        return False
    return True


def _check_predictor(trace: Trace, spec: str) -> None:
    predictor = require_predictor(trace, spec)
    if isinstance(predictor, Oracle):
        predictor.foresee(trace.reads)  # refuses to look further than the layers go


# --- running ---


def _answers(
    jobs: Sequence[Job], num_processes: int
) -> Generator[tuple[Job, dict[str, Any]], None, None]:
    """Yield each job and its answer, as they come."""
    if num_processes == 1:
        for job in jobs:
            with _naming(job):
                yield job, _work(job)
        return
    with _pool(min(num_processes, len(jobs))) as pool:
        futures: dict[Future[dict[str, Any]], Job] = {pool.submit(_work, job): job for job in jobs}
        for future in as_completed(futures):
            with _naming(futures[future]):
                yield futures[future], future.result()


@contextmanager
def _pool(num_processes: int) -> Iterator[ProcessPoolExecutor]:
    """A pool whose processes end at once when the body fails, interrupts included."""
    others = set(multiprocessing.active_children())
    # Forked, a child would hold locks of threads that it doesn't have.
    spawning = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(num_processes, spawning, _leave_interrupts_to_the_parent)
    # Each call may start a process. They inherit what is blocked: an interrupt on their way up is
    # the parent's too.
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    for _ in range(num_processes):
        pool.submit(time.sleep, 0.01)
    signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
    try:
        yield pool
    except BaseException:
        for child in set(multiprocessing.active_children()) - others:
            child.terminate()
        raise
    finally:
        pool.shutdown(cancel_futures=True)


def _leave_interrupts_to_the_parent() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)


@contextmanager
def _naming(job: Job) -> Iterator[None]:
    """Let errors say which run they are of."""
    try:
        yield
    except BrokenProcessPool as error:
        raise TieredMemError(
            f"a process died at or beside {job}: if memory ran out, use fewer processes (-j)"
        ) from error
    except TieredMemError as error:
        raise type(error)(f"{job}: {error}") from error
    except Exception as error:
        error.add_note(f"in the run of {job}")
        raise


def _work(job: Job) -> dict[str, Any]:
    place, trace = job.place, _load(job.place.path)
    if not job.eviction:
        return bounds(
            trace, hbm=place.hbm_nbytes, machine=place.machine, dram=place.dram_nbytes
        ).as_dict()
    return simulate(
        trace,
        hbm=place.hbm_nbytes,
        dram=place.dram_nbytes,
        eviction=job.eviction,
        prefetch=job.prefetch,
        machine=place.machine,
    ).as_dict()


def _load(path: Path) -> Trace:
    # Jobs come trace by trace. A file that was replaced since is another one.
    return _load_as_of(path, path.stat().st_mtime_ns)


@lru_cache(maxsize=1)
def _load_as_of(path: Path, mtime_ns: int) -> Trace:
    return Trace.load(path)


# --- what the results say beside the runs ---


def _describe_job(job: Job) -> dict[str, Any]:
    place = job.place
    return {
        "trace": place.trace,
        "eviction": job.eviction,
        "prefetch": job.prefetch,
        "hbm": place.hbm,
        "hbm_nbytes": place.hbm_nbytes,
        "dram_nbytes": place.dram_nbytes,
    }


def _describe_machine() -> dict[str, Any]:
    """The machine that simulated: it has no part in the figures."""
    return {
        "processor": _processor(),
        "cores": num_cores(),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()
