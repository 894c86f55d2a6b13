"""The commands read what they leave: adapters as --model and --reward, and what is refused."""

from __future__ import annotations

import json
import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from test_cli import _assert_same_weights, _refused, _run, _write
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
)
from trl_fixtures import tiny_llama_dir, tiny_pairs, tiny_reward_dir, tiny_tokenizer

from drrlhf import models
from drrlhf.cli import reward_function, rundir
from drrlhf.files import json_lines
from drrlhf.stress import Policy, score_pairs

FAST = "--batch-size 4 --learning-rate 1e-2 --max-steps 2"
REWARD_BY_LENGTH = "def score(completions, **_):\n    return [len(c) / 10 for c in completions]\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A base model, and what two commands with --lora left of it."""
    root = tmp_path_factory.mktemp("adapters")
    pairs = _write(root / "pairs.jsonl", tiny_pairs(12, group=["a", "b", "a"] * 4))
    found = SimpleNamespace(root=root, pairs=pairs, base=tiny_llama_dir(root))
    for kind in ("reward", "dpo"):
        result = train(found, kind, root / kind, f"--model {found.base} --lora --lora-r 4")
        setattr(found, kind, root / kind)
        setattr(found, f"{kind}_output", result.output)
    (root / "my_length.py").write_text(REWARD_BY_LENGTH)
    return found


def arguments(place, kind, out, more):
    return ["train", kind, *f"--data {place.pairs} --output-dir {out} {FAST} {more}".split()]


def train(place, kind, out, more):
    result = _run(arguments(place, kind, out, more))
    assert result.exit_code == 0, result.output + result.stderr
    return result


def train_steps(out):
    return [line for line in json_lines(out / "metrics.jsonl") if line["event"] == "train"]


def adapters(folder):
    return load_file(folder / "adapter_model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


# ---- one command after another -------------------------------------------------------------------


def test_adapters_name_the_model_under_them_in_full(place, tmp_path, monkeypatch):
    assert "its head is new and begins at random" in place.reward_output
    monkeypatch.chdir(place.root)
    train(place, "dpo", tmp_path / "out", f"--model {place.base.name} --lora")
    saved = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(place.base)


def test_dpo_goes_on_from_adapters_which_are_its_reference(place, tmp_path):
    """At the start policy and reference are equal: the loss is ln 2, and it is the start's weights
    that are kept as reference, which the stress test takes."""
    result = train(place, "dpo", tmp_path / "on", f"--model {place.dpo} --save-steps 1")
    assert f"Training on the adapters of {place.dpo}." in result.output.replace("\n", " ")
    record = json.loads((tmp_path / "on" / "run.json").read_text())["settings"]
    assert record["lora"] is True and record["lora_r"] == 4
    assert train_steps(tmp_path / "on")[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert same(adapters(tmp_path / "on" / "ref"), adapters(place.dpo))
    assert not same(adapters(tmp_path / "on"), adapters(place.dpo))

    found = score_pairs(Policy(tmp_path / "on"), place.pairs).margin
    asked = score_pairs(Policy(tmp_path / "on", reference=place.dpo), place.pairs).margin
    under = score_pairs(Policy(tmp_path / "on", reference=place.base), place.pairs).margin
    assert found == pytest.approx(asked, abs=1e-6) and abs(found).max() > 1e-3
    assert abs(under - asked).max() > 1e-3

    # interrupted after its first step, it goes on to the same weights
    shutil.copytree(tmp_path / "on", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "checkpoint-2")
    again = f"--model {place.dpo} --save-steps 1 --resume"
    train(place, "dpo", tmp_path / "half", again)
    _assert_same_weights(tmp_path / "half", tmp_path / "on")
    assert same(adapters(tmp_path / "half" / "ref"), adapters(place.dpo))

    # and a run of adapters on the base alone leaves no reference of the earlier one
    train(place, "dpo", tmp_path / "half", f"--model {place.base} --lora --overwrite")
    assert not (tmp_path / "half" / "ref").exists()


def test_a_finished_run_gets_its_reference_from_the_checkpoint(place, tmp_path):
    train(place, "dpo", tmp_path / "out", f"--model {place.dpo}")
    shutil.rmtree(tmp_path / "out" / "ref")
    rundir.promote(tmp_path / "out" / "checkpoint-2", tmp_path / "out")
    assert same(adapters(tmp_path / "out" / "ref"), adapters(place.dpo))


def test_grpo_on_adapters_paid_by_adapters(place, tmp_path):
    more = f"--model {place.dpo} --reward {place.reward} --beta 0.1 --num-generations 4"
    train(place, "grpo", tmp_path / "out", f"{more} --max-completion-length 4")
    steps = train_steps(tmp_path / "out")
    assert steps[0]["kl"] == pytest.approx(0, abs=1e-6) and steps[0]["reward"] != 0
    assert f"rewards/{place.reward.name}/mean" in steps[0]


def test_the_reward_is_that_of_the_adapters(place, tmp_path):
    """Against peft's own way, unmerged; the pad token is that of the tokenizer beside them."""
    shutil.copytree(place.reward, tmp_path / "copy")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = "<eos>"
    tokenizer.save_pretrained(tmp_path / "copy")
    loaded = reward_function.load(str(tmp_path / "copy"))
    under = AutoModelForSequenceClassification.from_pretrained(place.base, num_labels=1)
    by_hand = PeftModel.from_pretrained(under, place.reward).eval()
    ids = torch.tensor([[7, 8, 9]])
    with torch.no_grad():
        wanted = by_hand(input_ids=ids).logits
        torch.testing.assert_close(loaded(input_ids=ids).logits, wanted, rtol=1e-5, atol=1e-6)
        with by_hand.disable_adapter():
            assert not torch.allclose(by_hand(input_ids=ids).logits, wanted, rtol=1e-3)
    assert loaded.config.pad_token_id == tokenizer.eos_token_id != under.config.pad_token_id


def test_a_reward_model_goes_on_from_adapters_of_either_kind(place, tmp_path):
    for start in (place.reward, place.dpo):
        began = models.load(start, models.REWARD, trainable=True)
        kept = {k: v for k, v in adapters(start).items() if "lora_" in k}
        found = began.state_dict()
        for name, value in kept.items():
            assert torch.equal(found[name.replace(".weight", ".default.weight")], value)
        out = tmp_path / start.name
        result = train(place, "reward", out, f"--model {start}")
        assert ("its head is new" in result.output) == (start == place.dpo)
        settings = json.loads((out / "adapter_config.json").read_text())
        assert settings["task_type"] == "SEQ_CLS" and not same(adapters(out), adapters(start))
        assert any(name.endswith("score.weight") for name in adapters(out))
        assert models.kind_of(out) == models.REWARD


# ---- what is refused -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two_labels(place):
    path = tiny_reward_dir(place.root / "two")
    config = json.loads((path / "config.json").read_text())
    labels = {"id2label": {"0": "bad", "1": "good"}, "label2id": {"bad": 0, "good": 1}}
    (path / "config.json").write_text(json.dumps(config | labels))
    return path


def test_models_of_another_kind_are_one_line(place, two_labels, tmp_path, monkeypatch):
    monkeypatch.chdir(place.root)
    whole = tiny_reward_dir(tmp_path)
    lost = tmp_path / "lost"
    shutil.copytree(place.dpo, lost)
    text = (lost / "adapter_config.json").read_text()
    (lost / "adapter_config.json").write_text(text.replace(str(place.base), str(tmp_path / "gone")))
    (tmp_path / "empty").mkdir()
    grpo = f"--model {place.base} --reward"
    for kind, more, words in (
        ("dpo", f"--model {whole}", ["a reward model (LlamaForSequenceClassification)"]),
        ("dpo", f"--model {place.reward}", ["a reward model (SEQ_CLS)", "causal language model"]),
        ("grpo", f"--model {whole} --reward my_length:score", ["a reward model"]),
        ("reward", f"--model {two_labels}", ["a classifier of 2 labels"]),
        ("grpo", f"{grpo} {two_labels}", ["--reward", "a reward model of one label, got 2"]),
        ("grpo", f"{grpo} {place.base}", ["expected a reward model", "got LlamaForCausalLM"]),
        ("grpo", f"{grpo} {place.dpo}", ["expected a reward model", "got CAUSAL_LM"]),
        ("grpo", f"{grpo} {tmp_path / 'empty'}", ["config.json or adapter_config.json"]),
        ("dpo", f"--model {tmp_path / 'empty'}", ["config.json or adapter_config.json"]),
        ("dpo", f"--model {place.dpo} --no-lora", ["--no-lora", "merge"]),
        ("dpo", f"--model {place.dpo} --lora-r 8", ["--lora-r 8", "have rank 4"]),
        ("dpo", f"--model {lost}", [f"adapters of the model in {tmp_path / 'gone'}, which is"]),
    ):
        _refused(_run(arguments(place, kind, tmp_path / "out", more)), *words)
    assert not (tmp_path / "out").exists()


def test_a_model_that_is_nowhere_is_named(place, tmp_path, monkeypatch):
    def gone(*_, **__):
        raise OSError("no connection")

    monkeypatch.setattr(models, "adapters_of", lambda name: None)
    monkeypatch.setattr(AutoConfig, "from_pretrained", gone)
    words = ["nowhere: neither a directory here nor a model that the hub gives: no connection"]
    _refused(_run(arguments(place, "dpo", tmp_path / "out", "--model nowhere")), *words)
    with pytest.raises(ValueError, match=f"^--reward {words[0]}; a function is module:function$"):
        reward_function.find("nowhere")


def test_adapters_that_do_not_fit_are_one_line(place, tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig.from_pretrained(place.base, hidden_size=64)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "wide")
    shutil.copytree(place.dpo, tmp_path / "unfit")
    file = tmp_path / "unfit" / "adapter_config.json"
    file.write_text(file.read_text().replace(str(place.base), str(tmp_path / "wide")))
    result = _run(arguments(place, "dpo", tmp_path / "out", f"--model {tmp_path / 'unfit'}"))
    _refused(result, "its adapters do not fit", "size mismatch")


# ---- what --max-length leaves --------------------------------------------------------------------


@pytest.mark.parametrize("kind, more", [("reward", ""), ("dpo", ""), ("dpo", "--precompute-ref")])
def test_what_max_length_empties_is_said(place, tmp_path, kind, more):
    def rows(words, group):
        long = " ".join(["w1"] * words)
        row = {"prompt": long, "chosen": " w2", "rejected": " w3"}
        return [row | ({} if group is None else {"group": group})] * 4

    pairs = _write(tmp_path / "p.jsonl", rows(3, "short") + rows(30, "long"))
    held_out = _write(tmp_path / "h.jsonl", rows(30, "short"))
    both = _write(tmp_path / "b.jsonl", rows(3, "long") + rows(30, "short"))
    given = f"--model {place.base} --lora --max-length 12 --data {pairs} {more}"
    refused = _run(arguments(place, kind, tmp_path / "out", f"{given} --eval-data {held_out}"))
    _refused(refused, "the eval dataset: no pair fits: all 4 are longer than max_length=12")
    output = train(place, kind, tmp_path / "out", f"{given} --eval-data {both}").output
    assert "4 of 8 pairs left out" in output and "4 of 8 held-out pairs left out" in output
    assert "Group long has no pair left: all of its are longer than --max-length 12" in output
    assert "Group short has no held-out pair left" in output


# ---- groups and splits ---------------------------------------------------------------------------


def test_groups_that_are_codes(place, tmp_path):
    codes = [20240115, 7, 20240115] * 4
    pairs = _write(tmp_path / "codes.jsonl", tiny_pairs(12, group=codes))
    known = _write(tmp_path / "known.jsonl", tiny_pairs(4, seed=1, group=[7] * 4))
    other = _write(tmp_path / "other.jsonl", tiny_pairs(4, seed=1, group=[7, 8] * 2))
    given = f"--model {place.base} --data {pairs} --ambiguity group --save-steps 1"
    refused = _run(arguments(place, "dpo", tmp_path / "o", f"{given} --eval-data {other}"))
    _refused(refused, f"{other}: line 2: 'group' must be one of 7, 20240115; got 8")
    assert "group:2" in train(place, "dpo", tmp_path / "o", f"{given} --eval-data {known}").output
    last = train_steps(tmp_path / "o")[-1]
    assert "group/20240115/state" in last and "group/7/weight" in last
    record = json.loads((tmp_path / "o" / "run.json").read_text())
    assert record["settings"]["ambiguity"] == "group:2"
    assert record["data"]["group_names"] == ["7", "20240115"]
    state = tmp_path / "o" / "checkpoint-2" / "drrlhf_state.safetensors"
    assert state.stat().st_size < 1000

    renamed = _write(tmp_path / "renamed.jsonl", tiny_pairs(12, group=[c + 1 for c in codes]))
    more = given.replace(str(pairs), str(renamed)) + " --resume"
    words = ["group names was ['7', '20240115'], now ['8', '20240116']"]
    _refused(_run(arguments(place, "dpo", tmp_path / "o", more)), *words)

    # a set without groups only measures them, so that others may be held out
    given = f"--model {place.base} --data {pairs} --eval-data {other} --ambiguity tv:0.1"
    train(place, "dpo", tmp_path / "tv", given)
    lines = json_lines(tmp_path / "tv" / "metrics.jsonl")
    assert "group/20240115/weight" in lines[0] and "eval_group/8/weight" in lines[-1]
    third = _write(tmp_path / "third.jsonl", tiny_pairs(4, seed=1, group=[9, 7] * 2))
    train(place, "dpo", tmp_path / "tv", given.replace(str(other), str(third)) + " --resume")


def test_splits_of_a_data_set(place, tmp_path):
    from datasets import DatasetDict

    parts = DatasetDict(prefs=tiny_pairs(8), held=tiny_pairs(4, seed=1))
    parts.save_to_disk(str(tmp_path / "d"))
    given = f"--model {place.base} --data {tmp_path / 'd'}"
    train(place, "dpo", tmp_path / "o", f"{given} --split prefs --eval-split held --save-steps 1")
    record = json.loads((tmp_path / "o" / "run.json").read_text())
    assert record["settings"]["ambiguity"] == "erm"  # unless told
    assert (record["settings"]["split"], record["settings"]["eval_split"]) == ("prefs", "held")
    assert record["data"]["rows"] == 8 and "eval" in record["result"]
    _refused(_run(arguments(place, "dpo", tmp_path / "p", given)), "split 'train'")
    more = f"--model {place.base} --split prefs"
    _refused(_run(arguments(place, "dpo", tmp_path / "p", more)), "a file holds one split only")

    stress = f"stress --model {place.dpo} --data {tmp_path / 'd'} --output-dir {tmp_path / 's'}"
    result = _run([*stress.split(), "--split", "held"])
    assert result.exit_code == 0, result.output + result.stderr
    assert json.loads((tmp_path / "s" / "report.json").read_text())["models"]["dpo"]["pairs"] == 4
    _refused(_run(["stress", "--scores", str(place.pairs), "--split", "held"]), "--split belongs")
