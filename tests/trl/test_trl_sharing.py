"""Shared prompts: the numbers of a batch without them, from a row that has each prompt once."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

from trl_fixtures import (  # isort: skip
    quiet,
    tiny_pairs,
    tiny_tokenizer,
)

import steps
import test_trl_packing
import torch
from peft import LoraConfig
from transformers import AutoModelForCausalLM, HfArgumentParser
from trl.trainer.utils import add_fused_lm_head

from drrlhf.layouts import attention, layout
from drrlhf.layouts import model as layouts
from drrlhf.trl import DPOConfig, DPOTrainer, GRPOConfig, RewardConfig, one_row, prompts


@pytest.fixture
def both(models, tmp_path, monkeypatch):
    """(without, with) common prompts once: runs of one method, the second of which did so."""
    rows = []
    laid_out = layout.shared

    def counted(*args, **named):
        rows.append(laid_out(*args, **named))
        return rows[-1]

    monkeypatch.setattr(layout, "shared", counted)

    def both(method, **options):
        found = [
            steps.run(method, models[method], str(tmp_path), share_prompts=share, **options)
            for share in (False, True)
        ]
        assert max(row.saved for row in rows) > 0.2  # the probe's too
        return found

    return both


def assert_same(apart, shared):
    test_trl_packing.assert_same(apart, shared, atol=2e-6)


OPTIONS = [
    {},
    {"padding_free": True},
    {"ambiguity": "cvar:0.4", "gradient_accumulation_steps": 2},
    {"ambiguity": "tv:0.2", "gradient_checkpointing": True},
    {"trainer_peft_config": "lora", "ambiguity": "tv:0.2"},
    {"precompute_ref_log_probs": True},
    {"use_weighting": True, "ld_alpha": 0.5},
    {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
    {"head": "trl"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options) or "plain")
def test_dpo(both, options):
    if options.get("trainer_peft_config"):
        lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
        options = options | {"trainer_peft_config": lora}
    assert_same(*both("dpo", max_steps=2, **options))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ambiguity": "cvar:0.4", "gradient_accumulation_steps": 2, "padding_free": True},
        {"gradient_checkpointing": True, "center_rewards_coefficient": 0.1},
    ],
    ids=lambda options: ",".join(options) or "plain",
)
def test_reward(both, options):
    assert_same(*both("reward", max_steps=2, **options))


def test_a_margin_does_not_keep_prompts_apart(models, tmp_path, monkeypatch):
    """It is the loss's, and no input of the model."""
    found, lay = [], layouts.OneRow._layout
    monkeypatch.setattr(
        layouts.OneRow, "_layout", lambda *given: found.append(lay(*given)) or found[-1]
    )
    data = tiny_pairs(8, margin=[0.5] * 8)
    steps.run("reward", models["reward"], str(tmp_path), data=data, share_prompts=True)
    assert found and all(row is not None and row.saved > 0.1 for row in found)


GRPO = {"per_device_train_batch_size": 4, "num_generations": 4, "max_steps": 2, "beta": 0.1}


@pytest.mark.parametrize(
    "options",
    [
        {"loss_type": "dapo"},
        {"ambiguity": "tv:0.3", "gradient_accumulation_steps": 2, "loss_type": "grpo"},
        {"ambiguity": "cvar:0.4", "gradient_accumulation_steps": 2, "loss_type": "bnpo"},
        {"gradient_accumulation_steps": 2, "loss_type": "dr_grpo"},
        {"steps_per_generation": 4, "gradient_accumulation_steps": 2, "num_iterations": 2},
        {"gradient_accumulation_steps": 4, "steps_per_generation": 2, "head": "trl"},
    ],
    ids=lambda options: ",".join(map(str, options.values())),
)
def test_grpo(both, options):
    apart, shared = both("grpo", **GRPO | options)
    for run in (apart, shared):
        for log in run["logs"]:
            log.pop("step_time")
            if "gradient_accumulation_steps" in options:  # means by batch, whose tokens are others
                for name in [n for n in log if n.startswith(("entropy", "kl", "clip_ratio"))]:
                    log.pop(name)
    assert_same(apart, shared)


def test_completions_of_a_prompt_come_together():
    """Four completions of each of three prompts, dealt out at random to three batches."""
    prompt = torch.tensor([0, 1, 2] * 4)[
        torch.randperm(12, generator=torch.Generator().manual_seed(0))
    ]
    ids = torch.tensor([[9, 4], [9, 3], [8, 7]])[prompt]
    whole = {"prompt_ids": ids, "value": torch.arange(12.0), "items": torch.tensor(7), "none": None}
    batches = [
        {k: v[i : i + 4] if v is not None and v.ndim else v for k, v in whole.items()}
        for i in (0, 4, 8)
    ]
    found = prompts.together(batches)
    assert all(len(batch["prompt_ids"].unique(dim=0)) == 1 for batch in found)
    assert all(batch["items"] == 7 and batch["none"] is None for batch in found)
    values = torch.cat([batch["value"] for batch in found]).long()
    assert torch.equal(torch.cat([batch["prompt_ids"] for batch in found]), ids[values])
    assert sorted(values.tolist()) == list(range(12))


# ---------------------------------------------------------------------------------- by model

# Name in transformers -> the rest of its configuration. By what each has that might go wrong:
MODELS = {
    "Llama": {},
    "GPT2": {},  # positions that are learned
    "OPT": {"ffn_dim": 48, "word_embed_proj_dim": 32},  # the same, with an offset
    "GPTNeoX": {},  # rotary positions in a part
    "SmolLM3": {},  # layers without positions
    "Phi3": {},
    "Granite": {},  # a scale of its own for attention
    "Olmo2": {},
    "Qwen3Moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16},
    "Mistral": {"sliding_window": 9},
    "Qwen2": {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 1},
    "Gemma3Text": {"sliding_window": 9, "head_dim": 8},  # windows in some layers
    "Cohere2": {"sliding_window": 9},
}
REFUSED = {
    "Falcon": {"alibi": False},  # attention of its own
    "Jamba": test_trl_packing.JAMBA,
    "Lfm2": {"layer_types": ["conv", "full_attention"]},
}


def one_batch(width=40):
    """Two pairs, the prompts of which are 30 and 25 tokens long, on uneven sequences."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(5, 200, (4, width), generator=generator)
    ids[2, :30], ids[3, :25] = ids[0, :30], ids[1, :25]
    mask = (torch.arange(width) < torch.tensor([40, 33, 36, 40])[:, None]).long()
    labels = ids.masked_fill((mask == 0) | (torch.arange(width) < 20), -100)
    return {"input_ids": ids * mask, "attention_mask": mask, "labels": labels}


def numbers(model, call):
    """Log-probs (4, 39) and all gradients (N,) of a model called in one way or another."""
    model.zero_grad()
    outputs = call(**one_batch(), fused_lm_head=True, use_cache=False)
    (outputs.log_probs * torch.linspace(0.5, 2, 4)[:, None]).sum().backward()
    gradients = [p.grad.flatten() for p in model.parameters() if p.grad is not None]
    return outputs.log_probs.detach(), torch.cat(gradients)


def made(name):
    model = test_trl_packing.made(name, **(MODELS | REFUSED)[name])
    add_fused_lm_head(model)
    return model


@pytest.mark.parametrize("name", MODELS)
def test_every_number_of_a_model_stays(name):
    model, said = made(name), []
    expected = numbers(model, model)
    layouts.prepare(model)
    found = numbers(model, layouts.OneRow(model, packed=False, share=True, notice=said.append))
    assert "a batch of 149 tokens becomes a row of 94" in said[0]
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours - theirs).norm() < 2e-6 * theirs.norm()


@pytest.mark.parametrize("name", REFUSED)
def test_what_does_not_keep_its_numbers_stays_apart(name):
    model, said = made(name), []
    expected = numbers(model, model)
    assert layouts.obstacle(model) is None
    layouts.prepare(model)
    found = numbers(model, layouts.OneRow(model, packed=False, share="auto", notice=said.append))
    assert "prompts are not shared" in said[0] and "alone: a log-prob or score is" in said[0]
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with pytest.raises(ValueError, match=rf"share_prompts=False for {name}.* is .* there and .*"):
        numbers(model, layouts.OneRow(model, packed=False, share=True))


def test_a_model_that_takes_no_rows_is_left_alone():
    """As those do whose layers take no keywords but their own."""

    def refuse(module, args, kwargs):
        if attention.BLOCKS in kwargs:
            raise TypeError("an unexpected keyword")

    model, said = made("Llama"), []
    model.model.register_forward_pre_hook(refuse, with_kwargs=True)
    expected = numbers(model, model)
    layouts.prepare(model)
    found = numbers(model, layouts.OneRow(model, packed=False, share="auto", notice=said.append))
    assert said[0].endswith("alone: it raises TypeError: an unexpected keyword")
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    for options in ({"packed": True, "share": False}, {"packed": False, "share": True}):
        with pytest.raises(ValueError, match=r"LlamaForCausalLM.*it raises TypeError: an unexp"):
            numbers(model, layouts.OneRow(model, **options))


def test_a_row_keeps_no_keys_and_values():
    """Nobody goes on with it, and those of a long row would take memory for nothing."""
    model = made("Llama")
    row = layouts.in_rows(model, longest=20)
    model.register_forward_hook(lambda module, args, output: kept.append(output.past_key_values))
    ids, kept = torch.arange(2, 12).expand(2, 10), []
    row.predictions(ids, torch.ones_like(ids), torch.ones(2, 9, dtype=torch.bool))
    assert kept == [None]


def test_a_trial_of_hidden_states_makes_no_logits():
    """Those of thousands of tokens would take much memory, and nobody looks at them."""
    model, read = made("Llama"), []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda module, args: read.append(args[0].shape[:-1].numel()))
    assert layouts.in_rows(model, longest=100) is not None
    assert len(read) == 4 and max(read) <= 3  # short ones of two lengths, a long one, and the row


def test_a_window_narrower_than_the_prompt_is_tried():
    """Masks alone tell Qwen2Moe's layers of their window, and a row has none."""
    for longest, kept in ((8, True), (14, False)):
        model, said = test_trl_packing.made("Qwen2Moe"), []
        add_fused_lm_head(model)
        layouts.prepare(model)
        row = layouts.OneRow(model, packed=False, share="auto", longest=longest, notice=said.append)
        numbers(model, row)
        assert ("becomes a row" in said[0]) == kept, said


def test_routers_are_asked_for_every_token_of_every_answer():
    model = test_trl_packing.made("Mixtral", num_local_experts=4)
    add_fused_lm_head(model)
    options = {"fused_lm_head": True, "output_router_logits": True}
    expected = model(**one_batch(), **options).aux_loss
    layouts.prepare(model)
    row = layouts.OneRow(model, packed=False, share=True)
    torch.testing.assert_close(row(**one_batch(), **options).aux_loss, expected)


def test_auto_shares_what_is_worth_it():
    model = made("Llama")
    layouts.prepare(model)
    shapes = []
    model.model.layers[0].register_forward_hook(lambda m, args, out: shapes.append(args[0].shape))
    row = layouts.OneRow(model, packed=False, share="auto")
    batch = one_batch()
    for begin, expected in ((0, (1, 94, 32)), (29, (4, 40, 32))):
        ids = batch["input_ids"].clone()
        ids[2:, :begin] = ids[2:, :begin].flip(1)  # what the sides have in common ends at once
        if begin:
            ids[2:, 0] = 200 + torch.arange(2)
        row(**batch | {"input_ids": ids}, fused_lm_head=True)
        assert shapes[-1] == expected


def test_a_row_is_laid_out_once_for_policy_and_reference(monkeypatch):
    counted, laid_out = [], layout.shared
    monkeypatch.setattr(layout, "shared", lambda *x: counted.append(x) or laid_out(*x))
    ids, mask = torch.tensor([[5, 6, 7], [5, 6, 8]]), torch.ones(2, 3, dtype=torch.long)
    first, second = layouts._shared_row(ids, mask), layouts._shared_row(ids, mask)
    assert first is second and len(counted) == 1 and len(first.tokens) == 4
    layouts._shared_row(ids, mask)
    ids[1, 1] = 9  # in place, as nobody should
    assert len(layouts._shared_row(ids, mask).tokens) == 5
    assert len(layouts._shared_row(ids, mask.clone()).tokens) == 5
    with torch.inference_mode():
        assert len(layouts._shared_row(ids.clone(), mask.clone()).tokens) == 5
    assert len(counted) == 5


# -------------------------------------------------------------------------------- what is said


def test_the_option_and_its_refusals(models, tmp_path):
    for given, held in (("auto", "auto"), (True, True), ("false", False), ("True", True)):
        assert DPOConfig(str(tmp_path), **quiet(share_prompts=given)).share_prompts == held
    with pytest.raises(ValueError, match=r"share_prompts: unknown 'yes'; .*auto, true, false"):
        RewardConfig(str(tmp_path), **quiet(share_prompts="yes"))
    (parsed,) = HfArgumentParser(GRPOConfig).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--use_cpu", "--share_prompts", "true"]
    )
    assert parsed.share_prompts is True
    arguments = {"train_dataset": tiny_pairs(4), "processing_class": tiny_tokenizer()}
    eager = AutoModelForCausalLM.from_pretrained(models["dpo"], attn_implementation="eager")
    config = DPOConfig(str(tmp_path), **quiet(share_prompts=True))
    with pytest.raises(ValueError, match=r"share_prompts=False with attn_implementation='eager'"):
        DPOTrainer(model=eager, args=config, **arguments)
    config = DPOConfig(str(tmp_path), **quiet(max_steps=1))  # "auto"
    trainer = DPOTrainer(model=eager, args=config, **arguments)
    trainer.train()
    assert eager.config._attn_implementation == "eager"


def test_it_is_said_once_what_becomes_of_prompts(models, tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(one_row.logger, "info", lambda message: said.append(message))
    steps.run("dpo", models["dpo"], str(tmp_path), max_steps=2)
    (message,) = said
    assert "share_prompts='auto': a batch of" in message and "its prompts once" in message
