"""The benchmark harness: what it shows must be right, complete and measured as it says."""

from __future__ import annotations

import json
import subprocess
from functools import partial

import pytest
import torch
from typer.testing import CliRunner

import drrlhf as dr
from drrlhf.bench import heads, memory, peers, reducers, registry, results, runner, table, timing
from drrlhf.bench.gate import Gate, judge
from drrlhf.bench.registry import Case, Contest, Unavailable, Work
from drrlhf.cli import app

RECORD = {
    "op", "backend", "dtype", "shape", "head", "metric", "value", "unit", "baseline",
    "baseline_value", "ratio",
}  # fmt: skip


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
    assert sets == set(reducers.SETS)
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
        "linear_token_logprobs", contender, ratio, baseline="gemm", shape=[1024, 32000, 1024],
        dtype=dtype, head=head, metric=metric,
    )  # fmt: skip


def _write(folder, name, records):
    kept = {"device": "X", "versions": {"trl": "1.16.0"}, "commit": None, "records": records}
    (folder / name).write_text(json.dumps(kept))


def test_readme_tables_come_from_the_newest_kept_results(tmp_path):
    assert table.readme_tables(tmp_path) == {}
    old = dict.fromkeys(RECORD) | {
        "op": "robust_risk", "metric": "tv:0.1", "ratio": 2.51, "shape": [4096],
    }  # fmt: skip
    _write(tmp_path, "robust_risk_x_2026-11-23.json", [old])  # before there were contenders
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


def test_a_file_that_is_no_result_is_refused(tmp_path):
    for text, word in (("{", "not valid JSON"), ("[]", "list of records"), ("{}", "records")):
        (tmp_path / "cpu_x_2026-11-24.json").write_text(text)
        with pytest.raises(ValueError, match=word):
            table.readme_tables(tmp_path)
