"""A run within a budget of seconds: what is measured, and what is said of the rest."""

from __future__ import annotations

from functools import partial

import pytest
from contests import bench, case, contest

from drrlhf.bench import (
    registry,
    results,
    runner,
    timing,
)
from drrlhf.bench.budget import LEFT_OUT, Budget
from drrlhf.bench.registry import Work

# ---- a budget of seconds -----------------------------------------------------------------------


class Watch:
    """A clock that moves when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now

    def spends(self, seconds, value=1.0):
        def run():
            self.now += seconds
            return value

        return run


def test_a_case_is_not_begun_without_the_time_it_needs():
    watch = Watch()
    left = Budget(10.0, watch)
    built = []

    def build():
        built.append(1)
        return contest()

    watch.now = 6.0
    outcome = runner.run(case(build, seconds=5.0), "quick", budget=left)
    assert outcome.skipped == {"": LEFT_OUT} and not built
    assert runner.run(case(build, seconds=3.0), "quick", rounds=1, budget=left).records and built
    with pytest.raises(ValueError, match="seconds: expected a number > 0, got 0"):
        Budget(0.0)


def test_what_the_time_leaves_out_of_a_case_is_skipped_and_what_ran_is_kept():
    watch = Watch()
    outcome = runner.run(
        case(partial(contest, ours=watch.spends(6.0))), "quick", budget=Budget(5.0, watch)
    )
    assert outcome.skipped == dict.fromkeys(("plain", "peer"), LEFT_OUT)
    assert {r["contender"]: r["rounds"] for r in outcome.records} == {"drrlhf": 1}


def test_who_has_not_been_judged_is_not_timed():
    watch = Watch()
    outcome = runner.run(
        case(partial(contest, ours=lambda: 1.1, peer=watch.spends(9.0))),
        "quick",
        budget=Budget(5.0, lambda: watch.now + 6.0 * bool(watch.now)),
    )
    assert outcome.failures and not outcome.records
    spent = Budget(5.0, watch)
    watch.now += 6.0
    outcome = runner.run(case(contest, seconds=-10.0), "quick", budget=spent)
    assert set(outcome.skipped) == {"drrlhf", "plain", "peer"} and not outcome.records


def test_rounds_are_fewer_where_little_time_is_left():
    watch = Watch()
    left = Budget(100.0, watch)
    assert left.each(4, 10.0) == 2.5 and Budget().each(4, 10.0) == 10.0
    watch.now = 80.0
    assert left.each(4, 10.0) == pytest.approx(0.5)


def test_late_rounds_are_left_out():
    clock = iter([False, False, False, False, True, True, True, True, True])
    samples = timing.interleave(
        {name: Work(lambda: None) for name in "ab"},
        rounds=9,
        clock=lambda run: 1.0,
        late=lambda: next(clock, True),
    )
    assert {name: len(found) for name, found in samples.items()} == {"a": 3, "b": 3}


def test_the_most_valuable_cases_come_first():
    cases = registry.most_valuable_first(registry.select("gpu"))
    names = [f"{c.op}: {c}" for c in cases]
    assert names[0].startswith("trainer_step: step in one forward")

    def first(*parts):
        return next(i for i, name in enumerate(names) if all(part in name for part in parts))

    def last(*parts):
        return max(i for i, name in enumerate(names) if all(part in name for part in parts))

    heads_ = [
        first("linear_token_logprobs", metric, "bfloat16", shape, head)
        for metric, head in (("forward,", "frozen"), ("+backward,", "frozen"), ("+b", "trained"))
        for shape in ("8192×128256×4096", "16384×128256×2048")
    ]
    marks = [max(heads_), first("top-1"), first("policy_loss"), first("preference_loss")]
    assert marks == sorted(marks) and max(heads_) < 10
    assert last("policy_loss") < first("scaling") and first("scaling") > last("preference_loss")
    assert min(
        i for i, c in enumerate(cases) if c.op.endswith("logprobs") and "float32" in str(c)
    ) > last("scaling")
    assert len(cases) == len(registry.select("gpu"))


def test_the_command_keeps_to_its_seconds_and_lists_what_it_left_out(tmp_path, monkeypatch):
    whole = bench("--suite", "quick", "--rounds", 1, "--op", "robust_risk", "--output", tmp_path)
    assert whole.exit_code == 0
    (path,) = tmp_path.glob("*.json")
    before = results.read(path)
    run, given = runner.run, []

    def counted(case, suite, **options):
        given.append(case)
        if len(given) == 3:
            monkeypatch.setattr(Budget, "left", 0.0)
        return run(case, suite, **options)

    monkeypatch.setattr(runner, "run", counted)
    result = bench(
        "--suite",
        "quick",
        "--rounds",
        1,
        "--op",
        "robust_risk",
        "--output",
        tmp_path,
        "--seconds",
        100,
    )
    assert result.exit_code == 0, result.output
    assert f"Left out for want of time, {len(given) - 2} of {len(given)} cases" in result.output
    assert f"robust_risk, {given[-1]}" in " ".join(result.output.split())
    after = results.read(path)
    assert {r["metric"] for r in after["records"]} == {r["metric"] for r in before["records"]}
    assert not [e for e in after["skipped"] if e["reason"] == LEFT_OUT], "found by an earlier run"
    refused = bench("--suite", "quick", "--seconds", 0)
    assert refused.exit_code == 2 and "seconds: expected a number > 0" in refused.stderr


def test_the_result_file_is_whole_after_every_case(monkeypatch, tmp_path):
    run, seen = runner.run, []

    def looking(*arguments, **options):
        files = list(tmp_path.glob("*.json"))
        seen.append({r["metric"] for r in results.read(files[0])["records"]} if files else set())
        return run(*arguments, **options)

    monkeypatch.setattr(runner, "run", looking)
    bench("--suite", "quick", "--rounds", 1, "--op", "preference_loss", "--output", tmp_path)
    assert [len(found) for found in seen] == list(range(len(seen))) and len(seen) > 3
    assert not list(tmp_path.glob("*.tmp"))
