"""The benchmark harness: what it shows must be right, complete and measured as it says."""

from __future__ import annotations

import copy
import gc
import importlib
import json
import tempfile
from functools import partial

import pytest
import torch
from contests import RECORD, bench, case, contest
from transformers.models.llama import modeling_llama

import drrlhf as dr
from drrlhf import backends
from drrlhf.bench import (
    dpo_step,
    heads,
    peers,
    profile,
    registry,
    results,
    robust_risk,
    runner,
    trainer_step,
)
from drrlhf.bench.gate import judge
from drrlhf.bench.registry import Unavailable, Work

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
    plain = importlib.import_module("drrlhf.reference.linear_token_logprobs")
    for name in ("linear_token_logprobs", "linear_token_logprobs_backward"):
        right = getattr(plain, name)
        monkeypatch.setattr(
            plain, name, lambda *a, name=name, right=right: called.append(name) or right(*a)
        )
    problem = heads.Problem(6, 11, 8, torch.float32, "cpu", trained=True)
    work = registry.on_backend("reference", lambda: problem.work(dr.linear_token_logprobs))()
    work.once()
    assert called == ["linear_token_logprobs", "linear_token_logprobs_backward"]
    with pytest.raises(Unavailable, match="triton"):
        registry.on_backend("triton", lambda: problem.work(dr.linear_token_logprobs))().once()


def test_no_backend_is_measured_twice(monkeypatch):
    for serving in ("cuda", "triton"):
        monkeypatch.setattr(registry.backends, "serving", lambda op, device, s=serving: s)
        problem = heads.Problem(4, 9, 8, torch.float32, "cpu", trained=True)
        implementations, named = heads.everyone(problem, "gpu")
        (other,) = {"cuda", "triton"} - {serving}
        assert named == {f"drrlhf ({other})": other, f"drrlhf ({other}, slab kept)": other}
        ours = [name for name in implementations if name.startswith("drrlhf")]
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
    for head in (heads.ours_extras, heads.trl_extras()):
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
    gate, work = made.gates["drrlhf (erm)"], made.implementations["drrlhf (erm)"]()
    (right,) = gate.judge(work.outputs())
    assert right.ok and right.allowed_rms <= 2 * dpo_step.STANDARD
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer_step, "BETA", 0.2)
        (wrong,) = gate.judge(made.implementations["drrlhf (erm)"]().outputs())
    assert not wrong.ok and wrong.rms > 5 * wrong.allowed_rms


def test_a_measured_trainer_leaves_no_folder_behind(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    step = registry.select("quick", ["trainer_step"])[0].build()
    work = step.implementations["drrlhf (erm)"]()
    assert list(tmp_path.iterdir())
    del work, step
    gc.collect()
    assert not list(tmp_path.iterdir())


def test_records_of_a_step_say_where_it_started_and_what_was_allowed(quick):
    kept = results.read(next(quick[1].glob("quick_*.json")))["records"]
    notes = {(r["head"], r["note"]) for r in kept if r["op"] == "trainer_step"}
    assert notes == {("frozen", "adapters N(0, 0.1²)"), ("trained", "norms 1 + N(0, 0.1²)")}
    for record in (r for r in kept if r["op"] == "trainer_step"):
        assert record["rms_error"] <= record["allowed_error"] <= 2 * dpo_step.STANDARD


@pytest.mark.parametrize("shared", [False, True])
def test_pairs_of_the_checked_step_are_apart(shared):
    """No rounding decides which pair is the worst."""
    base = dpo_step.policy_model("quick", "cpu")
    policy = trainer_step._moved(copy.deepcopy(base), True, trainer_step.SPREAD["quick"])
    batches = trainer_step._apart(base, policy, "cpu", shared)
    count, pairs, length = trainer_step.CHECKED
    for sides in (b["input_ids"].chunk(2) for b in batches):
        assert bool((sides[0] == sides[1])[:, : length // 2].all()) == shared
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
