"""Padding-free training: the numbers of padded training, from one row without padding."""

from __future__ import annotations

from contextlib import nullcontext
from math import nan

import pytest

pytest.importorskip("trl")

from trl_fixtures import (  # isort: skip
    quiet,
    tiny_encoder_dir,
    tiny_pairs,
    tiny_tokenizer,
)

import steps
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM
from trl.trainer.utils import add_fused_lm_head

from drrlhf.layouts import attention, probe
from drrlhf.layouts import model as layouts
from drrlhf.layouts.layout import Block
from drrlhf.trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer


@pytest.fixture
def both(models, tmp_path):
    """(padded, packed) runs of one method."""

    def both(method, **options):
        return [
            steps.run(
                method,
                models[method],
                str(tmp_path),
                padding_free=free,
                share_prompts=False,
                **options,
            )
            for free in (False, True)
        ]

    return both


def assert_same(padded, packed, atol=5e-6):
    scale = padded["gradients"][0].abs().max()
    assert scale > 1e-3
    torch.testing.assert_close(
        packed["gradients"], padded["gradients"], rtol=0, atol=atol * max(float(scale), 1)
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
    options = {"padding_free": True, "share_prompts": False}
    trainer = steps.trainer("dpo", models["dpo"], str(tmp_path), **options)
    shapes = []
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.compute_loss(trainer.model, dict(batch))  # the first row is preceded by the probe
    layer = trainer.model.model.layers[0]
    layer.register_forward_hook(lambda m, args, output: shapes.append(tuple(args[0].shape)))
    trainer.compute_loss(trainer.model, batch)
    tokens = int(batch["attention_mask"].sum())
    assert tokens < batch["attention_mask"].numel()
    assert shapes == [(1, tokens, 32)]


def test_evaluation_and_prediction(models, tmp_path):
    found = []
    for free in (False, True):
        trainer = steps.trainer(
            "dpo",
            models["dpo"],
            str(tmp_path),
            padding_free=free,
            ambiguity="cvar:0.3",
            trainer_eval_dataset=tiny_pairs(6, seed=1),
        )
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


def in_one_row(model, sequences):
    """Logits (T, V) of a prepared model for sequences behind one another in a row."""
    lengths = torch.tensor([len(one) for one in sequences])
    ends = lengths.cumsum(0).tolist()
    starts = [0, *ends[:-1]]
    blocks = tuple(Block(a, b, a, a) for a, b in zip(starts, ends, strict=True))
    positions = torch.cat([torch.arange(len(one)) for one in sequences])
    with attention.one_row():
        return model(
            input_ids=torch.cat(sequences)[None],
            position_ids=positions[None],
            **{attention.BLOCKS: blocks},
        ).logits[0]


def test_sliding_windows_stay(tmp_path):
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=50,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        sliding_window=4,
        initializer_range=0.3,
    )
    model = MistralForCausalLM(config).eval()
    lengths, ids = [9, 3, 6], torch.randint(0, 50, (3, 9))
    mask = torch.arange(9) < torch.tensor(lengths)[:, None]
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask.long()).logits[mask]
        layouts.prepare(model)
        found = in_one_row(model, [row[:n] for row, n in zip(ids, lengths, strict=True)])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


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


# ---------------------------------------------------------------------- what cannot be known ahead

SMALL = {
    "vocab_size": 210,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
JAMBA = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
    "use_mamba_kernels": False,
}
WINDOW = {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1}
# Name in transformers -> the rest of its configuration. By what each has that might go wrong:
MODELS = {
    "GPT2": {},  # positions that are learned
    "Mistral": {"sliding_window": 9},
    "Gemma3Text": {"sliding_window": 9, "head_dim": 8},  # windows in some layers
    "Qwen3Moe": EXPERTS,
    "Qwen2Moe": WINDOW | EXPERTS | {"shared_expert_intermediate_size": 16},  # window in masks only
    "Nemotron": {"head_dim": 8},  # attention of its own
    "Roberta": {"is_decoder": True},  # positions by place in the row
    "Jamba": JAMBA,  # a state-space layer and a convolution
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
    "RecurrentGemma": {"block_types": ["recurrent", "attention"], "lru_width": 32},
    "Qwen3Next": LINEAR | EXPERTS | {"layer_types": ["linear_attention", "full_attention"]},
}


def made(name, kind="ForCausalLM", scale=0.2, **options):
    """A small random model; its weights have the standard deviation `scale`."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SMALL | MODELS.get(name, {}) | options)
    kind = "LMHeadModel" if name == "GPT2" else kind
    name = "Gemma3" if name == "Gemma3Text" else name
    model = getattr(transformers, name + kind)(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, scale)
    return model


def seen_by(model, longest=None):
    """The first packed row of a model."""
    ids = torch.tensor([[20, 21, 22], [30, 31, 0]])
    labels = {} if hasattr(model, "score") else {"labels": ids, "fused_lm_head": True}
    mask = (ids > 0).long()
    return layouts.OneRow(model, packed=True, share=False, longest=longest)(
        input_ids=ids, attention_mask=mask, **labels
    )


@pytest.mark.parametrize("scale", [0.2, 0.02])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_change_in_a_packed_row_are_refused(name, scale):
    """The verdict is that of longer sequences, packed and alone; 0.02 is how models begin."""
    model = made(name, scale=scale)
    lengths, ids = [20, 17, 23], torch.randint(5, 180, (3, 23))
    with torch.no_grad():
        alone = [model(ids[i, None, :n]).logits[0] for i, n in enumerate(lengths)]
        layouts.prepare(model)
        packed = in_one_row(model, [ids[i, :n] for i, n in enumerate(lengths)])
    alone, packed = (logits.log_softmax(-1) for logits in (torch.cat(alone), packed))
    apart = float((packed - alone).abs().max())
    assert not 1e-5 < apart < 2e-5  # nothing in between
    add_fused_lm_head(model)
    if apart < 1e-5:
        assert seen_by(model).log_probs.shape == (2, 2)
    else:
        number = r"-?\d+\.\d+"
        words = rf"padding_free=False for {type(model).__name__},.* is {number} there and {number} "
        with pytest.raises(ValueError, match=words):
            seen_by(model)
    assert (apart < 1e-5) == (list(MODELS).index(name) < 4)


@pytest.mark.parametrize(("name", "right"), [("Mistral", True), ("Jamba", False)])
@pytest.mark.parametrize("form", ["float64", "bfloat16", "autocast", "lora", "reward"])
def test_probed_as_it_is_trained(name, right, form):
    kind = "ForSequenceClassification" if form == "reward" else "ForCausalLM"
    model = made(name, kind, num_experts=1)  # products of several are not made for float64
    if form == "reward":
        model.score.weight.data.zero_()  # every score is 0
    else:
        add_fused_lm_head(model)
    model = model.to(getattr(torch, form)) if form in ("float64", "bfloat16") else model
    if form == "lora":  # its B is 0 at first
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    layouts.prepare(model)
    model.train()
    frozen = next(m for m in model.modules() if isinstance(m, torch.nn.Linear)).eval()
    before = torch.get_rng_state()
    context = torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast")
    refused = nullcontext() if right else pytest.raises(ValueError, match=r"Jamba.* there and")
    with refused, context:
        seen_by(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training and not frozen.training


def test_the_trainers_probe_before_their_first_step(models, tmp_path):
    arguments = {"train_dataset": tiny_pairs(4), "processing_class": tiny_tokenizer()}
    for policy, reference in (("Mistral", "Jamba"), ("Jamba", "Mistral")):
        config = DPOConfig(str(tmp_path), **quiet(padding_free=True, max_steps=1))
        trainer = DPOTrainer(
            model=made(policy), ref_model=made(reference), args=config, **arguments
        )
        before = trainer.model.lm_head.weight.clone()
        with pytest.raises(ValueError, match="padding_free=False for JambaForCausalLM"):
            trainer.train()
        assert torch.equal(trainer.model.lm_head.weight, before)
    config = RewardConfig(str(tmp_path), **quiet(padding_free=True, max_steps=1))
    model = made("Jamba", "ForSequenceClassification", num_labels=1)
    with pytest.raises(ValueError, match="padding_free=False for JambaForSequenceClassification"):
        RewardTrainer(model=model, args=config, **arguments).train()


def test_sequences_up_to_the_longest_are_probed():
    """A window that packing loses matters from its width on."""
    for longest, wrong in ((8, False), (12, True)):
        model = made("Qwen2Moe")
        add_fused_lm_head(model)
        layouts.prepare(model)
        with pytest.raises(ValueError, match="Qwen2Moe") if wrong else nullcontext():
            seen_by(model, longest)


def test_what_is_right_is_the_attention_that_the_model_came_with():
    def doubled(module, query, key, value, *args, **kwargs):
        return attention.block_attention(module, query, key, 2 * value, *args, **kwargs)

    model = made("Mistral")
    add_fused_lm_head(model)
    layouts.prepare(model)
    transformers.AttentionInterface.register(attention.ATTENTION, doubled)
    try:
        with pytest.raises(ValueError, match="Mistral"):
            seen_by(model)
    finally:
        transformers.AttentionInterface.register(attention.ATTENTION, attention.block_attention)
    assert seen_by(model).log_probs.shape == (2, 2)  # a refused model is tried again


def test_tokens_of_the_probe():
    config = MistralConfig(vocab_size=9, pad_token_id=0, bos_token_id=None, eos_token_id=[1, 8])
    found = set(probe.tokens(config, 10, 10).flatten().tolist())
    assert found == {2, 3, 4, 5, 6, 7}
    few = MistralConfig(vocab_size=2, pad_token_id=0, eos_token_id=1, bos_token_id=0)
    assert set(probe.tokens(few, 10, 10).flatten().tolist()) <= {0, 1}


@pytest.mark.parametrize(("value", "wrong"), [(1.0, False), (1.0 + 1e-3, True), (nan, True)])
def test_numbers_in_a_layout_may_differ_by_rounding_alone(value, wrong):
    config = MistralConfig(vocab_size=9)

    def numbers(ids):
        return probe.Numbers(torch.ones(1, 1), torch.ones(len(ids), 3))

    def alone(ids):
        return [numbers(row) for row in ids], 2.0**-24

    def together(sequences):
        return [probe.Numbers(n.outputs * value, n.hidden) for n in map(numbers, sequences)]

    words = probe.difference(config, alone, together, 20)
    assert (words is not None) == wrong
    assert words is None or f"a log-prob or score is {value:g} there and 1 alone" in words


def test_unit_of_rounding():
    cpu, high = torch.device("cpu"), torch.backends.mkldnn.matmul.fp32_precision
    assert probe.unit_of(torch.float32, cpu) == 2.0**-24
    assert probe.unit_of(torch.bfloat16, cpu) == 2.0**-8
    with torch.autocast("cpu", torch.bfloat16):
        assert probe.unit_of(torch.float32, cpu) == 2.0**-8
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"
    try:
        assert probe.unit_of(torch.float32, cpu) == 2.0**-8
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = high
