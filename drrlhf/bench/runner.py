"""From a case to its records: gate first, then times side by side, then peak memory."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from drrlhf import backends
from drrlhf.bench import memory, profile, timing
from drrlhf.bench.budget import LEFT_OUT, Budget
from drrlhf.bench.gate import Verdict
from drrlhf.bench.peers import reason
from drrlhf.bench.registry import SUITES, Case, Contest, Unavailable, Work
from drrlhf.threads import threads

DEFAULT_ROUNDS = 15
_PER_SECOND = {"ms": 1e3, "us": 1e6}

Record = dict[str, Any]


@dataclass
class Outcome:
    """What one case gave.

    records: one for each implementation that ran. skipped: name -> why it did not ("" names the
    whole case). verdicts: what the gate said of ours. profiles: name -> where its time went.
    """

    case: Case
    records: list[Record] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    verdicts: dict[str, list[Verdict]] = field(default_factory=dict)
    profiles: dict[str, profile.Profile] = field(default_factory=dict)

    @property
    def failures(self) -> list[str]:
        """What our implementations got wrong, one line for each quantity."""
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
    with threads(case.threads):
        try:
            if (case.memory or case.unit == "MiB") and (obstacle := memory.obstacle(device)):
                outcome.skipped["peak memory"] = obstacle
                if case.unit == "MiB":
                    raise Unavailable(obstacle)
            contest = case.build()
        except Unavailable as absent:
            outcome.skipped = {"": str(absent)}
            return outcome
        _Running(case, contest, outcome, device, budget).measure(rounds, seconds)
    return outcome


@dataclass
class _Running:
    """A case whose contest has begun; `works` are those who are still in it."""

    case: Case
    contest: Contest
    outcome: Outcome
    device: str
    budget: Budget
    works: dict[str, Work] = field(default_factory=dict)

    def measure(self, rounds: int, seconds: float) -> None:
        self.prepare()
        if self.contest.ours and not any(name in self.works for name in self.contest.ours):
            return
        errors = self.gate()
        if self.outcome.failures:
            return
        if self.case.unit == "MiB":
            self.outcome.records = self.meter()
        else:
            self.outcome.records = self.time(rounds, self.budget.each(len(self.works), seconds))
        for record in self.outcome.records:
            furthest = errors.get(record["contender"])
            record["rms_error"] = None if furthest is None else furthest.rms
            record["allowed_error"] = None if furthest is None else furthest.allowed_rms
        for name in self.contest.profiled:
            if name in self.works and not self.budget.spent:
                try:
                    self.outcome.profiles[name] = profile.of(self.works[name], self.device)
                except Exception as error:  # must not cost the times that there are
                    self.outcome.skipped[f"profile of {name}"] = reason(error)

    def leave(self, name: str, error: Exception) -> None:
        """An implementation leaves with its reason; an exception of ours is a defect: raised."""
        if name in self.contest.ours and not isinstance(error, Unavailable):
            raise error
        self.outcome.skipped[name] = reason(error)
        self.works.pop(name, None)

    @contextlib.contextmanager
    def turn_of(self, name: str) -> Iterator[None]:
        """What one implementation does by itself: it leaves if that raises."""
        try:
            yield
        except Exception as error:
            self.leave(name, error)

    def in_time(self) -> None:
        if self.budget.spent:
            raise Unavailable(LEFT_OUT)

    def prepare(self) -> None:
        for name, make in self.contest.implementations.items():
            with self.turn_of(name):
                self.in_time()
                self.works[name] = make()

    def gate(self) -> dict[str, Verdict]:
        """The largest relative RMS error of each implementation; our verdicts go into the outcome.

        Where only memory is metered, others are not judged: one run of them may take a minute.
        """
        errors: dict[str, Verdict] = {}
        for name, gate in (self.contest.gates or {}).items():
            ours = name in self.contest.ours
            if name not in self.works or (self.case.unit == "MiB" and not ours):
                continue
            with self.turn_of(name):
                self.in_time()  # whoever has not been judged is not timed
                verdicts = gate.judge(self.works[name].result())
                errors[name] = max(verdicts, key=lambda verdict: verdict.rms)
                if ours:
                    self.outcome.verdicts[name] = verdicts
        return errors

    def time(self, rounds: int, seconds: float) -> list[Record]:
        case = self.case
        samples = timing.interleave(
            dict(self.works),
            rounds=rounds,
            seconds=seconds,
            clock=timing.clock_of(self.device),
            drop=self.leave,
            late=lambda: self.budget.spent,
        )
        times = {name: timing.summarise(found) for name, found in samples.items()}
        baseline = min(
            (name for name in self.contest.baseline if name in times),
            key=lambda name: times[name].median,
            default=None,
        )
        records = []
        scale = _PER_SECOND[case.unit]
        for name in (name for name in self.contest.implementations if name in times):
            took = times[name]
            record = self.record(name, took.median * scale)
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
            metered = case.memory and "peak memory" not in self.outcome.skipped
            if metered and not self.budget.spent:
                record["peak_mib"] = _peak(self.works[name], self.device)
            records.append(record)
        return records

    def meter(self) -> list[Record]:
        records = []
        for name, work in list(self.works.items()):
            with self.turn_of(name):
                self.in_time()
                work.once()  # what a library allocates in its first run and keeps is not this run's
                peak = _peak(work, self.device)
                record = self.record(name, peak) | {"peak_mib": peak}
                if self.contest.formula is not None:
                    _compare(record, *self.contest.formula)
                records.append(record)
        return records

    def record(self, name: str, value: float) -> Record:
        case = self.case
        served_by = _backend(case, self.device) if name in self.contest.ours else name
        return {
            "op": case.op,
            "backend": self.contest.named.get(name) or served_by,
            "contender": name,
            "dtype": case.dtype,
            "shape": list(case.shape),
            "head": case.head,
            "metric": case.metric,
            "axis": case.axis,
            "note": case.note,
            "threads": torch.get_num_threads() if self.device == "cpu" else None,
            "value": value,
            "unit": case.unit,
            "baseline": None,
            "baseline_value": None,
            "ratio": None,
        }


def _peak(work: Work, device: str) -> float:
    """MiB that one run holds at most beyond what its inputs hold."""
    work.before()
    return memory.peak_extra_bytes(work.run, device) / memory.MIB


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
