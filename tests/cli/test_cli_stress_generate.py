"""``drrlhf stress --generate`` as a user types it: what it leaves, how it goes on and refuses."""

from __future__ import annotations

import json
import re
import sys
from types import SimpleNamespace
from xml.etree import ElementTree

import numpy as np
import pytest
from trl_fixtures import tiny_llama_dir, tiny_pairs, tiny_reward_dir
from typer.testing import CliRunner

from drrlhf.cli import app
from drrlhf.files import json_lines

REWARD = """
calls, stop_at = 0, None

def score(completions, topic, **_):
    global calls
    calls += 1
    if calls == stop_at:
        raise KeyboardInterrupt
    return [answer.count("w") - (one == "b") for answer, one in zip(completions, topic)]

def short(completions, **_):
    return [0.0] * (len(completions) - 1)

def large(completions, **_):
    return [-12345678.9 - len(answer) for answer in completions]

def none(completions, **_):
    return [None] * len(completions)
"""
FILE = "tiny-llama.completions.jsonl"


@pytest.fixture
def place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "my_letters.py").write_text(REWARD)
    rows = [
        {"prompt": row["prompt"], "topic": "ab"[i % 2], "prompt@mine": f"so {row['prompt']}"}
        for i, row in enumerate(tiny_pairs(12))
    ]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    tiny_llama_dir(tmp_path)
    tiny_reward_dir(tmp_path)
    yield SimpleNamespace(root=tmp_path, rows=rows)
    sys.modules.pop("my_letters", None)


def stress(more="", *rest, reward="my_letters:score", data="prompts.jsonl", out="out"):
    usual = f"--generate tiny-llama --reward {reward} --data {data} --output-dir {out} "
    usual += "--completions 3 --max-new-tokens 4 --batch-size 6 --changes prompt@mine "
    given = [*f"{usual} --resamples 20 --min-support 5 {more}".split(), *rest]
    return CliRunner().invoke(app, ["stress", *given])


def test_report_gates_and_answers(place):
    met, missed = "mean reward>=-9", "topic=b reward>=9"
    done = stress("--junit out/gates.xml", "--require", met, "--require", missed)
    assert done.exit_code == 1, done.output + done.stderr
    assert f"{met}: met" in done.output and f"{missed}: MISSED" in done.output
    report = json.loads((place.root / "out" / "report.json").read_text())
    model = report["models"]["tiny-llama"]
    assert report["kind"] == "generated" and not report["passed"]
    rewards = {"": [], "prompt@mine": []}
    for line in json_lines(place.root / "out" / FILE)[1:]:
        topic = place.rows[line["number"]]["topic"]
        expected = [answer.count("w") - (topic == "b") for answer in line["completions"]]
        assert line["rewards"] == expected and len(expected) == 3
        rewards[line["change"]].append(sum(expected) / 3)
    plain, mine = (np.array(one) for one in rewards.values())
    assert len(plain) == len(mine) == 12
    assert model["reward"]["value"] == pytest.approx(plain.mean())
    (change,) = model["changes"]
    assert change["lost"]["value"] == pytest.approx((plain - mine).mean())
    page = (place.root / "out" / "report.html").read_text()
    assert "prompt@mine" in page and "max_new_tokens 4" in page and "torch " in page
    assert len(list(ElementTree.parse(place.root / "out" / "gates.xml").iter("testcase"))) == 2


def test_no_texts_are_left_when_the_run_is_complete(place):
    """Nor in the names of groups, ranked and too small ones, nor in what a run goes on from."""
    long = "a patient's record, in more words than a name has"
    rows = [
        row | {"notes": f"{long} {i % 2}", "rare": long * (i == 3)}
        for i, row in enumerate(place.rows)
    ]
    file = place.root / "private.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = stress("--no-texts", data="private.jsonl")
    assert done.exit_code == 0, done.output + done.stderr
    assert "Answers: not kept, as --no-texts asks." in done.output
    left = {path.name: path.read_text() for path in (place.root / "out").iterdir()}
    assert sorted(left) == ["report.html", "report.json"]
    told = json.loads(left["report.json"])["models"]["tiny-llama"]
    assert {*told["ignored_columns"]} == {"notes", "rare"}
    assert [one["group"] for one in told["groups"]["single"]].count({"topic": "a"}) == 1
    for text in (*left.values(), done.output):
        assert "patient" not in text and rows[0]["prompt"] not in text


def test_two_policies_and_a_reward_model(place):
    tiny_llama_dir(place.root / "tiny-reward", rms_norm_eps=0.1).rename(place.root / "other")
    done = stress("--generate other --max-length 8", reward="tiny-reward")
    assert done.exit_code == 0, done.output + done.stderr
    assert "texts were longer than --max-length 8 tokens" in done.output
    refused = stress("--generate other", reward="tiny-reward")  # its rewards would be others
    told = " ".join(refused.stderr.split())
    assert refused.exit_code == 2 and "reward_max_length 8, not 2048" in told
    report = json.loads((place.root / "out" / "report.json").read_text())
    assert list(report["models"]) == ["tiny-llama", "other"]
    made_with = report["models"]["other"]["made_with"]
    assert (made_with["model"], made_with["reward"]) == ("other", "tiny-reward")


def test_ctrl_c_keeps_the_answers_and_the_command_goes_on(place):
    assert stress(out="whole").exit_code == 0
    module = sys.modules["my_letters"]
    module.calls, module.stop_at = 0, 4
    stopped = stress()
    assert stopped.exit_code == 130 and "the same command goes on" in stopped.output
    assert f"out/{FILE}" in stopped.output and not (place.root / "out/report.html").exists()
    file = place.root / "out" / FILE
    assert len(json_lines(file)) == 1 + 3 * 2  # the settings, and three batches of two prompts
    file.write_bytes(file.read_bytes() + b'{"change": "", "numb')
    module.calls, module.stop_at = 0, None
    assert stress().exit_code == 0 and module.calls == 12 - 3
    assert file.read_bytes() == (place.root / "whole" / FILE).read_bytes()
    first, second = (
        json.loads((place.root / out / "report.json").read_text())["models"]
        for out in ("whole", "out")
    )
    assert first == second


def test_ctrl_c_before_the_first_batch(place):
    assert stress(out="other").exit_code == 0
    module = sys.modules["my_letters"]
    module.calls, module.stop_at = 0, 1
    stopped = stress()
    assert stopped.exit_code == 130 and "no batch of answers was finished" in stopped.output
    assert not (place.root / "out").exists()


def test_other_settings_are_refused(place):
    assert stress().exit_code == 0
    page = (place.root / "out/report.html").read_bytes()
    done = stress("--seed 1")
    assert done.exit_code == 2 and "was made with seed 0, not 1" in done.stderr
    assert (place.root / "out/report.html").read_bytes() == page


def test_no_number_is_cut_on_a_narrow_terminal(place, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    done = stress(reward="my_letters:large")
    assert done.exit_code == 0, done.output + done.stderr
    (model,) = json.loads((place.root / "out/report.json").read_text())["models"].values()
    told = (model["reward"], model["worst_change"]["reward"], *model["worst"].values())
    for name, number in zip(("reward", "changed", *model["worst"]), told, strict=True):
        assert re.search(rf"^ *{name} +{number['value']:.3f} *$", done.output, re.MULTILINE)
    assert "…" not in done.output and max(map(len, done.output.splitlines()[:12])) <= 80


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("--model tiny-reward", "takes no --model"),
        ("--scores prompts.jsonl", "takes no --scores"),
        ("--reference tiny-llama", "takes no --reference"),
        ("--best-of prompts.jsonl", "takes no --best-of"),
        ("--generate tiny-reward", "expected a causal language model, got a reward model"),
        ("--generate nowhere", "no directory with a config.json"),
        ("--reward nothing:score", "no module 'nothing'"),
        ("--reward my_letters:nothing", "has no function 'nothing'"),
        ("--reward tiny-llama", "expected a reward model"),
        ("--reward my_letters:short", "expected 6 values, one for each answer, got 5"),
        ("--data nothing.jsonl", "nothing.jsonl"),
        ("--changes typos", "'typos' changes answers"),
        ("--changes prompt@other", "whose other forms are: prompt@mine"),
        ("--temperature 0", "temperature 0 gives one answer"),
        ("--require loss>=1", "cannot be parsed"),
        ("--require worst-change accuracy>=0.5", "reward and lost are known"),
        ("--resamples 3", "resamples must be at least 20"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(place, more, message):
    done = stress("", *more.split(" ", 1))
    assert done.exit_code == 2, done.output
    assert message in done.stderr and len(done.stderr.strip().splitlines()) == 1
    assert not (place.root / "out").exists()


def test_rewards_that_are_none(place):
    done = stress(reward="my_letters:none")
    assert done.exit_code == 2 and "36 of 36 answers have no finite reward" in done.stderr
    assert not (place.root / "out/report.html").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--generate tiny-llama --data prompts.jsonl", "--generate needs --reward"),
        ("--generate tiny-llama --reward my_letters:score", "--generate needs --data"),
        ("--model tiny-reward --data p --reward my_letters:score", "belongs to --generate"),
        (
            "--generate tiny-llama --generate tiny-llama --reward my_letters:score --data p",
            "tiny-llama is given twice",
        ),
    ],
)
def test_what_belongs_together(place, arguments, message):
    done = CliRunner().invoke(app, ["stress", *arguments.split()])
    assert done.exit_code == 2 and message in done.stderr
