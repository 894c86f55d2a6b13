"""The DPO demonstration in a few steps on a tiny random model."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch
from rich.console import Console
from trl_fixtures import tiny_llama_dir, tiny_pairs

from drrlhf.demo import dpo
from drrlhf.files import json_lines
from drrlhf.report import plot_comparison

QUIET = Console(quiet=True)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    """A tiny model whose tokenizer pads with its end-of-sequence token, as SmolLM2's does."""
    path = tiny_llama_dir(tmp_path_factory.mktemp("demo"))
    file = path / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"pad_token": "<eos>"}))
    return path


@pytest.fixture(scope="module")
def outcome(model_dir, tmp_path_factory):
    out = tmp_path_factory.mktemp("out")
    held_out = {"movie": list(tiny_pairs(6, seed=1)), "nyt": list(tiny_pairs(11, seed=2))}
    result = dpo.compare(
        model_dir, list(tiny_pairs(24)), held_out, out, steps=3, learning_rate=0.05, console=QUIET
    )
    return out, held_out, result


def test_both_settings_start_alike_and_see_the_same_pairs(outcome):
    out, _, result = outcome
    plain, robust = (json_lines(out / name / "metrics.jsonl") for name in ("plain", "robust"))
    assert [run["ambiguity"] for run in result["runs"]] == ["erm", "tv:0.1"]
    assert [line["step"] for line in plain] == [line["step"] for line in robust] == [1, 2, 3]
    for name in ("loss", "num_tokens", "logps/chosen", "logps/rejected"):
        assert plain[0][name] == robust[0][name]
    assert [line["num_tokens"] for line in plain] == [line["num_tokens"] for line in robust]
    assert plain[-1]["loss"] != robust[-1]["loss"]
    # before the first step every loss is log 2, a tie: the adversary has nothing to choose
    assert robust[0]["robust/max_weight"] == pytest.approx(1)
    assert all(line["robust/max_weight"] > 1.1 for line in robust[1:])
    assert result["runs"][0]["final_loss"] == plain[-1]["loss"]
    assert all(run["seconds_per_step"] > 0 for run in result["runs"])


def test_the_same_setting_twice_gives_the_same_numbers(model_dir, tmp_path):
    held_out = {"movie": list(tiny_pairs(5, seed=1))}
    pairs = list(tiny_pairs(16))
    result = dpo.compare(
        model_dir, pairs, held_out, tmp_path, ambiguity="erm", steps=2, console=QUIET
    )
    one, other = result["runs"]
    assert one["held_out"] == other["held_out"] and one["final_loss"] == other["final_loss"]


def test_held_out_scores_are_those_of_the_saved_policy(outcome, model_dir):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out, held_out, result = outcome
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    start = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()

    @torch.no_grad()
    def logp(model, prompt: str, completion: str) -> float:
        """One unpadded sequence, plain PyTorch."""
        text = prompt + completion + tokenizer.eos_token
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        logps = model(ids).logits[0, :-1].log_softmax(-1)
        first = len(tokenizer(prompt)["input_ids"]) - 1
        return logps.gather(1, ids[0, 1:, None])[first:].sum().item()

    def margin(model, row) -> float:
        return logp(model, row["prompt"], row["chosen"]) - logp(
            model, row["prompt"], row["rejected"]
        )

    before = {name: [margin(start, row) for row in rows] for name, rows in held_out.items()}
    policy = PeftModel.from_pretrained(start, out / "robust").eval()
    for name, rows in held_out.items():
        pairs = zip(rows, before[name], strict=True)
        margins = torch.tensor([0.1 * (margin(policy, row) - old) for row, old in pairs])
        score = result["runs"][1]["held_out"][name]
        n, accuracy = len(rows), (margins > 0).float().mean().item()
        assert score["pairs"] == n
        # bf16 in the run, float32 here
        assert score["margin"] == pytest.approx(margins.mean().item(), abs=0.02)
        assert abs(score["accuracy"] - accuracy) * n <= (margins.abs() < 0.03).sum()
        error = math.sqrt(score["accuracy"] * (1 - score["accuracy"]) / n)
        assert score["accuracy_error"] == pytest.approx(error)
        assert score["margin_error"] == pytest.approx(
            (margins.var(correction=0) / n).sqrt().item(), abs=0.02
        )


def test_padding_that_is_the_end_token_is_masked_by_length(model_dir, tmp_path):
    from datasets import Dataset
    from transformers import AutoTokenizer

    from drrlhf.trl import DPOTrainer

    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    settings = {"steps": 1, "learning_rate": 1e-3, "max_length": 96, "seed": 0}
    trainer = DPOTrainer(
        model=str(model_dir),
        args=dpo._config(tmp_path, "erm", settings),
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(list(tiny_pairs(8))),
    )
    rows = list(trainer.train_dataset)
    batch = trainer.data_collator(rows)
    sides = ("chosen_ids", "rejected_ids")
    ends = [row[side] for side in sides for row in rows]
    texts = [row["prompt_ids"] + row[side] for side in sides for row in rows]
    assert batch["attention_mask"].sum(1).tolist() == [len(ids) for ids in texts]
    assert batch["completion_mask"].sum(1).tolist() == [len(ids) for ids in ends]
    for ids, attended, completion in zip(
        batch["input_ids"], batch["attention_mask"], batch["completion_mask"], strict=True
    ):
        last = int(attended.sum()) - 1
        assert ids[last] == tokenizer.eos_token_id and completion[last] == 1  # the real end counts
        assert (ids[last + 1 :] == tokenizer.pad_token_id).all() and not completion[
            last + 1 :
        ].any()


def test_table_plot_and_json(outcome, tmp_path):
    _, held_out, result = outcome
    result = result | {"data": "Derived.", "model": "a tiny model"}
    result["domains"] = dict.fromkeys(held_out, "unseen")
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(dpo.table(result))
    text = console.export_text()
    score = result["runs"][1]["held_out"]["nyt"]
    for word in ("erm", "tv:0.1", "movie", "Derived.", "3 steps of 8 pairs"):
        assert word in text
    assert f"{100 * score['accuracy']:.1f} ± {100 * score['accuracy_error']:.1f}" in text
    assert json.loads(json.dumps(result)) == result
    assert plot_comparison(result, tmp_path / "dpo.png").stat().st_size > 5000


def test_the_mixture_has_one_rare_pair_in_twenty(monkeypatch):
    asked = []

    def rows(split, domains, n, seed):
        asked.append((split, domains, n, seed))
        return domains * n

    monkeypatch.setattr(dpo, "preference_rows", rows)
    assert dpo.mixture(40, 3).count("tweets") == 2 and dpo.mixture(8, 3).count("tweets") == 1
    assert {call[0] for call in asked} == {"train"} and {call[3] for call in asked} == {3}
    held_out = dpo.held_out_rows(5, 3)
    assert list(held_out) == ["movie", "tweets", "amazon", "nyt"]
    assert {call[0] for call in asked[4:]} == {"test"}


def test_bad_arguments(model_dir, tmp_path):
    rows = list(tiny_pairs(8))
    for change in ({"steps": 0}, {"train": []}, {"held_out": {"movie": []}}):
        arguments = {"train": rows, "held_out": {"movie": rows}, "steps": 1} | change
        with pytest.raises(ValueError, match="need steps >= 1, training pairs and held-out pairs"):
            dpo.compare(model_dir, output_dir=tmp_path, console=QUIET, **arguments)
    with pytest.raises(ValueError, match="unknown ambiguity"):
        dpo.run(tmp_path / "out", ambiguity="nonsense", console=QUIET)
    assert not (tmp_path / "out").exists()
