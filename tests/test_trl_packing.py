"""Padding-free training: the numbers of padded training, from one row without padding."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

from trl_fixtures import (  # isort: skip
    quiet,
    tiny_encoder_dir,
    tiny_llama_dir,
    tiny_pairs,
    tiny_reward_dir,
    tiny_tokenizer,
)

import steps
import torch
from peft import LoraConfig, PromptTuningConfig
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from drrlhf.trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, packing


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        "dpo": str(tiny_llama_dir(tmp_path_factory.mktemp("llama"))),
        "reward": str(tiny_reward_dir(tmp_path_factory.mktemp("reward"))),
    }


@pytest.fixture
def both(models, tmp_path):
    """(padded, packed) runs of one method."""

    def both(method, **options):
        return [
            steps.run(method, models[method], str(tmp_path), padding_free=free, **options)
            for free in (False, True)
        ]

    return both


def assert_same(padded, packed):
    scale = padded["gradients"][0].abs().max()
    assert scale > 1e-3
    torch.testing.assert_close(
        packed["gradients"], padded["gradients"], rtol=0, atol=5e-6 * max(float(scale), 1)
    )
    for ours, theirs in zip(packed["logs"], padded["logs"], strict=True):
        assert set(ours) == set(theirs)
        for name in theirs:
            if name not in ("epoch", "step"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ambiguity": "cvar:0.4", "gradient_accumulation_steps": 2},
        {"ambiguity": "tv:0.2", "gradient_checkpointing": True},
        {"trainer_peft_config": "lora", "ambiguity": "tv:0.2"},
        {"precompute_ref_log_probs": True},
        {"use_weighting": True, "ld_alpha": 0.5},
        {"head": "trl"},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_dpo(both, options):
    if options.get("trainer_peft_config"):
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        options = options | {"trainer_peft_config": lora}
    assert_same(*both("dpo", max_steps=2, **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ambiguity": "cvar:0.4", "gradient_accumulation_steps": 2},
        {"trainer_peft_config": "lora", "center_rewards_coefficient": 0.1},
        {"gradient_checkpointing": True},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_reward(both, options):
    if options.get("trainer_peft_config"):
        lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="SEQ_CLS")
        options = options | {"trainer_peft_config": lora}
    assert_same(*both("reward", max_steps=2, **options))


def test_no_padding_reaches_the_model(models, tmp_path):
    trainer = steps.trainer("dpo", models["dpo"], str(tmp_path), padding_free=True)
    shapes = []
    layer = trainer.model.model.layers[0]
    layer.register_forward_hook(lambda m, args, output: shapes.append(tuple(args[0].shape)))
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, batch)
    tokens = int(batch["attention_mask"].sum())
    assert tokens < batch["attention_mask"].numel()
    assert shapes == [(1, tokens, 32)]


def test_evaluation_and_prediction(models, tmp_path):
    found = []
    for free in (False, True):
        trainer = steps.trainer(
            "dpo", models["dpo"], str(tmp_path), padding_free=free, ambiguity="cvar:0.3",
            trainer_eval_dataset=tiny_pairs(6, seed=1),
        )  # fmt: skip
        found.append(trainer.evaluate())
    for name in ("eval_loss", "eval_rewards/margins", "eval_robust/value", "eval_entropy"):
        assert found[1][name] == pytest.approx(found[0][name], rel=1e-4), name
    ids = torch.randint(6, 50, (2, 7))
    plain = AutoModelForCausalLM.from_pretrained(models["dpo"])
    with torch.no_grad():  # the prepared model still takes padded and unpadded batches
        for mask in (None, torch.tensor([[1] * 7, [1] * 4 + [0] * 3])):
            ours, theirs = (
                m(input_ids=ids, attention_mask=mask).logits for m in (trainer.ref_model, plain)
            )
            rows = slice(None) if mask is None else mask.bool()
            torch.testing.assert_close(ours[rows], theirs[rows])
        generated = [
            m.generate(ids[:1], max_new_tokens=5, do_sample=False)
            for m in (trainer.ref_model, plain)
        ]
    assert torch.equal(*generated)


def test_sliding_windows_stay(tmp_path):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, sliding_window=4, initializer_range=0.3,
    )  # fmt: skip
    model = MistralForCausalLM(config).eval()
    lengths, ids = [9, 3, 6], torch.randint(0, 50, (3, 9))
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask.long()).logits[mask]
        packing.prepare(model, "padding_free")
        positions = torch.arange(9).expand(3, 9)[mask][None]
        found = model(input_ids=ids[mask][None], position_ids=positions, packed_lengths=lengths)
    torch.testing.assert_close(found.logits[0], expected, rtol=1e-4, atol=1e-5)


def test_what_cannot_be_packed_is_refused(models, tmp_path):
    arguments = {"train_dataset": tiny_pairs(4), "processing_class": tiny_tokenizer()}
    encoder = str(tiny_encoder_dir(tmp_path))
    config = RewardConfig(str(tmp_path), **quiet(padding_free=True))
    with pytest.raises(ValueError, match=r"padding_free=False for BertForSequenceClass.*causal"):
        RewardTrainer(model=encoder, args=config, **arguments)
    config = DPOConfig(str(tmp_path), **quiet(padding_free=True))
    eager = AutoModelForCausalLM.from_pretrained(models["dpo"], attn_implementation="eager")
    with pytest.raises(ValueError, match=r"attn_implementation='eager', whose mask"):
        DPOTrainer(model=eager, args=config, **arguments)
    prompt = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="with prompt-learning adapters"):
        DPOTrainer(model=models["dpo"], args=config, peft_config=prompt, **arguments)
