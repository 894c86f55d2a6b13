"""The GRPO demonstration in a few steps on a tiny random model."""

from __future__ import annotations

import io
import json

import pytest
from rich.console import Console
from trl_fixtures import tiny_llama_dir, tiny_pairs

from drrlhf.demo import grpo
from drrlhf.demo.sentiment import Text
from drrlhf.report import plot_rewards

QUIET = Console(quiet=True)


def score(prompts, completions, **_):
    return [len(set(c.split())) / 10 - len(p.split()) / 5 for p, c in zip(prompts, completions)]


def prompts(n, seed):
    return [{"prompt": row["prompt"]} for row in tiny_pairs(n, seed=seed)]


def test_more_prompts_than_there_are_texts(monkeypatch):
    texts = [Text("movie", str(i), "so " * 40, 1.0, (1,)) for i in range(3)]
    monkeypatch.setattr(grpo, "load_split", lambda split, domain: texts)
    assert len(grpo.beginnings("train", "movie", 3, 0)) == 3
    with pytest.raises(ValueError, match=r"at most 3 prompts of movie.* got 4; take fewer steps"):
        grpo.beginnings("train", "movie", 4, 0)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    place = tmp_path_factory.mktemp("grpo")
    held_out = {"movie": prompts(4, 1), "nyt": prompts(6, 2)}
    result = grpo.compare(
        tiny_llama_dir(place),
        score,
        lambda seed: prompts(24, seed),
        held_out,
        place / "out",
        steps=3,
        seeds=2,
        learning_rate=0.02,
        console=QUIET,
    )
    result |= {"data": "data", "model": "a model", "domains": {"movie": "95 %", "nyt": "unseen"}}
    return place / "out", result


def test_every_seed_of_every_set_starts_alike(outcome):
    out, result = outcome
    plain, robust = result["runs"]
    assert (plain["ambiguity"], robust["ambiguity"]) == ("erm", "tv:0.1")
    for run in (plain, robust):
        assert [len(seed) for seed in run["training"]] == [3, 3]
        assert all(0 < seconds < 60 for seconds in run["seconds_per_step"])
        assert {name: len(v) for name, v in run["rewards"].items()} == {"movie": 2, "nyt": 2}
    # the same prompts, the same draws of the same model
    assert [s[0] for s in plain["training"]] == [s[0] for s in robust["training"]]
    assert plain["training"][0] != plain["training"][1]
    assert plain["rewards"] != robust["rewards"]
    assert (out / "robust-1" / "adapter_config.json").is_file()
    first = json.loads((out / "robust-0" / "metrics.jsonl").read_text().splitlines()[0])
    assert first["robust/worst_case_reward"] < first["robust/reward"]


def test_table_and_plot_show_what_came_out(outcome, tmp_path):
    _, result = outcome
    console = Console(file=io.StringIO(), width=140)
    console.print(grpo.table(result))
    text = console.file.getvalue()
    mean, error = grpo.mean_and_error(result["runs"][1]["rewards"]["nyt"])
    assert f"{mean:.3f} ± {error:.3f}" in text and "robust - plain" in text
    assert plot_rewards(result, tmp_path / "grpo.png").stat().st_size > 10_000


def test_errors_are_over_seeds():
    assert grpo.mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    mean, error = grpo.mean_and_error([2.0])
    assert mean == 2.0 and error != error  # of one seed there is none


def test_wrong_settings_are_refused(tmp_path):
    with pytest.raises(ValueError, match="steps and seeds must be >= 1"):
        grpo.run(tmp_path, steps=0, console=QUIET)
    with pytest.raises(ValueError, match="ambiguity"):
        grpo.run(tmp_path, ambiguity="nonsense", console=QUIET)
