"""Pairs scored by a reward model, and again after changes that leave the meaning alone."""

from __future__ import annotations

import hashlib
import json
from functools import partial

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
)
from trl_fixtures import TEXT, tiny_encoder_dir, tiny_llama_dir, tiny_reward_dir
from typer.testing import CliRunner

from drrlhf.cli import app
from drrlhf.data import DataError
from drrlhf.stress import (
    Policy,
    RewardModel,
    load_candidates,
    load_judge,
    score_pairs,
    stress_test,
)
from drrlhf.stress.run import FEW_PROMPTS
from drrlhf.transformations import SIDES
from drrlhf.transformations.sayings import PREAMBLE, SENTENCE

WORDS = sorted(set(TEXT.split()))


def rows(n=40, seed=0):
    rng = np.random.default_rng(seed)

    def text(low, high):
        return " " + " ".join(rng.choice(WORDS, rng.integers(low, high)))

    return [
        {"prompt": f"how w{i}", "chosen": text(3, 12), "rejected": text(2, 9), "topic": "ab"[i % 2]}
        for i in range(n)
    ]


def written(path, some):
    path.write_text("\n".join(map(json.dumps, some)) + "\n")
    return path


def one_by_one(directory, texts):
    """Each text alone, without padding, as the model's own pipeline would score it."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()
    with torch.no_grad():
        return np.array(
            [
                model(**tokenizer(text + (tokenizer.eos_token or ""), return_tensors="pt"))
                .logits[0, 0]
                .item()
                for text in texts
            ]
        )


@pytest.mark.parametrize("make", [tiny_reward_dir, tiny_encoder_dir])
def test_batches_score_as_single_texts(tmp_path, make):
    directory, some = make(tmp_path), rows()
    found = score_pairs(RewardModel(directory), written(tmp_path / "d.jsonl", some))
    wanted = [
        one_by_one(directory, [r["prompt"] + r[side] for r in some])
        for side in ("chosen", "rejected")
    ]
    np.testing.assert_allclose(found.margin, wanted[0] - wanted[1], atol=1e-5)
    assert set(found.attributes) >= {"topic", "answer lengths"}
    lengths = [len(r["chosen"]) - len(r["rejected"]) for r in some]
    assert found.longer.tolist() == lengths


def test_messages_are_scored_through_the_chat_template(tmp_path):
    directory = tiny_reward_dir(tmp_path)
    some = [
        {
            "prompt": [{"role": "user", "content": r["prompt"]}],
            **{
                side: [{"role": "assistant", "content": r[side].strip()}]
                for side in ("chosen", "rejected")
            },
        }
        for r in rows(8)
    ]
    found = score_pairs(RewardModel(directory), written(tmp_path / "d.jsonl", some))
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForSequenceClassification.from_pretrained(directory).eval()

    def score(row, side):
        ids = tokenizer.apply_chat_template(
            [*row["prompt"], *row[side]], return_tensors="pt", return_dict=True
        )
        with torch.no_grad():
            return model(**ids).logits[0, 0].item()

    wanted = [score(row, "chosen") - score(row, "rejected") for row in some]
    np.testing.assert_allclose(found.margin, wanted, atol=1e-5)
    assert found.longer.tolist() == [
        len(r["chosen"][0]["content"]) - len(r["rejected"][0]["content"]) for r in some
    ]


def test_long_texts_keep_their_end_and_are_counted(tmp_path):
    directory = tiny_reward_dir(tmp_path)
    model = RewardModel(directory, max_length=6)
    row = {"prompt": "how was the film ", "chosen": " it was very very good"}
    ids = model._text(row, "chosen").ids
    whole = model.tokenizer("how was the film  it was very very good<eos>")["input_ids"]
    assert list(ids) == whole[-6:]
    model.rewards([row | {"rejected": " it was very very bad"}] * 3, lambda answers: None)
    assert model.cut == 2  # different texts


def test_a_policy_is_no_reward_model_and_the_other_way_round(tmp_path):
    with pytest.raises(ValueError, match="expected a sequence-classification model"):
        RewardModel(tiny_llama_dir(tmp_path / "policy"))
    with pytest.raises(ValueError, match="expected a causal language model"):
        Policy(tiny_reward_dir(tmp_path / "reward"), reference="x")
    with pytest.raises(ValueError, match="reward model, which has none"):
        load_judge(tiny_reward_dir(tmp_path / "again"), reference="x")


# ---- policies ------------------------------------------------------------------------------------


def logp(model, ids, start):
    """log p(ids[start:] | ids[:start]) by full logits."""
    ids = torch.tensor(ids)[None]
    with torch.no_grad():
        logps = model(input_ids=ids).logits[0, :-1].double().log_softmax(-1)
    return logps.gather(1, ids[0, 1:, None])[start - 1 :].sum().item()


def log_ratio(policy, reference, tokenizer, row, side):
    ids = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token)["input_ids"]
    start = len(tokenizer(row["prompt"])["input_ids"])
    return logp(policy, ids, start) - logp(reference, ids, start)


def with_adapters(directory, base, task="CAUSAL_LM", **options):
    """LoRA adapters that do something, saved."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(
        base, LoraConfig(target_modules=["q_proj", "v_proj"], r=2, task_type=task, **options)
    )
    torch.manual_seed(3)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "score" in name:
            torch.nn.init.normal_(parameter, std=0.5)
    model.save_pretrained(directory)
    AutoTokenizer.from_pretrained(base.name_or_path).save_pretrained(directory)
    return model.eval()


@pytest.mark.parametrize("adapters", [False, True])
def test_policy_margins_are_log_ratios_to_the_reference(tmp_path, adapters):
    start, some = tiny_llama_dir(tmp_path / "start"), rows(12)
    base = AutoModelForCausalLM.from_pretrained(start)
    reference = AutoModelForCausalLM.from_pretrained(start).eval()
    if adapters:
        trained = with_adapters(tmp_path / "trained", base)
        judge = load_judge(tmp_path / "trained", beta=0.3)
    else:
        torch.manual_seed(2)
        for parameter in base.parameters():
            parameter.data += 0.05 * torch.randn_like(parameter)
        base.save_pretrained(tmp_path / "trained")
        AutoTokenizer.from_pretrained(start).save_pretrained(tmp_path / "trained")
        trained, judge = base.eval(), load_judge(tmp_path / "trained", reference=start, beta=0.3)
    found = score_pairs(judge, written(tmp_path / "d.jsonl", some))
    tokenizer = AutoTokenizer.from_pretrained(start)
    wanted = [
        0.3
        * (
            log_ratio(trained, reference, tokenizer, row, "chosen")
            - log_ratio(trained, reference, tokenizer, row, "rejected")
        )
        for row in some
    ]
    np.testing.assert_allclose(found.margin, wanted, atol=1e-4)
    assert found.forms


def test_policy_reads_messages_and_cuts_the_end(tmp_path):
    directory = tiny_llama_dir(tmp_path)
    judge = Policy(directory, reference=directory, max_length=7)
    row = {
        "prompt": [{"role": "user", "content": "how was it"}],
        "chosen": [{"role": "assistant", "content": "very good"}],
        "rejected": [{"role": "assistant", "content": "not good"}],
    }
    chosen, rejected = judge._texts(row)
    words = judge.tokenizer.convert_ids_to_tokens(chosen.ids)
    assert words == ["<|user|>", "how", "was", "it", "<eos>", "<|assistant|>", "very"]
    assert chosen.start == rejected.start == 6 and chosen.cut and rejected.cut
    judge.max_length = 6  # nothing is left of the answers
    assert np.isnan(judge._score(judge._texts(row))).all()
    same = Policy(directory, reference=directory)
    np.testing.assert_array_equal(same._score(same._texts(row)), [0, 0])


def test_adapters_of_a_reward_model(tmp_path):
    start, some = tiny_llama_dir(tmp_path / "start"), rows(8)
    base = AutoModelForSequenceClassification.from_pretrained(start, num_labels=1)
    base.config.pad_token_id = 0
    model = with_adapters(tmp_path / "trained", base, "SEQ_CLS", modules_to_save=["score"])
    judge = load_judge(tmp_path / "trained")
    found = judge.rewards(some, lambda _: None) @ [1, -1]
    tokenizer = AutoTokenizer.from_pretrained(start)

    def reward(row, side):
        ids = tokenizer(row["prompt"] + row[side] + tokenizer.eos_token, return_tensors="pt")
        with torch.no_grad():
            return model(**ids).logits[0, 0].item()

    wanted = [reward(row, "chosen") - reward(row, "rejected") for row in some]
    np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert np.ptp(wanted) > 0.01


# ---- changes -------------------------------------------------------------------------------------


def test_every_form_of_a_text_is_scored_as_the_text_itself(tmp_path):
    directory, some = tiny_reward_dir(tmp_path), rows(12)
    data = written(tmp_path / "d.jsonl", some)
    names = ["sentence", "empty", "prompt_preamble"]
    found = score_pairs(RewardModel(directory), data, changes=names)
    assert list(found.forms) == names
    # The words are lower case already: there is nothing to measure.
    with pytest.raises(ValueError, match="'lower_case' would change none of the 12 pairs"):
        score_pairs(RewardModel(directory), data, changes=[*names, "lower_case"])
    assert "lower_case" not in score_pairs(RewardModel(directory), data).forms

    def rewards(of):
        return np.column_stack([one_by_one(directory, [of(r)[i] for r in some]) for i in (0, 1)])

    close = partial(np.testing.assert_allclose, atol=1e-5)
    whole = rewards(lambda r: [r["prompt"] + r[side] for side in SIDES])
    close(found.rewards, whole)
    close(found.margin, whole[:, 0] - whole[:, 1])
    close(
        found.forms["sentence"],
        rewards(lambda r: [r["prompt"] + r[side] + SENTENCE for side in SIDES]),
    )
    close(
        found.forms["prompt_preamble"],
        rewards(lambda r: [PREAMBLE + r["prompt"] + r[side] for side in SIDES]),
    )
    assert np.isnan(found.forms["empty"][:, 0]).all()
    # What joins an answer to its prompt stays.
    close(found.forms["empty"][:, 1], one_by_one(directory, [r["prompt"] + " " for r in some]))
    result = stress_test(found, resamples=20)["models"]["model"]
    assert {(one["change"], one["sides"]) for one in result["changes"]} == {
        *(("sentence", side) for side in ("chosen", "rejected", "both")),
        ("empty", "rejected"),
        ("prompt_preamble", "prompt"),
    }
    assert result["prompts"] == 12 < FEW_PROMPTS and "Only 12" in result["notes"][0]
    turned = found.examples.get("sentence/rejected", [])
    assert all(one["after"] == {"rejected": one["rejected"] + SENTENCE} for one in turned)
    assert all(one["margin"] > 0 > one["margin_after"] for one in turned)


def test_other_forms_come_from_columns(tmp_path):
    directory, some = tiny_reward_dir(tmp_path), rows(6)
    for r in some[:4]:
        r["chosen@short"] = " very good"
        r["prompt@polite"] = "please, " + r["prompt"]
    data = written(tmp_path / "d.jsonl", some)
    found = score_pairs(RewardModel(directory), data, changes="@short,prompt@polite")
    assert list(found.forms) == ["@short", "prompt@polite"]
    short, polite = found.forms.values()
    expected = one_by_one(directory, [r["prompt"] + " very good" for r in some[:4]])
    np.testing.assert_allclose(short[:4, 0], expected, atol=1e-5)
    assert np.isnan(short[4:]).all() and np.isnan(short[:, 1]).all()
    expected = one_by_one(directory, [r["prompt@polite"] + r["rejected"] for r in some[:4]])
    np.testing.assert_allclose(polite[:4, 1], expected, atol=1e-5)
    assert not [name for name in found.attributes if "@" in name]
    everything = score_pairs(RewardModel(directory), data)
    assert set(everything.forms) > {"@short", "prompt@polite", "typos", "empty"}
    for wrong, said in (("@long", "chosen@long"), ("tpyos", "tpyos")):
        with pytest.raises(ValueError, match=said):
            score_pairs(RewardModel(directory), data, changes=wrong)
    assert not score_pairs(RewardModel(directory), data, changes="none").forms


def test_changes_are_tried_on_some_prompts_of_a_large_set(tmp_path):
    some = [r | {"prompt": f"how w{i // 2}"} for i, r in enumerate(rows(40))]
    data = written(tmp_path / "d.jsonl", some)
    model = RewardModel(tiny_reward_dir(tmp_path))
    found = score_pairs(model, data, changes="sentence", changed_pairs=10, seed=3)
    tried = np.isfinite(found.forms["sentence"]).all(1)
    assert tried.sum() == 10 and (tried[0::2] == tried[1::2]).all() and len(found) == 40
    again = score_pairs(model, data, changes="sentence", changed_pairs=10, seed=3)
    other = score_pairs(model, data, changes="sentence", changed_pairs=10, seed=4)
    assert (np.isfinite(again.forms["sentence"]).all(1) == tried).all()
    assert (np.isfinite(other.forms["sentence"]).all(1) != tried).any()


def test_every_different_text_is_read_once(tmp_path):
    model, seen = RewardModel(tiny_reward_dir(tmp_path)), []
    score = model._score
    model._score = lambda batch: seen.extend(batch) or score(batch)
    score_pairs(model, written(tmp_path / "d.jsonl", rows(10)), changes="typos,empty,sentence")
    assert len(seen) == len(set(seen)) > 40


def test_a_change_whose_scores_are_not_numbers_is_left_out_and_told(tmp_path, caplog):
    model = RewardModel(tiny_reward_dir(tmp_path))
    score = model._score
    model._score = lambda batch: np.where([len(t.ids) > 25 for t in batch], np.inf, score(batch))
    data = written(tmp_path / "d.jsonl", rows(20))
    found = score_pairs(model, data, changes="sentence,empty")
    assert [*found.forms] == ["empty"] and len(found) == 20
    assert "change 'sentence' is left out" in caplog.text and "NaN or infinite" in caplog.text


def test_a_policy_without_prompts_is_tried_under_what_can_be_scored(tmp_path, caplog):
    policy = tiny_llama_dir(tmp_path / "policy", rms_norm_eps=0.1)
    reference = tiny_llama_dir(tmp_path / "reference")
    some = [{side: row[side].strip() for side in SIDES} for row in rows(20)]
    data = written(tmp_path / "d.jsonl", some)
    found = score_pairs(Policy(policy, reference=reference), data, changes="empty,sentence")
    assert "sentence" in found.forms and len(found) == 20


def test_margins_after_a_change_come_from_files_too(tmp_path):
    some = [{"margin": 1.0 - i % 3, "margin@swapped": i % 3 - 1.0} for i in range(30)]
    result = stress_test(written(tmp_path / "s.jsonl", some), resamples=20)["models"]["model"]
    (one,) = result["changes"]
    assert one["change"] == "swapped" and one["flipped"] == pytest.approx(2 / 3)


# ---- the command ---------------------------------------------------------------------------------


def test_model_and_data(tmp_path):
    directory, data = tiny_reward_dir(tmp_path), written(tmp_path / "d.jsonl", rows())
    done = CliRunner().invoke(
        app,
        [
            "stress",
            "--model",
            str(directory),
            "--data",
            str(data),
            "--output-dir",
            str(tmp_path / "out"),
            "--max-length",
            "8",
        ],
    )
    assert done.exit_code == 0, done.output
    assert "longer than --max-length 8" in done.output
    # The scores are kept, and say the same when they are read again.
    (kept,) = (tmp_path / "out").glob("*.scores.parquet")
    again = CliRunner().invoke(
        app, ["stress", "--scores", str(kept), "--output-dir", str(tmp_path / "again")]
    )
    assert again.exit_code == 0, again.output
    first, second = (
        next(iter(json.loads((tmp_path / name / "report.json").read_text())["models"].values()))
        for name in ("out", "again")
    )
    assert first | {"source": None} == second | {"source": None}


@pytest.mark.parametrize("kept", [True, False])
def test_no_texts_leave(tmp_path, kept):
    some = [
        row
        | {"prompt": f"secret prompt {i}", "rejected": f"{row['rejected']} secret{i}"}
        | {"note": f"a secret that is long enough to be a text of its own, {i}"}
        | {"votes": {"a secret that is long enough to be a text, as a key": i}}
        for i, row in enumerate(rows())
    ]
    given = ["--model", tiny_reward_dir(tmp_path)]
    given += ["--data", written(tmp_path / "d.jsonl", some), "--output-dir", tmp_path / "out"]
    done = CliRunner().invoke(app, ["stress", *map(str, given), *([] if kept else ["--no-texts"])])
    assert done.exit_code == 0, done.output
    files = list((tmp_path / "out").iterdir())
    assert len(files) == 3
    told = {path.name for path in files if b"secret" in path.read_bytes()}
    assert told == ({path.name for path in files} if kept else set())


def test_what_is_no_text_stays_without_texts(tmp_path):
    """Gold scores and scores of candidates are lists of numbers, and ids of prompts may be longer
    than names: pairs of one prompt belong together still."""
    ids = [hashlib.sha256(bytes([i // 2])).hexdigest() for i in range(40)]
    some = [row | {"question_id": ids[i], "tags": ["a secret"]} for i, row in enumerate(rows())]
    file = tmp_path / "c.jsonl"
    texts = [{"candidates": ["w1 secret", "w2", f"w{i}"], "gold": [0.5, 1, 2]} for i in range(30)]
    file.write_text(
        "".join(
            json.dumps(row | {"id": ids[0][:-2] + f"{i:02}"}) + "\n" for i, row in enumerate(texts)
        )
    )
    out = tmp_path / "out"
    given = ["--model", tiny_reward_dir(tmp_path), "--data", written(tmp_path / "d.jsonl", some)]
    given += ["--best-of", file, "--changes", "none", "--no-texts", "--output-dir", out]
    given += ["--prompt-column", "question_id"]
    done = CliRunner().invoke(app, ["stress", *map(str, given)])
    assert done.exit_code == 0, done.output
    kept = load_candidates(out / "tiny-reward.candidates.parquet")
    assert [one.tolist() for one in kept.gold] == [[0.5, 1, 2]] * 30 and kept.scores is not None
    (model,) = json.loads((out / "report.json").read_text())["models"].values()
    assert (model["pairs"], model["prompts"]) == (40, 20)
    for path in out.iterdir():
        assert not any(one in path.read_bytes() for one in (b"secret", ids[0][:-2].encode()))


def test_a_prompt_column_that_is_not_there_costs_no_scoring(tmp_path):
    class Asked:
        def rewards(self, rows, advance):
            raise AssertionError("the model was asked")

    data = written(tmp_path / "d.jsonl", rows(4))
    with pytest.raises(DataError, match="no column 'author' of prompts; found: prompt, topic"):
        score_pairs(Asked(), data, prompt_column="author")


LONG = "a topic whose name is as long as a text is, or longer"
GATES = {  # what a gate names, and whether the report will have it
    "tv:0.1 accuracy>=0": True,
    "topic=a accuracy>=0": True,
    f"long={LONG} accuracy>=0": True,
    "typos:0.5/rejected lost<=1": True,
    "worst-change accuracy>=0": True,
    "best-of-2 gold>=best-of-1": True,
    "topic=c accuracy>=0": False,
    "bullets accuracy>=0": False,
    "best-of-4 gold>=best-of-1": False,
    "hard accuracy>=0": False,
}


@pytest.mark.parametrize("texts", [True, False])
@pytest.mark.parametrize("gate", GATES)
def test_a_gate_on_what_the_report_will_not_have_costs_no_scoring(
    tmp_path, monkeypatch, gate, texts
):
    class AskedError(Exception):
        pass

    def load(*arguments, **options):
        raise AskedError

    monkeypatch.setattr("drrlhf.stress.load_judge", load)
    some = [row | {"long": LONG if row["topic"] == "a" else "short"} for row in rows(80)]
    file = written(
        tmp_path / "c.jsonl", [{"candidates": ["w1", "w2"], "gold": [0, 1]} for _ in range(30)]
    )
    given = ["--model", tmp_path, "--data", written(tmp_path / "d.jsonl", some), "--require", gate]
    given += ["--best-of", file, "--changes", "typos:0.5", "--output-dir", tmp_path / "out"]
    given += [] if texts else ["--no-texts"]
    done = CliRunner().invoke(app, ["stress", *map(str, given)])
    if GATES[gate] and (texts or LONG not in gate):
        assert isinstance(done.exception, AskedError), done.output
    else:
        assert done.exit_code == 2 and "the report has no" in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("wrong", ["none", "policy", "data"])
def test_what_cannot_be_scored(tmp_path, wrong):
    directory = tiny_llama_dir(tmp_path) if wrong == "policy" else tiny_reward_dir(tmp_path)
    model = tmp_path / "nothing" if wrong == "none" else directory
    some = [{"chosen": "a"}] if wrong == "data" else rows(4)
    done = CliRunner().invoke(
        app,
        [
            "stress",
            "--model",
            str(model),
            "--data",
            str(written(tmp_path / "d.jsonl", some)),
            "--output-dir",
            str(tmp_path / "out"),
        ],
    )
    wanted = {
        "none": "no directory with a config.json",
        "policy": "give that as reference (--reference DIR)",
        "data": "missing column 'rejected'",
    }[wrong]
    assert done.exit_code == 2 and wanted in " ".join(done.output.split())
    assert not (tmp_path / "out").exists()


def test_data_errors_name_the_line(tmp_path):
    with pytest.raises(DataError, match="line 2"):
        score_pairs(
            RewardModel(tiny_reward_dir(tmp_path)),
            written(tmp_path / "d.jsonl", [*rows(1), {"chosen": "", "rejected": "x"}]),
        )
