"""A text has one score, wherever it is asked for: the one that the model itself gives it alone."""

from __future__ import annotations

import json
import pickle

import pytest

pytest.importorskip("trl")

from trl_fixtures import (  # isort: skip  (first: it settles the environment)
    PAD,
    quiet,
    tiny_encoder_dir,
    tiny_llama_dir,
    tiny_pairs,
    tiny_reward_dir,
    tiny_tokenizer,
)

import numpy as np
import steps
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from trl.trainer.reward_trainer import DataCollatorForPreference

from drrlhf import reward_inputs
from drrlhf.layouts.model import in_rows
from drrlhf.stress.models import RewardModel
from drrlhf.trl import GRPOConfig, RewardConfig, RewardTrainer, grpo, rows

EOS = 1
SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "num_labels": 1,
    "initializer_range": 0.3,
    "bos_token_id": None,
}


def classifier(kind="Llama", pad=PAD):
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SIZES, pad_token_id=pad, eos_token_id=EOS)
    return getattr(transformers, f"{kind}ForSequenceClassification")(config).eval()


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return str(tiny_reward_dir(tmp_path_factory.mktemp("reward")))


def test_a_text_of_no_tokens_has_no_place_for_a_score():
    def tokenizer(text):
        return {"input_ids": [7] * len(text)}

    tokenizer.eos_token = None
    assert reward_inputs.reward_ids(tokenizer, "q", "a") == [7, 7]
    with pytest.raises(ValueError, match="answer: expected a text of at least one token, got ''"):
        reward_inputs.reward_ids(tokenizer, None, "")


PROMPT_TUNING = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=2)


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Bert"])
def test_adapters_that_hide_the_ids_are_for_encoders(tmp_path, kind):
    """What a model gives a text beside a longer one says whether it can be trusted there."""
    torch.manual_seed(0)
    model = get_peft_model(classifier(kind), PROMPT_TUNING).eval()
    short, long = [7, 8, 9, EOS], [10, 11, 12, 13, 14, 15, EOS]
    batch = reward_inputs.padded([short, long], PAD, "cpu")
    with torch.no_grad():
        alone = model(torch.tensor([short]), torch.ones(1, 4)).logits[0]
        beside = model(**batch).logits[0]
    right = kind == "Bert"
    assert torch.allclose(alone, beside, atol=1e-5) == right
    if right:
        torch.testing.assert_close(reward_inputs.scores(model, [short, long], "cpu")[:1], alone)
        return
    with pytest.raises(ValueError, match=r"got PROMPT_TUNING, .* score the padding .* use LoRA"):
        reward_inputs.scores(model, [short, long], "cpu")


def test_such_adapters_are_refused_in_training(reward_model, tmp_path):
    with pytest.raises(ValueError, match=r"got PROMPT_TUNING, .* score the padding .* use LoRA"):
        RewardTrainer(
            model=reward_model,
            args=RewardConfig(str(tmp_path), **quiet()),
            train_dataset=tiny_pairs(4),
            processing_class=tiny_tokenizer(),
            peft_config=PROMPT_TUNING,
        )


# ---- where a classifier reads --------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Mistral", "Qwen2", "Gemma", "OPT", "Bloom"])
@pytest.mark.parametrize("pad", [0, EOS, 37])
def test_positions_are_the_models_own(kind, pad):
    """Rows that end with the pad token, hold it, begin with it, are nothing but it, or do without:
    found by looking up what the model gave among the scores of all tokens."""
    model = classifier(kind, pad)
    ids = torch.tensor(
        [
            [7, 8, 9, pad, pad, pad],
            [7, pad, 9, 10, pad, pad],
            [pad, pad, 9, 10, 11, 12],
            [pad] * 6,
            [7, 8, 9, 10, 11, 12],
            [7, pad, pad, pad, pad, pad],
        ]
    )
    every = []
    model.score.register_forward_hook(lambda module, args, output: every.append(output))
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    read = reward_inputs.score_positions(ids, reward_inputs.pad_token_id(model))
    assert torch.equal(every[0][torch.arange(6), read], found)
    last = every[0][[0, 1, 5], -1] - found[[0, 1, 5]]
    assert last.abs().min() > 1e-5  # the padding does score otherwise


def test_without_a_pad_token_a_classifier_reads_the_last_one():
    model = classifier(pad=None)
    ids = torch.tensor([[7, 8, 9, EOS]])
    every = []
    model.score.register_forward_hook(lambda module, args, output: every.append(output))
    with torch.no_grad():
        found = model(input_ids=ids).logits
    assert reward_inputs.score_positions(ids, None).tolist() == [3]
    assert torch.equal(every[0][0, 3], found[0])


@pytest.mark.parametrize("pad", [None, EOS, PAD])
def test_scores_of_a_batch_are_those_of_each_text_alone(pad):
    model = classifier(pad=pad)
    texts = [[7, 8, 9, EOS], [0, 11, EOS], [12, 13, 14, 15, 16], [17, PAD, 3], [18]]
    with torch.no_grad():
        alone = [model(input_ids=torch.tensor([text])).logits[0, 0] for text in texts]
    found = reward_inputs.scores(model, texts, "cpu")
    torch.testing.assert_close(found, torch.stack(alone), rtol=1e-5, atol=1e-6)
    assert model.config.pad_token_id == pad  # as it was


def test_a_row_scores_texts_without_a_pad_token():
    """A row has room for several texts, whatever the model does without a pad token."""
    model = classifier(pad=None)
    texts = [[7, 8, 9, EOS], [7, 8, 9, 10, 3], [18, 0], [7, 8]]
    expected = reward_inputs.scores(model, texts, "cpu")
    row = in_rows(model)
    assert row is not None
    found = reward_inputs.scores(row, texts, "cpu")
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert model.config.pad_token_id is None  # as it was
    with torch.no_grad(), pytest.raises(ValueError, match=r"config\.pad_token_id"):
        row(**reward_inputs.padded(texts, 0, "cpu"))


# ---- training ------------------------------------------------------------------------------------


def test_selected_pairs_are_read_where_they_were():
    """Rows put together from batches of other lengths, with ends that equal the pad token."""
    collate = DataCollatorForPreference(pad_token_id=EOS)
    draw = torch.Generator().manual_seed(0)

    def text():
        length = int(torch.randint(1, 12, (1,), generator=draw))
        return [*torch.randint(6, 60, (length,), generator=draw).tolist(), EOS]

    batches = [
        collate([{"chosen_ids": text(), "rejected_ids": text()} for _ in range(3)])
        for _ in range(2)
    ]
    model = classifier(pad=EOS)
    with torch.no_grad():
        before = [model(**batch).logits.squeeze(1).view(2, 3) for batch in batches]
        picked = [(1, 2), (0, 1), (1, 0)]
        after = model(**rows.select(batches, picked, EOS)).logits.squeeze(1).view(2, 3)
    wanted = torch.stack([before[b][:, row] for b, row in picked], 1)
    torch.testing.assert_close(after, wanted, rtol=1e-5, atol=1e-6)


def test_batches_padded_on_the_left_are_not_taken_apart():
    batch = {
        "input_ids": torch.tensor([[PAD, 7], [8, 9]]),
        "attention_mask": torch.tensor([[0, 1], [1, 1]]),
    }
    assert not rows.separable(batch)
    assert rows.separable({**batch, "attention_mask": torch.tensor([[1, 0], [1, 1]])})


def pads_with_eos():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def test_a_pad_token_that_is_the_end_token_trains_the_same_packed(reward_model, tmp_path):
    """What is read is the token before the end; TRL's padded run says what that comes to."""
    found = [
        steps.run(
            "reward",
            reward_model,
            str(tmp_path),
            padding_free=free,
            trainer_processing_class=pads_with_eos(),
        )
        for free in (False, True)
    ]
    padded, packed = (run["gradients"][0] for run in found)
    assert padded.abs().max() > 1e-3
    torch.testing.assert_close(packed, padded, rtol=0, atol=5e-6 * float(padded.abs().max()))
    plain = steps.run("reward", reward_model, str(tmp_path))
    assert abs(plain["logs"][0]["loss"] - found[0]["logs"][0]["loss"]) > 1e-3  # the end scores else


def test_a_collator_that_pads_with_something_else_is_refused(reward_model, tmp_path):
    trainer = steps.trainer(
        "reward",
        reward_model,
        str(tmp_path),
        trainer_data_collator=DataCollatorForPreference(pad_token_id=0),
    )
    with pytest.raises(ValueError, match=rf"pads with token 0.*not its pad token {PAD}"):
        trainer.train()


# ---- the stress test and GRPO score what training did --------------------------------------------


def as_trained(trainer, model):
    """Scores of the trainer's own token ids, one text at a time, by transformers alone."""
    with torch.no_grad():
        return [
            [
                model(input_ids=torch.tensor([row[side]])).logits[0, 0].item()
                for row in trainer.train_dataset
            ]
            for side in ("chosen_ids", "rejected_ids")
        ]


def conversations(data):
    def talk(row):
        messages = {"chosen": "assistant", "rejected": "assistant", "prompt": "user"}
        return {k: [{"role": role, "content": row[k].strip()}] for k, role in messages.items()}

    return data.map(talk)


@pytest.mark.parametrize("form", ["texts", "conversations"])
@pytest.mark.parametrize("make", ["own", "end", "encoder"])
def test_stress_and_grpo_pay_what_training_saw(tmp_path, make, form):
    directory = tiny_encoder_dir(tmp_path) if make == "encoder" else tiny_reward_dir(tmp_path)
    data = tiny_pairs(6) if form == "texts" else conversations(tiny_pairs(6))
    tokenizer = pads_with_eos() if make == "end" else tiny_tokenizer()
    trainer = steps.trainer(
        "reward", str(directory), str(tmp_path / "out"), data, trainer_processing_class=tokenizer
    )
    trainer.save_model(str(tmp_path / "saved"))
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    chosen, rejected = as_trained(trainer, saved.eval())
    assert np.ptp(chosen) > 0.01
    rewards = RewardModel(tmp_path / "saved").rewards(list(data), lambda _: None)
    np.testing.assert_allclose(rewards, np.column_stack([chosen, rejected]), atol=1e-5)

    policy = steps.trainer(
        "grpo",
        str(tiny_llama_dir(tmp_path)),
        str(tmp_path / "policy"),
        data,
        trainer_reward_funcs=str(tmp_path / "saved"),
    )
    asked = [{"prompt": row["prompt"]} for row in data]
    for side, wanted in (("chosen", chosen), ("rejected", rejected)):
        paid = policy._calculate_rewards(
            asked, [row["prompt"] for row in asked], data[side][:], [[1]] * len(asked)
        )
        np.testing.assert_allclose(paid[:, 0].tolist(), wanted, atol=1e-5)


def test_grpo_reads_adapters_as_training_did(tmp_path):
    """Their directory has no configuration: the tokenizer beside them says the pad token."""
    lora = LoraConfig(task_type="SEQ_CLS", target_modules=["q_proj"], init_lora_weights=False)
    trainer = steps.trainer(
        "reward",
        str(tiny_reward_dir(tmp_path)),
        str(tmp_path / "out"),
        tiny_pairs(4),
        trainer_processing_class=pads_with_eos(),
        trainer_peft_config=lora,
    )
    trainer.save_model(str(tmp_path / "saved"))
    chosen, _ = as_trained(trainer, trainer.model.eval())
    policy = steps.trainer(
        "grpo",
        str(tiny_llama_dir(tmp_path)),
        str(tmp_path / "policy"),
        tiny_pairs(4),
        trainer_reward_funcs=str(tmp_path / "saved"),
    )
    asked = [{"prompt": row["prompt"]} for row in tiny_pairs(4)]
    paid = policy._calculate_rewards(
        asked, [row["prompt"] for row in asked], tiny_pairs(4)["chosen"][:], [[1]] * 4
    )
    np.testing.assert_allclose(paid[:, 0].tolist(), chosen, atol=1e-5)


def test_columns_with_names_of_arguments_are_no_matter_to_a_reward_model(models, tmp_path):
    """TRL trains with them: it gives a model no columns."""
    plain = tiny_pairs(4).remove_columns(["chosen", "rejected"])
    data = plain.add_column("completions", ["x"] * 4).add_column("prompts", ["y"] * 4)
    found = [
        steps.run(
            "grpo", models["grpo"], str(tmp_path), data=one, trainer_reward_funcs=models["reward"]
        )["logs"][0]["reward"]
        for one in (plain, data)
    ]
    assert found[0] == found[1] != 0


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_what_makes_batches_can_be_sent_to_a_worker(models, tmp_path, kind):
    """As data loader workers that are not forked need it."""
    made = steps.trainer(kind, models[kind], str(tmp_path))
    rows = list(made.train_dataset)[:2]
    sent = pickle.loads(pickle.dumps(made.data_collator))(rows)
    for name, tensor in made.data_collator(rows).items():
        assert torch.equal(sent[name], tensor)


def test_the_pad_token_is_asked_of_the_files_that_trl_loads(tmp_path, monkeypatch):
    """Code of its own, which GRPOConfig(trust_remote_code=True) lets TRL run."""
    folder = tmp_path / "own"
    folder.mkdir()
    code = "import transformers\n\n\nclass Own(transformers.LlamaConfig):\n    model_type = 'own'\n"
    (folder / "own.py").write_text(code)
    told = {"model_type": "own", "pad_token_id": 7, "auto_map": {"AutoConfig": "own.Own"}}
    (folder / "config.json").write_text(json.dumps(told))
    modules = "transformers.dynamic_module_utils.HF_MODULES_CACHE"
    monkeypatch.setattr(modules, str(tmp_path / "modules"))
    for own in ({"trust_remote_code": True}, {"model_init_kwargs": {"trust_remote_code": True}}):
        config = GRPOConfig(str(tmp_path), num_generations=2, **steps.quiet(**own))
        assert grpo._pad_token_ids([str(folder), steps.by_place], config) == [7, None]
