"""`drrlhf train grpo` on a tiny random model: every run here trains for real."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
from test_cli import _assert_same_weights, _numbers, _refused, _run
from trl_fixtures import tiny_llama_dir, tiny_pairs

from drrlhf.cli.reward_function import check_columns
from drrlhf.files import json_lines

REWARD = """
def score(prompts, completions, bonus, **_):
    return [len(set(c.split())) / 10 + b for c, b in zip(completions, bonus)]

def none(completions, **_):
    return [None] * len(completions)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text(REWARD)
    rows = [
        {"prompt": row["prompt"], "group": "ab"[i % 2], "bonus": i % 3}
        for i, row in enumerate(tiny_pairs(12))
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    yield SimpleNamespace(root=tmp_path, model=tiny_llama_dir(tmp_path))
    sys.modules.pop("my_reward", None)


def arguments(place, more="", reward="my_reward:score", out="out"):
    given = (
        f"--data prompts.jsonl --model {place.model} --reward {reward} --output-dir {out} "
        f"--learning-rate 1e-3 --num-generations 4 --max-completion-length 6 {more}"
    )
    return ["train", "grpo", *given.split()]


def trained(place, more="", **rest):
    result = _run(arguments(place, more, **rest))
    assert result.exit_code == 0, result.output + result.stderr
    return result


def test_a_run_leaves_model_record_curves_and_table(place):
    result = trained(place, "--steps 3 --ambiguity group --gradient-accumulation 2 --beta 0.1")
    assert "grpo, ambiguity group:2" in result.output and "12 prompts" in result.output
    for name in ("worst-case reward", "KL to the start", "effective sample size"):
        assert name in result.output
    record = json.loads((place.root / "out" / "run.json").read_text())
    assert record["data"]["group_names"] == ["a", "b"]
    assert record["settings"]["reward"] == "my_reward:score"
    assert (place.root / "out" / "training.png").stat().st_size > 10_000
    last = [x for x in json_lines(place.root / "out" / "metrics.jsonl") if x["event"] == "train"]
    assert {"group/a/reward", "group/b/state", "robust/kept", "kl"} <= set(last[-1])


def test_resuming_goes_on_to_the_same_numbers(place):
    """From the end of the first epoch: the second has another order."""
    more = "--steps 5 --save-steps 3 --batch-size 16 --ambiguity tv:0.3 --group-by column"
    trained(place, more, out="whole")
    whole, half = place.root / "whole", place.root / "half"
    shutil.copytree(whole, half)
    (half / "checkpoint-5" / "trainer_state.json").unlink()  # of an older transformers, cut off
    result = _run([*arguments(place, more, out="half"), "--resume"])
    assert result.exit_code == 0, result.output + result.stderr
    assert _numbers(half) == _numbers(whole)
    _assert_same_weights(half, whole)


def test_a_reward_model_and_pass_rates(place, tmp_path):
    from trl_fixtures import tiny_encoder_dir

    encoder = tiny_encoder_dir(tmp_path, with_eos=False)
    more = "--steps 2 --ambiguity group:3 --group-by pass_rate --pass-threshold 0"
    result = trained(place, more, reward=str(encoder))
    assert "group:3" in result.output


@pytest.mark.parametrize(
    ("more", "reward", "words"),
    [
        ("", "nothing:score", ["--reward nothing:score", "no module"]),
        ("", "my_reward:scores", ["my_reward has no function 'scores'"]),
        ("", "./nowhere", ["--reward ./nowhere", "no such directory"]),
        ("--ambiguity group:3", "my_reward:score", ["the data has 2 groups (a, b)"]),
        ("--ambiguity group --group-by pass_rate", "my_reward:score", ["say how many groups"]),
        ("--batch-size 6", "my_reward:score", ["num_generations"]),
        ("--temperature 0", "my_reward:score", ["--temperature must be > 0; got 0"]),
        ("--ambiguity tv:0.1 --beta 0.1 --loss-type sapo", "my_reward:score", ["sapo", "beta=0"]),
    ],
)
def test_what_cannot_work_is_refused_before_training(place, more, reward, words):
    _refused(_run(arguments(place, more, reward=reward)), *words)
    assert not (place.root / "out" / "metrics.jsonl").exists()


def test_columns_that_no_reward_function_gets_are_told(caplog):
    check_columns("a.jsonl", ["prompt", "answer"])
    assert not caplog.text
    check_columns("a.jsonl", ["prompt", "answer", "completion", "trainer_state"])
    assert "do not reach the reward function" in caplog.text
    assert "completion, trainer_state;" in caplog.text and "answer" not in caplog.text


def test_missing_options_and_bad_rows(place):
    _refused(_run(["train", "grpo", "--data", "x"]), "--model", "--reward", "--output-dir")
    _refused(_run(["train", "grpo", "--demo", "--beta", "1"]), "--demo", "--beta")
    (place.root / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": " "}\n')
    _refused(_run(arguments(place)), "line 2", "'prompt' is empty; a prompt needs text")
    for name in ("prompts", "completions", "image"):
        (place.root / "prompts.jsonl").write_text(json.dumps({"prompt": "a", name: "x"}) + "\n")
        _refused(_run(arguments(place)), f"prompts.jsonl: column {name!r}", "rename it")
    (place.root / "prompts.jsonl").write_text('{"question": "a"}\n')
    _refused(_run(arguments(place)), "missing column 'prompt'")


def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(place):
    more = "--steps 4000 --ambiguity tv:0.2 --batch-size 8"
    process = subprocess.Popen(
        [sys.executable, "-m", "drrlhf", *arguments(place, more)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    metrics = place.root / "out" / "metrics.jsonl"
    end = time.monotonic() + 90
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert time.monotonic() < end and process.poll() is None, process.communicate()[0]
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output
    assert "Continue with:" in output and "drrlhf train grpo --data" in output
    assert list((place.root / "out").glob("checkpoint-*/drrlhf_state.safetensors"))
