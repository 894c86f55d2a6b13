"""How cases are gated, run and timed, and what memory they take."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from contests import case, contest

from drrlhf.bench import (
    heads,
    memory,
    runner,
    timing,
)
from drrlhf.bench.gate import judge
from drrlhf.bench.registry import Unavailable, Work

# ---- gate and runner ---------------------------------------------------------------------------


def test_a_peer_that_raises_is_listed_with_its_reason():
    def boom():
        raise RuntimeError("no kernel\nfor this")

    outcome = runner.run(case(partial(contest, peer=boom)), "quick", rounds=2)
    assert outcome.skipped == {"peer": "RuntimeError: no kernel"}
    assert [r["contender"] for r in outcome.records] == ["drrlhf", "plain"]
    with pytest.raises(RuntimeError):
        runner.run(case(partial(contest, ours=boom)), "quick", rounds=2)


def test_a_peer_that_raises_later_leaves_without_a_result():
    calls = []

    def tiring():
        calls.append(1)
        if len(calls) > 3:
            raise MemoryError("tired")
        return 1.0

    outcome = runner.run(case(partial(contest, peer=tiring)), "quick", rounds=5)
    assert outcome.skipped == {"peer": "MemoryError: tired"}
    assert "peer" not in [r["contender"] for r in outcome.records]


def test_a_wrong_peer_is_timed_with_its_error_and_wrong_ours_is_not_timed():
    outcome = runner.run(case(partial(contest, peer=lambda: 1.1)), "quick", rounds=2)
    errors = {r["contender"]: r["rms_error"] for r in outcome.records}
    assert errors["peer"] == pytest.approx(0.1) and errors["drrlhf"] == 0
    outcome = runner.run(case(partial(contest, ours=lambda: 1.1)), "quick", rounds=2)
    assert outcome.failures and not outcome.records


def test_a_case_that_cannot_be_built_is_skipped_with_its_reason():
    def build():
        raise Unavailable("no model: not cached")

    outcome = runner.run(case(build), "quick")
    assert outcome.skipped == {"": "no model: not cached"} and not outcome.records


def test_a_computed_baseline_stands_in_for_a_measured_one():
    build = partial(contest, formula=("by formula", 2.0))
    outcome = runner.run(case(build, unit="MiB"), "quick")
    for record in outcome.records:
        assert record["baseline"] == "by formula" and record["baseline_value"] == 2.0
        assert record["ratio"] == record["value"] / 2


def test_the_gate():
    truth = torch.linspace(-3, 3, 101).double()
    rounded = truth.float()
    assert judge("x", rounded, rounded, truth).ok
    assert judge("x", rounded, truth, truth).ok, "plain that is exact by luck sets no standard"
    assert not judge("x", rounded * 1.00001, rounded, truth).ok
    assert judge("x", rounded * 1.00001, rounded * 1.00002, truth).ok
    assert judge("x", rounded + 1e-5, rounded, truth, floor=1e-5).ok
    spoilt = rounded.clone()
    spoilt[7] = torch.nan
    assert not judge("x", spoilt, rounded, truth).ok
    assert not judge("x", spoilt, spoilt, truth).ok, "plain's NaN excuses ours"
    with pytest.raises(ValueError, match=r"expected shape \(101,\), got \(100,\)"):
        judge("x", rounded[1:], rounded, truth)


@pytest.mark.parametrize("trained", [False, True])
def test_the_truth_of_the_head_is_autograds(trained):
    problem = heads.Problem(600, 700, 8, torch.float32, "cpu", trained)
    hidden = problem.hidden.detach().double().requires_grad_()
    weight = problem.weight.detach().double().requires_grad_()
    logps = (hidden @ weight.T).log_softmax(-1)[torch.arange(600), problem.labels]
    logps.backward(problem.upstream.double())
    truth = problem.truth(lambda _: problem.upstream)
    assert set(truth) == {"log-probs", "d hidden", *(["d weight"] if trained else [])}
    torch.testing.assert_close(truth["log-probs"], logps.detach()[problem.rows])
    torch.testing.assert_close(truth["d hidden"], hidden.grad[problem.rows])
    if trained:
        torch.testing.assert_close(truth["d weight"], weight.grad[problem.words])


# ---- time and memory ---------------------------------------------------------------------------


def test_contenders_take_turns():
    order = []
    works = {name: Work(partial(order.append, name)) for name in "abc"}

    def clock(run):
        run()
        return 1.0

    samples = timing.interleave(works, rounds=3, clock=clock)
    assert "".join(order) == "abc" + "abc" + "bca" + "cab"  # one untimed round, then three
    assert samples == {name: [1.0] * 3 for name in "abc"}


def test_slow_contenders_leave_early_and_short_ones_repeat():
    took = {"slow": 6.0, "short": timing.SAMPLE_SECONDS / 4}
    ran = []
    works = {name: Work(partial(ran.append, name)) for name in took}

    def clock(run):
        run()
        return took[ran[-1]]

    samples = timing.interleave(works, rounds=8, clock=clock, seconds=10)
    assert samples["slow"] == [6.0] * timing.FEWEST_ROUNDS
    assert samples["short"] == pytest.approx([took["short"]] * 8)
    assert ran.count("short") == 1 + 8 * 4


def test_what_goes_before_is_not_timed():
    clock_reads = []
    state = {"ready": False}

    def run():
        assert state.pop("ready")

    def clock(run):
        clock_reads.append(state["ready"])
        run()
        return 1.0

    work = Work(run, before=lambda: state.update(ready=True))
    timing.interleave({"a": work}, rounds=4, clock=clock)
    assert clock_reads == [True] * 5


def test_median_and_interquartile_range():
    assert timing.summarise([3.0, 1.0, 2.0, 100.0, 4.0]) == (3.0, 2.0, 5)
    assert timing.summarise([7.0]) == (7.0, 0.0, 1)


@pytest.mark.skipif(bool(memory.obstacle("cpu")), reason=memory.obstacle("cpu"))
def test_the_memory_meter_sees_what_is_held_at_once():
    def hold(*mib):
        for size in mib:
            torch.ones(size << 18)  # float32; freed before the next

    hold(256)  # long gone when the meter starts
    for sizes in ((64,), (48, 64), (8,)):
        peak = memory.peak_extra_bytes(partial(hold, *sizes)) / memory.MIB
        assert max(sizes) - 1 <= peak <= max(sizes) + 4
    assert memory.peak_extra_bytes(lambda: None) < 2 * memory.MIB
