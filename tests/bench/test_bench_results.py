"""Peers, the registry, what is kept of a run, and the tables made of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from contests import RECORD, bench

import drrlhf as dr
from drrlhf.bench import (
    peers,
    registry,
    results,
    runner,
    table,
)
from drrlhf.bench.registry import Unavailable

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


@pytest.mark.parametrize("case", registry.select("quick", ["policy_loss"]), ids=str)
def test_without_trl_a_case_ends_with_the_reason_and_the_run_goes_on(case, monkeypatch):
    """TRL's loss is what ours is held against, too."""
    for name in ("trl", "trl.kernels", "trl.trainer.grpo_trainer"):
        monkeypatch.setitem(sys.modules, name, None)
    assert runner.run(case, "quick", rounds=1).skipped["trl"] == "not installed: pip install trl"


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


def _record(op, implementation, ratio, **more):
    record = dict.fromkeys(RECORD) | {"axis": None, "op": op, "contender": implementation}
    return record | {"ratio": ratio, "value": ratio, "baseline_value": 1.0, **more}


def _head(implementation, ratio, dtype="bfloat16", head="frozen", metric="forward+backward"):
    return _record(
        "linear_token_logprobs",
        implementation,
        ratio,
        baseline="gemm",
        shape=[1024, 32000, 1024],
        dtype=dtype,
        head=head,
        metric=metric,
    )


def _write(folder, name, records):
    kept = {"device": "X", "versions": {"trl": "1.16.0"}, "commit": None, "records": records}
    kept["date"] = Path(name).stem.rpartition("_")[2]
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
        _head("drrlhf", 1.7, metric="forward, with entropy"),
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
    def one(op, implementation, metric, shape, **more):
        return _record(op, implementation, 1.0) | {"metric": metric, "shape": shape, **more}

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
        "| DPO step with `tv:0.1`, the reference's log-probs given, 8 sequences of 256 tokens "
        "| 996 tokens/s | – | – | 224 tokens/s | X, 2026-11-24 |",
        "| GRPO loss with `tv:0.1`, 6 prompts of 8 completions of 5 tokens, float32 | 1.54 ms "
        "| – | – | – | X, 2026-11-25 |",
        "| log-probs from bfloat16 logits (4×9), forward | 15.7 ms | 132 ms | 47 ms | – "
        "| X, 2026-11-24 |",
        "| bfloat16 head frozen (8×2 by 9×2), peak memory beyond the inputs "
        "| 49.7 MiB | – | – | – | X, 2026-11-24 |",
    ]
    # Of the first three rows two were measured.
    assert tables["speed_short"].splitlines() == tables["speed"].splitlines()[:4]
    assert tables["policy_loss"].splitlines()[2:] == [
        "| from log-probs (6 prompts × 8 completions × 5 tokens) | float32 | 0.31 | – | – |"
    ]
    assert tables["packing"].splitlines()[2:] == [
        "| `padding_free=False` | 400 | 1.00 |",
        "| `padding_free=True` | 710 | 1.77 |",
    ]
    # A newer file of the same work is what is shown, whatever else the older one has.
    _write(tmp_path, "cpu_x_2026-11-26.json", [logits[0] | {"value": 12.5}])
    newer = table.readme_tables(tmp_path)["speed"].splitlines()
    assert newer[4].startswith("| log-probs from bfloat16 logits (4×9), forward | 12.5 ms | – |")
    assert newer[4].endswith("| X, 2026-11-26 |") and newer[5].endswith("| X, 2026-11-24 |")


def test_a_file_that_is_no_result_is_refused(tmp_path):
    for text, word in (("{", "not valid JSON"), ("[]", "list of records"), ("{}", "records")):
        (tmp_path / "cpu_x_2026-11-24.json").write_text(text)
        with pytest.raises(ValueError, match=word):
            table.readme_tables(tmp_path)
