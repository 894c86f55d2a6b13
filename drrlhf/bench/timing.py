"""Times of several implementations, in turns so that whatever the machine does meets them all."""

from __future__ import annotations

import contextlib
import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from drrlhf.bench.registry import Work

Clock = Callable[[Callable[[], object]], float]

SAMPLE_SECONDS = 2e-3  # shorter runs are repeated within a sample
MOST_CALLS = 50
FEWEST_ROUNDS = 3  # of an implementation that has used up its time


class Timing(NamedTuple):
    """Seconds of one run: median, interquartile range, and how many samples these are of."""

    median: float
    spread: float
    samples: int


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Without Python's cyclic collector, which would stop whom it happens to meet."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def summarise(samples: list[float]) -> Timing:
    """Median and interquartile range of the samples of one implementation."""
    if len(samples) < 2:
        return Timing(samples[0], 0.0, 1)
    low, median, high = statistics.quantiles(samples, n=4, method="inclusive")
    return Timing(median, high - low, len(samples))


def cpu_clock(run: Callable[[], object]) -> float:
    """Seconds of one call on the CPU."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def cuda_clock(run: Callable[[], object]) -> float:
    """Seconds of one call on the current CUDA stream, by its own events."""
    start = torch.cuda.Event(enable_timing=True)
    end = torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / 1e3


def clock_of(device: str) -> Clock:
    """The clock of a device type."""
    return cuda_clock if device == "cuda" else cpu_clock


def interleave(
    works: Mapping[str, Work],
    *,
    rounds: int,
    clock: Clock = cpu_clock,
    seconds: float = 10.0,
    drop: Callable[[str, Exception], None] | None = None,
    late: Callable[[], bool] = lambda: False,
) -> dict[str, list[float]]:
    """Seconds of one run of each implementation: {name: one sample for each of its rounds}.

    A round runs every implementation once, the first of one round being the last of the next; an
    untimed run of each comes before. Whoever has run for `seconds` leaves after `FEWEST_ROUNDS`
    rounds, so that slow ones do not keep the others waiting. An exception goes to `drop` with the
    name of whose it is, who leaves without a result; without `drop` it propagates. Once it is
    `late`, whoever has a sample has enough.
    """
    samples: dict[str, list[float]] = {}
    spent = dict.fromkeys(works, 0.0)
    calls: dict[str, int] = {}

    def attempt(name: str, what: Callable[[str], None]) -> None:
        try:
            what(name)
        except Exception as error:
            if drop is None:
                raise
            drop(name, error)
            samples.pop(name, None)

    def warm_up(name: str) -> None:
        took = _sample(works[name], clock, 1)
        calls[name] = min(MOST_CALLS, max(1, math.ceil(SAMPLE_SECONDS / max(took, 1e-9))))
        samples[name] = []

    def sample(name: str) -> None:
        took = _sample(works[name], clock, calls[name])
        spent[name] += took
        samples[name].append(took / calls[name])

    def active(name: str) -> bool:
        done = len(samples[name])
        if done and late():
            return False
        return done < rounds and (done < FEWEST_ROUNDS or spent[name] < seconds)

    with no_collection():
        for name in works:
            attempt(name, warm_up)
        turn = 0
        while names := [name for name in samples if active(name)]:
            first = turn % len(names)
            for name in names[first:] + names[:first]:
                attempt(name, sample)
            turn += 1
    return samples


def _sample(work: Work, clock: Clock, calls: int) -> float:
    total = 0.0
    for _ in range(calls):
        work.before()
        total += clock(work.run)
    return total
