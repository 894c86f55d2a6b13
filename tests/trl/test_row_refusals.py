"""Models and options whose numbers a row of several sequences would change train as TRL trains."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

from trl_fixtures import PAD, quiet, tiny_pairs, tiny_tokenizer  # isort: skip

import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    GlmMoeDsaConfig,
    GlmMoeDsaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Llama4ForCausalLM,
    Llama4TextConfig,
    PhimoeConfig,
    PhimoeForCausalLM,
)

from drrlhf.layouts.attention import ATTENTION
from drrlhf.layouts.model import in_rows, obstacle
from drrlhf.trl import DPOConfig, DPOTrainer, GRPOConfig, GRPOTrainer

INVOCATION = "<|assistant|>"
COMMON = " ".join(f"w{i}" for i in range(30))


def with_common_prompts(n=8):
    return tiny_pairs(n).map(
        lambda row: {"prompt": f"{COMMON} {row['prompt']} {INVOCATION}"}, load_from_cache_file=False
    )


def saved(model, folder):
    model.save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return str(folder)


def dpo(kinds, model, folder, **options):
    kind, config = kinds
    own = {"peft_config": options.pop("peft_config")} if "peft_config" in options else {}
    torch.manual_seed(0)
    return kind(
        model=model,
        args=config(str(folder), max_steps=2, **quiet(**options)),
        train_dataset=with_common_prompts(),
        processing_class=tiny_tokenizer(),
        **own,
    )


def logged(trainer, *names):
    trainer.train()
    return [[float(log[name]) for name in names] for log in trainer.state.log_history[:-1]]


OURS, THEIRS = (DPOTrainer, DPOConfig), (trl.DPOTrainer, trl.DPOConfig)


def assert_as_trl(model, folder, **options):
    found, expected = (
        logged(dpo(kinds, model, folder, **options), "loss", "grad_norm", "logps/chosen")
        for kinds in (OURS, THEIRS)
    )
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=2e-5, atol=1e-6)


def test_activated_adapters_look_for_one_invocation_a_row(models, tmp_path):
    ids = tiny_tokenizer().convert_tokens_to_ids([INVOCATION])
    adapters = LoraConfig(r=4, lora_alpha=64, alora_invocation_tokens=ids, task_type="CAUSAL_LM")
    assert_as_trl(models["dpo"], tmp_path, peft_config=adapters)
    with pytest.raises(ValueError, match="padding_free=False with activated LoRA"):
        dpo(OURS, models["dpo"], tmp_path, peft_config=adapters, padding_free=True)


def test_noise_on_embeddings_is_that_of_the_padded_batch(models, tmp_path):
    assert_as_trl(models["dpo"], tmp_path, neftune_noise_alpha=5.0)
    for option in ("padding_free", "share_prompts"):
        with pytest.raises(ValueError, match=rf"{option}=False with neftune_noise_alpha"):
            dpo(OURS, models["dpo"], tmp_path, neftune_noise_alpha=5.0, **{option: True})


def test_a_model_that_is_refused_has_its_attention_back(tmp_path):
    """This one attends to few tokens only under the names of attention that it knows."""
    torch.manual_seed(0)
    config = GlmMoeDsaConfig(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=8,
        q_lora_rank=8,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
        index_topk=4,
        index_head_dim=16,
        index_n_heads=2,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=1,
    )
    assert_as_trl(saved(GlmMoeDsaForCausalLM(config), tmp_path / "model"), tmp_path)


def test_a_model_that_does_not_name_its_layers_is_not_laid_in_rows():
    """Its base_model_prefix is that of a larger model, of which it is a part."""
    config = Llama4TextConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        intermediate_size_mlp=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        num_local_experts=1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = Llama4ForCausalLM(config)
    assert in_rows(model) is None
    assert "for Llama4ForCausalLM: it has nothing" in obstacle(model)


def test_a_model_is_tried_again_for_longer_sequences():
    """The window of this one is in its mask alone: rows of texts that are shorter do no harm."""
    torch.manual_seed(0)
    config = PhimoeConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=2,
        sliding_window=16,
        max_position_embeddings=256,
        initializer_range=0.3,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = PhimoeForCausalLM(config).eval()
    short = in_rows(model, longest=12)
    assert short is not None and in_rows(model, longest=60) is None
    ids = torch.randint(3, 40, (2, 12))
    ids[1, :6] = ids[0, :6]
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits[:, :-1].flatten(0, 1)
        found = short.predictions(ids, mask, mask[:, 1:].bool())
    torch.testing.assert_close(found, expected)  # its attention is again the one that it had


class Prompted:
    """GRPO on prompts of unequal length, which TRL fills up on the left."""

    def __init__(self, model, folder):
        self.model, self.folder = model, str(folder)
        ends = ["how", "how was", f"{COMMON} how was"]
        self.data = Dataset.from_dict({"prompt": ends * 4})

    def trainer(self, kind, config, **options):
        steps = {"max_steps": 1, "steps_per_generation": 4, "gradient_accumulation_steps": 2}
        sizes = {"num_generations": 2, "max_completion_length": 12, "beta": 0.1}
        return kind(
            model=self.model,
            args=config(self.folder, **quiet(**steps, **sizes, **options)),
            train_dataset=self.data,
            reward_funcs=lambda completions, **_: [float(len(one)) for one in completions],
            processing_class=tiny_tokenizer(),
        )


def test_positions_that_are_learned_count_the_padding_on_the_left(tmp_path):
    """At the first step policy, old policy and reference are one: any distance between them comes
    from batches whose numbers are of two kinds."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tiny_tokenizer()),
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=256,
        pad_token_id=PAD,
        bos_token_id=1,
        eos_token_id=1,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    grpo = Prompted(saved(GPT2LMHeadModel(config), tmp_path / "model"), tmp_path)
    ((kl, clipped),) = logged(grpo.trainer(GRPOTrainer, GRPOConfig), "kl", "clip_ratio/region_mean")
    assert abs(kl) < 1e-6 and clipped == 0
    with pytest.raises(ValueError, match=r"sequences of a batch padded on the left the numbers"):
        grpo.trainer(GRPOTrainer, GRPOConfig, share_prompts=True).train()


def test_who_writes_completions_sees_the_attention_that_was_loaded(models, tmp_path, monkeypatch):
    seen = []

    def written(self, *args, **kwargs):
        seen.append(self.model.config._attn_implementation)
        return "written"

    monkeypatch.setattr(trl.GRPOTrainer, "_generate_single_turn", written)
    trainer = Prompted(models["grpo"], tmp_path).trainer(GRPOTrainer, GRPOConfig)
    assert trainer.model.config._attn_implementation == ATTENTION
    assert trainer._generate_single_turn([[6, 7]], None, None, 2) == "written"
    assert seen == ["sdpa"] and trainer.model.config._attn_implementation == ATTENTION
