"""The benchmark harness: what it shows must be right, complete and measured as it says."""

from __future__ import annotations

import copy
import json
import subprocess
from functools import partial

import pytest
import torch
from transformers.models.llama import modeling_llama
from typer.testing import CliRunner

import drrlhf as dr
from drrlhf import backends, reference
from drrlhf.bench import (
    dpo_step,
    heads,
    memory,
    peers,
    profile,
    registry,
    results,
    robust_risk,
    runner,
    table,
    timing,
    trainer_step,
)
from drrlhf.bench.budget import LEFT_OUT, Budget
from drrlhf.bench.gate import Gate, judge
from drrlhf.bench.registry import Case, Contest, Unavailable, Work
from drrlhf.cli import app

RECORD = {
    "op",
    "backend",
    "dtype",
    "shape",
    "head",
    "metric",
    "value",
    "unit",
    "baseline",
    "baseline_value",
    "ratio",
}


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], prog_name="drrlhf")


def case(build, **options) -> Case:
    return Case("an_op", "forward", "float32", (4,), build, **options)


def contest(ours=lambda: 1.0, peer=lambda: 1.0, **options) -> Contest:
    """A computation whose truth is 1: ours, plain PyTorch and a peer."""

    def work(function):
        found = {}
        return Work(
            lambda: found.update(value=torch.tensor([float(function())])), outputs=lambda: found
        )

    gate = Gate(lambda: {"value": torch.ones(1).double()}, lambda: {"value": torch.ones(1)})
    makers = {"drrlhf": ours, "plain": lambda: 1.0, "peer": peer}
    return Contest(
        {name: partial(work, function) for name, function in makers.items()},
        baseline=("plain",),
        gates=dict.fromkeys(makers, gate),
        **options,
    )


# ---- the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def quick(tmp_path_factory):
    """The whole quick suite, once: the command's result and its folder."""
    folder = tmp_path_factory.mktemp("bench")
    return bench("--suite", "quick", "--rounds", 1, "--output", folder, "--plot"), folder


def test_the_quick_suite_runs_end_to_end(quick):
    result, folder = quick
    assert result.exit_code == 0, result.output
    (path,) = folder.glob("quick_*.json")
    kept = json.loads(path.read_text())
    assert path.stem == f"quick_{results.slug(kept['device'])}_{kept['date']}"
    assert {"device", "versions", "commit", "records"} <= set(kept)
    assert kept["versions"]["torch"] == torch.__version__ and not kept["failed"]
    for record in kept["records"]:
        assert set(record) >= RECORD
        assert record["value"] >= 0 and record["unit"] in ("ms", "us", "MiB")
        if record["baseline"]:
            assert record["ratio"] == pytest.approx(record["value"] / record["baseline_value"])
        if record["unit"] != "MiB":
            assert record["spread"] >= 0 and record["rounds"] == 1
    drawn = sorted(p.name.rpartition("_")[2] for p in folder.glob("*.png"))
    assert drawn == ["ratios.png", "scaling.png"]


def test_every_case_is_measured_or_says_why_not(quick):
    result, folder = quick
    kept = results.read(next(folder.glob("quick_*.json")))
    told = {
        (e["op"], e["metric"], e["dtype"], tuple(e["shape"]), e["head"])
        for e in [*kept["records"], *kept["skipped"]]
    }
    wanted = registry.select("quick")
    assert {(c.op, c.metric, c.dtype, c.shape, c.head) for c in wanted} == told
    assert all(e["reason"] for e in kept["skipped"])
    measured = {r["op"] for r in kept["records"]}
    assert measured >= {"ceilings", "robust_risk", "token_logprobs", "linear_token_logprobs"}
    if hasattr(dr, "linear_preference_loss"):
        assert measured == set(registry.OPS)
    sets = {r["metric"] for r in kept["records"] if r["op"] == "robust_risk"}
    assert sets == set(robust_risk.SETS)
    assert peers.NOT_IN_QUICK[:30] in " ".join(result.output.split())


def test_only_the_ops_asked_for_run_and_the_file_keeps_the_others(tmp_path):
    for op in ("ceilings", "token_logprobs"):
        result = bench("--suite", "quick", "--rounds", 1, "--op", op, "--output", tmp_path)
        assert result.exit_code == 0, result.output
    (path,) = tmp_path.glob("*.json")
    kept = results.read(path)
    assert {r["op"] for r in kept["records"]} == {"ceilings", "token_logprobs"}
    before = len(kept["records"])
    bench("--suite", "quick", "--rounds", 1, "--op", "ceilings", "--output", tmp_path)
    assert len(results.read(path)["records"]) == before, "measured again, not added"
    results.write(kept | {"commit": "another", "records": []}, tmp_path)
    assert not results.read(path)["records"], "records of two commits in one file"
    (aside,) = set(tmp_path.glob("*.json")) - {path}
    assert len(results.read(aside)["records"]) == before, "what was measured is not lost"


def test_a_wrong_result_shows_no_speed_and_fails_the_command(monkeypatch, tmp_path):
    right = dr.token_logprobs
    monkeypatch.setattr(dr, "token_logprobs", lambda *a, **k: right(*a, **k) * (1 + 1e-3))
    result = bench(
        "--suite", "quick", "--rounds", 1, "--op", "token_logprobs", "--output", tmp_path
    )
    assert result.exit_code == 1
    assert "FAILED drrlhf: log-probs: RMS error 0.001" in " ".join(result.output.split())
    assert "FAILED: token_logprobs, forward, float32" in result.output
    assert " ms" not in result.output and "±" not in result.output
    (path,) = tmp_path.glob("*.json")
    kept = results.read(path)
    assert not kept["records"] and len(kept["failed"]) >= 4


def test_an_error_of_ours_is_no_reason_and_loses_nothing(monkeypatch, tmp_path):
    def broken(*_, **__):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(dr, "token_logprobs", broken)
    result = bench(
        "--suite", "quick", "--op", "token_logprobs", "--op", "ceilings", "--output", tmp_path
    )
    assert isinstance(result.exception, ZeroDivisionError)
    (path,) = tmp_path.glob("*.json")
    assert {r["op"] for r in results.read(path)["records"]} == {"ceilings"}


def test_mistakes_are_one_line(tmp_path):
    for arguments, words in (
        (["--op", "tokens"], ["'tokens'", "token_logprobs", "robust_risk", "dpo_step"]),
        (["--readme", "--output", tmp_path], ["--readme", str(tmp_path), "cpu suite"]),
        *([] if torch.cuda.is_available() else [(["--suite", "gpu"], ["CUDA", "--suite cpu"])]),
    ):
        result = bench(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1
        for word in words:
            assert word in result.stderr


def test_ctrl_c_keeps_what_was_measured(monkeypatch, tmp_path):
    run, calls = runner.run, []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(*arguments, **options)

    monkeypatch.setattr(runner, "run", interrupted)
    result = bench("--suite", "quick", "--rounds", 1, "--op", "robust_risk", "--output", tmp_path)
    assert result.exit_code == 130
    assert "Interrupted after 1 of" in result.output and "torch.logsumexp" in result.output
    (path,) = tmp_path.glob("quick_*.json")
    assert {r["metric"] for r in results.read(path)["records"]} == {"erm"}


def test_threads_are_set_and_told(tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    bench("--suite", "quick", "--op", "ceilings", "--rounds", 1, "--threads", 3)
    assert asked[0] == 3


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


# ---- peers, registry, results, tables ----------------------------------------------------------


def test_a_missing_peer_says_what_installs_it(tmp_path, monkeypatch):
    with pytest.raises(Unavailable, match="not installed: pip install its-package"):
        peers.load("no_such_module.part", "its-package")
    with pytest.raises(Unavailable, match="not installed: pip install --no-deps no_such_module"):
        peers.load_file("no_such_module", "file.py")
    (tmp_path / "half_there.py").write_text("import no_such_module")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unavailable, match=r"does not import here.*no_such_module"):
        peers.load("half_there", "half-there")


def test_a_parameter_that_this_version_lacks_is_a_reason():
    assert registry.our("robust_risk", "groups") is dr.robust_risk
    with pytest.raises(Unavailable, match="takes no colour"):
        registry.our("robust_risk", "colour")
    with pytest.raises(Unavailable, match="has no robust_rosk"):
        registry.our("robust_rosk")


def test_every_suite_has_every_op_and_builds_nothing_yet():
    for suite in registry.SUITES:
        cases = registry.select(suite)
        assert list(dict.fromkeys(c.op for c in cases)) == list(registry.OPS)
        assert len({(c.op, str(c)) for c in cases}) == len(cases), "two cases of one name"
    with pytest.raises(ValueError, match="expected one of cpu, gpu, quick"):
        registry.select("tpu")


def test_the_commit_is_that_of_our_own_checkout(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    (tmp_path / "drrlhf").mkdir()
    monkeypatch.setattr(dr, "__file__", str(tmp_path / "drrlhf" / "__init__.py"))
    assert results.commit() is None, "a checkout that only happens to hold the installed package"

    kept = tmp_path / "benchmarks" / "results" / "cpu.json"
    kept.parent.mkdir(parents=True)
    for path in (tmp_path / "drrlhf" / "version.py", kept):
        path.write_text("1")
    name = ["-c", "user.name=x", "-c", "user.email=x"]
    for command in (["add", "."], [*name, "commit", "-q", "-m", "x"]):
        subprocess.run(["git", *command], check=True, cwd=tmp_path)
    clean = results.commit()
    assert len(clean) == 40
    kept.write_text("2")
    assert results.commit() == clean, "a kept result changes nothing that is measured"
    (tmp_path / "drrlhf" / "version.py").write_text("2")
    assert results.commit() == f"{clean}-dirty"


def _record(op, contender, ratio, **more):
    record = dict.fromkeys(RECORD) | {"axis": None, "op": op, "contender": contender}
    return record | {"ratio": ratio, "value": ratio, "baseline_value": 1.0, **more}


def _head(contender, ratio, dtype="bfloat16", head="frozen", metric="forward+backward"):
    return _record(
        "linear_token_logprobs",
        contender,
        ratio,
        baseline="gemm",
        shape=[1024, 32000, 1024],
        dtype=dtype,
        head=head,
        metric=metric,
    )


def _write(folder, name, records):
    kept = {"device": "X", "versions": {"trl": "1.16.0"}, "commit": None, "records": records}
    (folder / name).write_text(json.dumps(kept))


def test_readme_tables_come_from_the_newest_kept_results(tmp_path):
    assert table.readme_tables(tmp_path) == {}
    old = _record("robust_risk", "drrlhf", 2.51, metric="tv:0.1", shape=[4096])
    _write(tmp_path, "cpu_x-old_2026-11-23.json", [old])
    plain = "| set | ratio to `torch.logsumexp` |\n|---|---|\n"
    assert table.readme_tables(tmp_path) == {"robust_risk": plain + "| `tv:0.1` | 2.5 |"}

    sets = [
        _record("robust_risk", name, ratio, metric=metric, shape=shape)
        for name, ratio, metric, shape in (
            ("drrlhf", 2.0, "erm", [4096]),
            ("drrlhf", 3.0, "cvar:0.3", [4096]),
            ("sqwash", 9.0, "cvar:0.3", [4096]),
            ("drrlhf", 7.0, "cvar:0.3", [64]),
        )
    ]
    _write(tmp_path, "quick_x_2026-11-25.json", sets[:1])
    _write(tmp_path, "cpu_x_2026-11-22.json", sets[:1])
    _write(tmp_path, "cpu_x_2026-11-24.json", sets)
    tables = table.readme_tables(tmp_path)
    assert tables == {"robust_risk": plain + "| `erm` | 2.0 |\n| `cvar:0.3` | 3.0 |"}

    head = [
        *(_head(*pair) for pair in (("gemm", 1.0), ("drrlhf", 2.11), ("plain", 4.4))),
        *(_head(*pair) for pair in (("torch.compile", 4.06), ("trl", 12.8), ("other", 30.0))),
        _head("drrlhf (recompute)", 4.0, head="trained"),
        _head("drrlhf (slab kept)", 3.0, head="trained"),
        _head("drrlhf", 1.1, metric="forward"),
        _head("drrlhf", 9.9) | {"axis": "tokens"},
    ]
    _write(tmp_path, "cpu_x_2026-11-24.json", sets + head)
    lines = table.readme_tables(tmp_path)["head"].splitlines()
    assert lines[0].endswith("| ours | plain PyTorch | torch.compile | TRL 1.16 |")
    assert "hidden·weightᵀ" in lines[0] and "1024×1024 by 32000×1024" in lines[0]
    assert lines[2:] == [
        "| bfloat16, head frozen | 2.1 | 4.4 | 4.1 | 12.8 |",
        "| bfloat16, head trained | 4.0 (recompute), 3.0 (slab kept) | – | – | – |",
        "| bfloat16, scoring (forward only) | 1.1 | – | – | – |",
    ]
    step = {"metric": "step in accumulated batches", "shape": [8, 4, 128]}
    steps = [
        _record("trainer_step", name, ratio, **step)
        for name, ratio in (("drrlhf (erm)", 1.0), ("drrlhf (cvar:0.3)", 0.75), ("trl", 3.0))
    ]
    _write(tmp_path, "cpu_x_2026-11-24.json", sets + head + steps)
    row = "| 8 accumulated batches of 4 pairs, sequences of 128 | 1.00 | – | 0.75 | 3.00 |"
    assert table.readme_tables(tmp_path)["trainer_step"].splitlines()[2:] == [row]
    printed = bench("--readme", "--output", tmp_path)
    assert printed.exit_code == 0 and all(line in printed.output for line in lines)


def test_the_tables_of_speed_policy_loss_and_packing(tmp_path):
    def one(op, contender, metric, shape, **more):
        return _record(op, contender, 1.0) | {"metric": metric, "shape": shape, **more}

    wide = {"dtype": "bfloat16", "unit": "ms"}
    logits = [
        one("token_logprobs", name, "forward", [4, 9], value=value, **wide)
        for name, value in (("drrlhf", 15.74), ("log_softmax", 132.4), ("torch.compile", 47.01))
    ]
    others = [
        logits[0] | {"dtype": "float32", "value": 1.0},
        logits[0] | {"axis": "tokens", "value": 1.0},
        logits[1] | {"contender": "float().log_softmax", "value": 1.0},
    ]
    peak = one(
        "linear_token_logprobs",
        "drrlhf",
        "peak memory, forward+backward",
        [8, 9, 2],
        head="frozen",
        peak_mib=49.7,
        **wide,
    )
    speed = one("dpo_step", "trl", "tv:0.1, forward+backward", [8, 256], tokens_per_s=223.5, **wide)
    ours = speed | {"contender": "drrlhf", "tokens_per_s": 996.0}
    metric = "log-probs to gradients, dapo"
    loss = one("policy_loss", "drrlhf", metric, [6, 8, 5], value=1543.0, dtype="float32", unit="us")
    loss |= {"ratio": 0.307}
    packing = [
        one("trainer_step", f"drrlhf ({name})", "step of mixed lengths", [8], tokens_per_s=speed)
        for name, speed in (("padded", 400.0), ("packed", 710.0))
    ]
    _write(tmp_path, "cpu_x_2026-11-24.json", [*others, *logits, peak, speed, ours])
    _write(tmp_path, "cpu_x-policy_2026-11-25.json", [loss, *packing])
    tables = table.readme_tables(tmp_path)
    assert tables["speed"].splitlines()[2:] == [
        "| log-probs from bfloat16 logits (4×9), forward | 15.7 ms | 132 ms | 47 ms | – |",
        "| bfloat16 head frozen (8×2 by 9×2), peak memory beyond the inputs "
        "| 49.7 MiB | – | – | – |",
        "| DPO step with `tv:0.1`, 8 sequences of 256 tokens "
        "| 996 tokens/s | – | – | 224 tokens/s |",
        "| GRPO loss with `tv:0.1`, 6 prompts of 8 completions of 5 tokens, float32 | 1.54 ms "
        "| – | – | – |",
    ]
    assert tables["policy_loss"].splitlines()[2:] == [
        "| from log-probs (6 prompts × 8 completions × 5 tokens) | float32 | 0.31 | – | – |"
    ]
    assert tables["packing"].splitlines()[2:] == [
        "| `padding_free=False` | 400 | 1.00 |",
        "| `padding_free=True` | 710 | 1.77 |",
    ]


def test_a_file_that_is_no_result_is_refused(tmp_path):
    for text, word in (("{", "not valid JSON"), ("[]", "list of records"), ("{}", "records")):
        (tmp_path / "cpu_x_2026-11-24.json").write_text(text)
        with pytest.raises(ValueError, match=word):
            table.readme_tables(tmp_path)


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


# ---- where the time goes, and who is measured --------------------------------------------------


def test_a_profile_says_where_the_time_went(quick):
    a, b = torch.randn(2, 300, 300).unbind()
    found = profile.of(Work(lambda: [torch.mm(a, b) for _ in range(5)] + [a + b]), "cpu", most=1)
    (row,) = found["rows"]
    assert found["by"] == "operator" and row["name"] == "aten::mm" and row["launches"] == 5
    assert found["launches"] >= 6 and found["total_ms"] >= row["ms"] > 0
    _, folder = quick
    kept = results.read(next(folder.glob("quick_*.json")))["profiles"]
    whole = [e for e in kept if e["metric"] == "step in one forward"]
    assert [e["contender"] for e in whole] == ["drrlhf (erm)", "trl"]
    for entry in whole:
        times = [row["ms"] for row in entry["rows"]]
        assert len(times) == profile.MOST_ROWS and times == sorted(times, reverse=True)
        assert sum(times) <= entry["total_ms"] * 1.001


def test_a_profile_that_fails_costs_no_times(monkeypatch):
    def broken(*_):
        raise RuntimeError("no CUPTI")

    monkeypatch.setattr(profile, "of", broken)
    outcome = runner.run(case(partial(contest, profiled=("drrlhf",))), "quick", rounds=1)
    assert outcome.skipped == {"profile of drrlhf": "RuntimeError: no CUPTI"}
    assert len(outcome.records) == 3 and not outcome.profiles


def test_a_backend_by_name_does_the_backward_too(monkeypatch):
    called = []
    for name in ("linear_token_logprobs", "linear_token_logprobs_backward"):
        right = getattr(reference, name)
        monkeypatch.setattr(
            reference, name, lambda *a, name=name, right=right: called.append(name) or right(*a)
        )
    problem = heads.Problem(6, 11, 8, torch.float32, "cpu", trained=True)
    work = registry.on_backend("reference", lambda: problem.work(heads.ours()))()
    work.once()
    assert called == ["linear_token_logprobs", "linear_token_logprobs_backward"]
    with pytest.raises(Unavailable, match="triton"):
        registry.on_backend("triton", lambda: problem.work(heads.ours()))().once()


def test_no_backend_is_measured_twice(monkeypatch):
    for serving in ("cuda", "triton"):
        monkeypatch.setattr(registry.backends, "serving", lambda op, device, s=serving: s)
        problem = heads.Problem(4, 9, 8, torch.float32, "cpu", trained=True)
        contenders, named = heads.everyone(problem, "gpu")
        (other,) = {"cuda", "triton"} - {serving}
        assert named == {f"drrlhf ({other})": other, f"drrlhf ({other}, slab kept)": other}
        ours = [name for name in contenders if name.startswith("drrlhf")]
        assert ours == [
            "drrlhf",
            "drrlhf (slab kept)",
            "drrlhf (48 MiB)",
            "drrlhf (256 MiB)",
            *named,
        ]


def test_records_name_the_backend_that_did_the_work(quick):
    kept = results.read(next(quick[1].glob("quick_*.json")))["records"]
    by = {r["contender"]: r["backend"] for r in kept if r["op"] == "linear_token_logprobs"}
    assert by["drrlhf (reference)"] == by["drrlhf (reference, slab kept)"] == "reference"
    assert by["drrlhf"] == backends.serving("linear_token_logprobs", "cpu")


def test_the_truth_of_the_extras_is_that_of_full_logits():
    problem = heads.Problem(40, 70, 8, torch.float32, "cpu", False, extras=True)
    logps, entropy, mean, top = heads.plain_extras(
        problem.hidden.double(), problem.weight.double(), problem.labels
    )
    truth = problem.truth(lambda _: problem.upstream)
    for name, expected in zip(("log-probs", *heads.JUDGED_EXTRAS), (logps, entropy, mean)):
        torch.testing.assert_close(truth[name].float(), expected.detach().float()[problem.rows])
    for head in (heads.ours_extras(), heads.trl_extras()):
        found = head(problem.hidden, problem.weight, problem.labels)
        for a, b in zip(found, (logps, entropy, mean)):
            torch.testing.assert_close(a, b.float(), rtol=1e-5, atol=1e-5)
        assert torch.equal(found[3], top)
    verdicts = problem.gate().judge(
        {"log-probs": logps, "entropy": entropy * 1.01, "mean logit": mean}
        | {"d hidden": problem.truth(lambda _: problem.upstream)["d hidden"]}
    )
    assert [v.quantity for v in verdicts if not v.ok] == ["entropy"]


# ---- the gate of a whole step ------------------------------------------------------------------


def test_plain_that_is_noise_is_no_standard():
    truth = torch.linspace(-3, 3, 101).double()
    noise = truth.flip(0)
    assert judge("x", noise, noise, truth).ok
    assert not judge("x", noise, noise, truth, most=0.05).ok
    assert judge("x", truth.float() * 1.05, noise, truth, most=0.05).ok


def test_the_gate_of_a_step_sees_a_wrong_beta_and_its_standard_is_small():
    step = next(
        c for c in registry.select("quick", ["trainer_step"]) if c.metric == "step in one forward"
    )
    made = step.build()
    gate, work = made.gates["drrlhf (erm)"], made.contenders["drrlhf (erm)"]()
    (right,) = gate.judge(work.outputs())
    assert right.ok and right.allowed_rms <= 2 * dpo_step.STANDARD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_step, "BETA", 0.2)
        (wrong,) = gate.judge(made.contenders["drrlhf (erm)"]().outputs())
    assert not wrong.ok and wrong.rms > 5 * wrong.allowed_rms


def test_records_of_a_step_say_where_it_started_and_what_was_allowed(quick):
    kept = results.read(next(quick[1].glob("quick_*.json")))["records"]
    notes = {(r["head"], r["note"]) for r in kept if r["op"] == "trainer_step"}
    assert notes == {("frozen", "adapters N(0, 0.1²)"), ("trained", "norms 1 + N(0, 0.1²)")}
    for record in (r for r in kept if r["op"] == "trainer_step"):
        assert record["rms_error"] <= record["allowed_error"] <= 2 * dpo_step.STANDARD


def test_pairs_of_the_checked_step_are_apart():
    """No rounding decides which pair is the worst."""
    base = dpo_step.policy_model("quick", "cpu")
    policy = trainer_step._moved(copy.deepcopy(base), True, trainer_step.SPREAD["quick"])
    batches = trainer_step._apart(base, policy, "cpu")
    count, pairs, length = trainer_step.CHECKED
    assert [b["input_ids"].shape for b in batches] == [(2 * pairs, length)] * count
    margins = []
    for model, start in ((policy, base), (policy.double(), base.double())):
        logps = [trainer_step._logps(model, b) - trainer_step._logps(start, b) for b in batches]
        margins.append(torch.cat([x.chunk(2)[0] - x.chunk(2)[1] for x in logps]).double())
    rounded, exact = margins
    assert exact.sort().values.diff().min() > 5 * (rounded - exact).abs().max()


class FakeLiger:
    """Puts a name into the model's module for everyone, as Liger does."""

    def apply_liger_kernel(self, model, config):
        self.config = config
        modeling_llama.apply_rotary_pos_emb = self.rotary

    def rotary(self, *arguments, **options):
        self.ran = True
        return self.right(*arguments, **options)


def test_liger_s_layers_are_those_of_its_contenders_alone(monkeypatch):
    fake, own = FakeLiger(), modeling_llama.apply_rotary_pos_emb
    fake.right, fake.ran = own, False
    monkeypatch.setattr(
        trainer_step.peers,
        "load",
        lambda name, package, load=trainer_step.peers.load: (
            fake if "liger" in name else load(name, package)
        ),
    )
    base = dpo_step.policy_model("quick", "cpu")
    options = {"ambiguity": "erm", trainer_step.LIGER_OPTION: True}
    trainer = trainer_step._trainer("drrlhf (erm, liger)", base, options, "cpu", True, 0.1)
    layers = trainer_step.Layers(trainer)
    assert fake.config["fused_linear_cross_entropy"] is False
    assert modeling_llama.apply_rotary_pos_emb is own
    batch = trainer_step._batches(211, (1, 2, 12), False, "cpu")
    trainer_step._step(trainer, batch)
    assert not fake.ran
    with layers:
        trainer_step._step(trainer, batch)
    assert fake.ran and modeling_llama.apply_rotary_pos_emb is own
