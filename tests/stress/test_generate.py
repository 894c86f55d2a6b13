"""Answers of a policy and the reward of each: what is drawn, what is kept, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_fixtures import tiny_llama_dir, tiny_pairs, tiny_reward_dir

from drrlhf import models, reward_inputs
from drrlhf.files import json_lines
from drrlhf.files.tables import DataError
from drrlhf.stress import RewardModel, generate_scores, stress_generated
from drrlhf.stress.generate import chosen_prompt_changes

TYPOS, MINE = "prompt_typos", "prompt@mine"
NAN = float("nan")


def letters(completions, **_):
    return [answer.count("e") / 10 for answer in completions]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    path = tmp_path_factory.mktemp("generated")
    tiny_llama_dir(path)
    tiny_reward_dir(path)
    rows = [
        {"prompt": row["prompt"], "topic": "ab"[i % 2], "bonus": i, MINE: f"so {row['prompt']}"}
        for i, row in enumerate(tiny_pairs(7))
    ]
    rows[2][MINE] = None
    (path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def answered(place, reward=letters, **options):
    usual = {"completions": 3, "max_new_tokens": 5, "changes": MINE, "batch_size": 6}
    return generate_scores(place / "tiny-llama", reward, place / "prompts.jsonl", **usual | options)


def rows_of(place):
    return json_lines(place / "prompts.jsonl")


# ---- answers and rewards -------------------------------------------------------------------------


def test_every_answer_has_its_reward(place):
    asked = []

    def reward(prompts, completions, completion_ids, bonus, topic, **_):
        asked.extend(prompts)
        assert len(prompts) == len(completions) == len(completion_ids) == len(topic)
        assert all(len(ids) <= 5 for ids in completion_ids)
        return [answer.count("w") + one for answer, one in zip(completions, bonus, strict=True)]

    found = answered(place, reward)
    rows = rows_of(place)
    assert found.prompts == [row["prompt"] for row in rows]
    assert list(found.rewards) == ["", MINE]
    assert found.forms[MINE] == [row[MINE] for row in rows]
    for change in found.rewards:
        for i, row in enumerate(rows):
            if change and row[MINE] is None:
                assert np.isnan(found.rewards[change][i]).all() and not found.completions[change][i]
                continue
            assert len(found.completions[change][i]) == 3
            expected = [answer.count("w") + row["bonus"] for answer in found.completions[change][i]]
            assert found.rewards[change][i].tolist() == expected
    # The reward is asked about the prompt as it was, whatever the policy was asked.
    assert set(asked) == set(found.prompts) and len(asked) == 3 * (7 + 6)
    assert found.attributes["topic"].names == ("a", "b") and MINE not in found.attributes
    assert found.asked("").all() and found.asked(MINE).sum() == 6


@pytest.mark.parametrize("change", ["", MINE])
def test_the_likeliest_tokens_are_those_of_the_model_alone(place, change):
    """At temperature 0: prompts of unequal length in one batch, beside each prompt by itself."""
    found = answered(place, temperature=0, completions=1, batch_size=100)
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(place / "tiny-llama").eval()
    prompts = found.prompts if not change else found.forms[change]
    assert len({len(str(prompt).split()) for prompt in prompts}) > 2
    for i, prompt in enumerate(prompts):
        if prompt is None:
            continue
        ids = tokenizer(prompt)["input_ids"]
        new: list[int] = []
        while len(new) < 5 and tokenizer.eos_token_id not in new:
            with torch.no_grad():
                logits = model(torch.tensor([ids + new])).logits[0, -1]
            new.append(int(logits.argmax()))
        assert found.completions[change][i] == [tokenizer.decode(new, skip_special_tokens=True)]
        assert found.cut[change][i].tolist() == [tokenizer.eos_token_id not in new]


def test_answers_are_drawn_from_the_model(place):
    """Of many answers of one token, as many of each as its probability says."""
    (place / "one.jsonl").write_text(json.dumps({"prompt": "how was the film"}) + "\n")
    found = generate_scores(
        place / "tiny-llama",
        letters,
        place / "one.jsonl",
        completions=4000,
        max_new_tokens=1,
        temperature=0.5,
        changes="none",
    )
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny-llama")
    model = AutoModelForCausalLM.from_pretrained(place / "tiny-llama").eval()
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer("how was the film")["input_ids"]])).logits[0, -1]
    chances = torch.softmax(logits / 0.5, 0)
    for token in chances.topk(5).indices.tolist():
        text = tokenizer.decode([token], skip_special_tokens=True)
        share = found.completions[""][0].count(text) / 4000
        chance = float(chances[token])
        assert abs(share - chance) < 5 * (chance * (1 - chance) / 4000) ** 0.5 + 1e-3
    assert len(set(found.completions[""][0])) > 60  # no top_k cuts the tail off


def test_equal_seeds_give_equal_answers_and_disturb_nobody(place):
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    first = answered(place)
    assert torch.equal(torch.rand(2), expected)
    assert answered(place).completions == first.completions
    assert answered(place, seed=1).completions != first.completions
    # Other changes beside it change nothing.
    more = answered(place, changes=f"prompt_preamble,{MINE}")
    assert more.completions[MINE] == first.completions[MINE]
    assert more.completions[""] == first.completions[""]


@pytest.mark.parametrize("messages", [False, True])
def test_a_reward_model_scores_the_prompt_followed_by_the_answer(place, tmp_path, messages):
    rows = rows_of(place)[:3]
    if messages:
        rows = [{"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
    (tmp_path / "p.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = generate_scores(
        place / "tiny-llama",
        RewardModel(place / "tiny-reward"),
        tmp_path / "p.jsonl",
        completions=2,
        max_new_tokens=4,
        changes="prompt_upper_case",
    )
    tokenizer = AutoTokenizer.from_pretrained(place / "tiny-reward")
    model = models.load(place / "tiny-reward", models.REWARD).eval()
    for change, answers in found.completions.items():
        for i, row in enumerate(rows):
            for k, answer in enumerate(answers[i]):
                said = [{"role": "assistant", "content": answer}] if messages else answer
                ids = reward_inputs.reward_ids(tokenizer, row["prompt"], said)
                alone = float(reward_inputs.scores(model, [ids], "cpu")[0])
                assert found.rewards[change][i, k] == pytest.approx(alone, abs=1e-5)
    changed = found.forms["prompt_upper_case"][0]
    assert (changed[0]["content"] if messages else changed).isupper()


def test_adapters_answer(place, tmp_path):
    import peft

    base = AutoModelForCausalLM.from_pretrained(place / "tiny-llama")
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, init_lora_weights=False)
    peft.get_peft_model(base, config).save_pretrained(tmp_path / "lora")
    AutoTokenizer.from_pretrained(place / "tiny-llama").save_pretrained(tmp_path / "lora")
    options = {"completions": 1, "temperature": 0, "max_new_tokens": 8, "changes": "none"}
    data = place / "prompts.jsonl"
    adapted = generate_scores(tmp_path / "lora", letters, data, **options)
    plain = generate_scores(place / "tiny-llama", letters, data, **options)
    assert adapted.completions != plain.completions
    merged = models.load(tmp_path / "lora", models.POLICY).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    AutoTokenizer.from_pretrained(place / "tiny-llama").save_pretrained(tmp_path / "merged")
    whole = generate_scores(tmp_path / "merged", letters, data, **options)
    assert whole.completions == adapted.completions


def test_an_asynchronous_reward(place):
    async def later(completions, **_):
        return letters(completions)

    expected = answered(place, changes="none").rewards[""]
    np.testing.assert_array_equal(answered(place, later, changes="none").rewards[""], expected)


# ---- the file ------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.77, 0.999])
def test_a_file_that_was_cut_anywhere_goes_on(place, tmp_path, share):
    whole, cut = tmp_path / "whole.jsonl", tmp_path / "cut.jsonl"
    first = answered(place, file=whole)
    text = whole.read_bytes()
    cut.write_bytes(text[: int(share * len(text))])
    told = []
    again = answered(place, file=cut, on_progress=lambda *one: told.append(one[1:]))
    assert cut.read_bytes() == text
    for change, rewards in first.rewards.items():
        np.testing.assert_array_equal(again.rewards[change], rewards)
        np.testing.assert_array_equal(again.cut[change], first.cut[change])
    assert again.completions == first.completions
    assert told[-1] == (39, 39) and (told[0][0] > 0) == (share > 0.2)
    assert stress_generated(again, resamples=20) == stress_generated(first, resamples=20)


def test_what_is_finished_is_not_made_again(place, tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    first = answered(place, file=file)

    def never(*_, **__):
        raise AssertionError("loaded")

    monkeypatch.setattr("drrlhf.models.load", never)
    assert answered(place, file=file).completions == first.completions
    # A change less is no other setting; what the file has of it is left alone.
    assert list(answered(place, file=file, changes="none").rewards) == [""]
    with pytest.raises(AssertionError, match="loaded"):
        answered(place, file=file, changes="prompt_preamble")


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"seed": 1}, "seed 0, not 1"),
        ({"completions": 2}, "completions 3, not 2"),
        ({"temperature": 0.5}, "temperature 1.0, not 0.5"),
        ({"max_new_tokens": 4}, "max_new_tokens 5, not 4"),
        ({"batch_size": 3}, "batch_size 6, not 3"),
        ({"reward": len}, "reward 'test_generate:letters', not 'builtins:len'"),
        ({"dtype": torch.bfloat16}, "dtype 'as saved', not 'bfloat16'"),
    ],
)
def test_other_settings_are_refused(place, tmp_path, options, named):
    file = tmp_path / "a.jsonl"
    answered(place, file=file)
    before = file.read_bytes()
    with pytest.raises(ValueError, match=r"a\.jsonl was made with .*remove it to begin anew") as no:
        answered(place, file=file, **options)
    assert named in str(no.value) and file.read_bytes() == before


def test_another_model_or_data_under_the_same_name_is_refused(place, tmp_path):
    rows = rows_of(place)[:3]
    data, file = tmp_path / "p.jsonl", tmp_path / "a.jsonl"

    def run():
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        options = {"completions": 1, "max_new_tokens": 2, "changes": "none", "file": file}
        return generate_scores(tmp_path / "tiny-llama", letters, data, **options)

    tiny_llama_dir(tmp_path)
    first = run()
    assert run().completions == first.completions
    tiny_llama_dir(tmp_path, rms_norm_eps=0.1)
    with pytest.raises(ValueError, match="made with model_files"):
        run()
    tiny_llama_dir(tmp_path)
    rows[0]["bonus"] = 100
    with pytest.raises(ValueError, match="made with data_rows"):
        run()


def test_files_of_another_kind_are_refused(place, tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"loss": 1}\n')
    with pytest.raises(ValueError, match="holds no answers"):
        answered(place, file=file)
    assert file.read_text() == '{"loss": 1}\n'


# ---- mistakes ------------------------------------------------------------------------------------


def test_rewards_of_another_number_or_kind(place, tmp_path):
    file = tmp_path / "out" / "a.jsonl"
    with pytest.raises(ValueError, match="expected 6 values, one for each answer, got 5"):
        answered(place, lambda completions, **_: [1.0] * (len(completions) - 1), file=file)
    for wrong in (lambda **_: None, lambda completions, **_: ["good"] * len(completions)):
        with pytest.raises(ValueError, match="expected a number or None for each answer"):
            answered(place, wrong, file=file)
    assert not file.parent.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"completions": 0}, "completions must be at least 1"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
        ({"batch_size": 0}, "batch_size must be at least 1"),
        ({"seed": -1}, "seed must be at least 0"),
        ({"temperature": -1.0}, "temperature must be a finite number"),
        ({"temperature": NAN}, "temperature must be a finite number"),
        ({"temperature": 0}, "temperature 0 gives one answer"),
        ({"changes": "typos"}, "'typos' changes answers"),
        ({"changes": "prompt_typo"}, "did you mean 'prompt_typos'"),
        ({"changes": "prompt@other"}, "whose other forms are: prompt@mine"),
        ({"max_new_tokens": 254}, "more than the 256 positions of .*lower max_new_tokens"),
    ],
)
def test_arguments_out_of_range(place, options, message):
    with pytest.raises(ValueError, match=message):
        answered(place, **options)


def test_models_that_do_not_answer(place, tmp_path):
    data = place / "prompts.jsonl"
    with pytest.raises(ValueError, match="expected a causal language model, got a reward model"):
        generate_scores(place / "tiny-reward", letters, data)
    with pytest.raises(ValueError, match=r"no directory with a config\.json"):
        generate_scores(tmp_path, letters, data)


def test_which_changes_all_are():
    columns = ["prompt", "topic", MINE, "chosen@other"]
    found = chosen_prompt_changes("all", columns)
    assert TYPOS in found and MINE in found
    assert all(name.startswith("prompt") for name in found) and len(found) > 8
    assert chosen_prompt_changes("none", columns) == []
    assert chosen_prompt_changes(["prompt_typos:0.3"], columns) == ["prompt_typos:0.3"]


def test_a_form_of_another_kind_than_its_prompt(place, tmp_path):
    row = {"prompt": "how was it", MINE: [{"role": "user", "content": "how"}]}
    (tmp_path / "p.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(DataError, match="line 1: 'prompt@mine' is a list, but 'prompt'"):
        generate_scores(place / "tiny-llama", letters, tmp_path / "p.jsonl")


def test_numbers_of_a_csv_are_quarters_and_codes_of_groups_are_names(place, tmp_path):
    lines = [f"what is {i},{i},{i % 2}" for i in range(12)]
    (tmp_path / "p.csv").write_text("\n".join(["prompt,length,group", *lines]))
    found = generate_scores(
        *(place / "tiny-llama", letters, tmp_path / "p.csv"),
        **{"max_new_tokens": 1, "completions": 1, "changes": "none"},
    )
    assert np.bincount(found.attributes["length"].codes).tolist() == [3, 3, 3, 3]
    assert found.attributes["group"].names == ("0", "1")
