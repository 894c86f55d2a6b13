"""From a case to its records: gate first, then times side by side, then peak memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from drrlhf import backends
from drrlhf.bench import memory, profile, timing
from drrlhf.bench.budget import LEFT_OUT, Budget
from drrlhf.bench.gate import Verdict
from drrlhf.bench.peers import reason
from drrlhf.bench.registry import SUITES, Case, Contest, Unavailable, Work

DEFAULT_ROUNDS = 15
_PER_SECOND = {"ms": 1e3, "us": 1e6}

Record = dict[str, Any]


@dataclass
class Outcome:
    """What one case gave.

    records: one for each contender that ran. skipped: name -> why it did not ("" names the whole
    case). verdicts: what the gate said of ours. profiles: contender -> where its time went.
    """

    case: Case
    records: list[Record] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    profiles: dict[str, profile.Profile] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """What our contenders got wrong, one line for each quantity."""
        return [f"{n}: {v}" for n, all_ in self.verdicts.items() for v in all_ if not v.ok]


def run(
    case: Case,
    suite: str,
    *,
    rounds: int = DEFAULT_ROUNDS,
    seconds: float = 10.0,
    budget: Budget | None = None,
) -> Outcome:
    """Gate, time and meter one case; a failed gate leaves its outcome without records.

    rounds, seconds: as in `timing.interleave`. budget: of the whole run, of which this is a case;
    what it leaves no time for is skipped with that reason.
    """
    budget = Budget() if budget is None else budget
    outcome = Outcome(case)
    if budget.left < case.seconds:
        outcome.skipped = {"": LEFT_OUT}
        return outcome
    gc.collect(1)  # what an earlier case left in cycles; the oldest generation takes too long
    device = SUITES[suite]
    with _threads(case.threads):
        try:
            if (case.memory or case.unit == "MiB") and (obstacle := memory.obstacle(device)):
                outcome.skipped["peak memory"] = obstacle
                if case.unit == "MiB":
                    raise Unavailable(obstacle)
            contest = case.build()
        except Unavailable as absent:
            outcome.skipped = {"": str(absent)}
            return outcome
        works = _prepare(contest, outcome, budget)
        if contest.ours and not any(name in works for name in contest.ours):
            return outcome
        errors = _gate(case, contest, works, outcome, budget)
        if not outcome.failures:
            measure = _meter
            if case.unit != "MiB":
                each = budget.each(len(works), seconds)
                measure = partial(_time, rounds=rounds, seconds=each)
            outcome.records = measure(case, contest, works, device, outcome, budget)
            for record in outcome.records:
                furthest = errors.get(record["contender"])
                record["rms_error"] = None if furthest is None else furthest.rms
                record["allowed_error"] = None if furthest is None else furthest.allowed_rms
            for name in contest.profiled:
                if name in works and not budget.spent:
                    try:
                        outcome.profiles[name] = profile.of(works[name], device)
                    except Exception as error:  # must not cost the times that there are
                        outcome.skipped[f"profile of {name}"] = reason(error)
    return outcome


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        if count is not None:
            torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


def _leave(
    name: str, error: Exception, contest: Contest, works: dict[str, Work], outcome: Outcome
) -> None:
    """A contender leaves with its reason; an exception of ours is a defect, and propagates."""
    if name in contest.ours and not isinstance(error, Unavailable):
        raise error
    outcome.skipped[name] = reason(error)
    works.pop(name, None)


def _prepare(contest: Contest, outcome: Outcome, budget: Budget) -> dict[str, Work]:
    works: dict[str, Work] = {}
    for name, make in contest.contenders.items():
        try:
            _in_time(budget)
            works[name] = make()
        except Exception as error:
            _leave(name, error, contest, works, outcome)
    return works


def _in_time(budget: Budget) -> None:
    if budget.spent:
        raise Unavailable(LEFT_OUT)


def _gate(
    case: Case, contest: Contest, works: dict[str, Work], outcome: Outcome, budget: Budget
) -> dict[str, Verdict]:
    """The largest relative RMS error of each contender; our verdicts go into `outcome`.

    Where only memory is metered, others are not judged: one run of them may take a minute.
    """
    errors: dict[str, Verdict] = {}
    for name, gate in (contest.gates or {}).items():
        ours = name in contest.ours
        if name not in works or (case.unit == "MiB" and not ours):
            continue
        work = works[name]
        try:
            _in_time(budget)  # whoever has not been judged is not timed
            work.once()
            assert work.outputs is not None, f"{case}: {name} has a gate but shows no outputs"
            verdicts = gate.judge(work.outputs())
        except Exception as error:
            _leave(name, error, contest, works, outcome)
            continue
        errors[name] = max(verdicts, key=lambda verdict: verdict.rms)
        if ours:
            outcome.verdicts[name] = verdicts
    return errors


def _time(
    case: Case,
    contest: Contest,
    works: dict[str, Work],
    device: str,
    outcome: Outcome,
    budget: Budget,
    *,
    rounds: int,
    seconds: float,
) -> list[Record]:
    def drop(name: str, error: Exception) -> None:
        _leave(name, error, contest, works, outcome)

    samples = timing.interleave(
        dict(works),
        rounds=rounds,
        seconds=seconds,
        clock=timing.clock_of(device),
        drop=drop,
        late=lambda: budget.spent,
    )
    times = {name: timing.summarise(found) for name, found in samples.items()}
    baseline = min(
        (name for name in contest.baseline if name in times),
        key=lambda name: times[name].median,
        default=None,
    )
    records = []
    scale = _PER_SECOND[case.unit]
    for name in (name for name in contest.contenders if name in times):
        took = times[name]
        record = _record(case, contest, name, device, took.median * scale)
        record |= {"spread": took.spread * scale, "rounds": took.samples}
        if baseline is not None:
            _compare(record, baseline, times[baseline].median * scale)
        for column, amount, unit in (
            ("gbps", case.bytes, 1e9),
            ("tflops", case.flops, 1e12),
            ("tokens_per_s", case.tokens, 1),
        ):
            if amount is not None:
                record[column] = amount / took.median / unit
        if case.memory and "peak memory" not in outcome.skipped and not budget.spent:
            record["peak_mib"] = _peak(works[name], device)
        records.append(record)
    return records


def _meter(
    case: Case,
    contest: Contest,
    works: dict[str, Work],
    device: str,
    outcome: Outcome,
    budget: Budget,
) -> list[Record]:
    records = []
    for name, work in list(works.items()):
        try:
            _in_time(budget)
            work.once()  # what a library allocates in its first run and keeps is not this run's
            peak = _peak(work, device)
        except Exception as error:
            _leave(name, error, contest, works, outcome)
            continue
        record = _record(case, contest, name, device, peak) | {"peak_mib": peak}
        if contest.formula is not None:
            _compare(record, *contest.formula)
        records.append(record)
    return records


def _peak(work: Work, device: str) -> float:
    """MiB that one run holds at most beyond what its inputs hold."""
    if work.before is not None:
        work.before()
    return memory.peak_extra_bytes(work.run, device) / memory.MIB


def _record(case: Case, contest: Contest, name: str, device: str, value: float) -> Record:
    return {
        "op": case.op,
        "backend": contest.named.get(name)
        or (_backend(case, device) if name in contest.ours else name),
        "contender": name,
        "dtype": case.dtype,
        "shape": list(case.shape),
        "head": case.head,
        "metric": case.metric,
        "axis": case.axis,
        "note": case.note,
        "threads": torch.get_num_threads() if device == "cpu" else None,
        "value": value,
        "unit": case.unit,
        "baseline": None,
        "baseline_value": None,
        "ratio": None,
    }


def _compare(record: Record, baseline: str, value: float) -> None:
    record |= {"baseline": baseline, "baseline_value": value, "ratio": record["value"] / value}


def _backend(case: Case, device: str) -> str:
    """The backend of ours that serves the case on `device`; all of them, where its parts differ."""
    ops = case.kernels or (case.op,)
    names = {
        row.backend
        for row in backends.explain()
        if row.chosen and row.device == device and row.op.startswith(ops)
    }
    return "+".join(sorted(names)) or "reference"
