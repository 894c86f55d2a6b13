"""Tiny random models, a tiny tokenizer and tiny data, made on the spot: nothing is downloaded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is imported

import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)

ROLES = ["<|system|>", "<|user|>", "<|assistant|>"]
SPECIAL = ["<unk>", "<eos>", *ROLES, "<pad>"]
PAD = SPECIAL.index("<pad>")  # not 0: a row filled up with zeros must not look padded
TEXT = "how was the film the book was not very good but i love it so do we yes really great story"
WORDS = [*dict.fromkeys(TEXT.split()), *(f"w{i}" for i in range(175))]
CHAT_TEMPLATE = (
    "{% for message in messages %}<|{{ message.role }}|> {{ message.content }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tiny_tokenizer(with_eos: bool = True) -> PreTrainedTokenizerFast:
    """One token a word, about 200 of them, pad != eos, and a chat template."""
    vocabulary = {word: i for i, word in enumerate(SPECIAL + WORDS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        eos_token="<eos>" if with_eos else None,
        unk_token="<unk>",
        additional_special_tokens=ROLES,
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )


def _llama_config(**options: Any) -> LlamaConfig:
    usual: dict[str, Any] = {
        "vocab_size": len(SPECIAL) + len(WORDS),
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # far from uniform, so that losses of pairs differ
        "pad_token_id": PAD,
        "bos_token_id": None,
        "eos_token_id": 1,
    }
    return LlamaConfig(**usual | options)


def _save(model: Any, tokenizer: PreTrainedTokenizerFast, path: Path) -> Path:
    model.save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def tiny_llama_dir(tmp_path: Path, **options: Any) -> Path:
    """A saved directory of a random LlamaForCausalLM (2 layers, hidden 32) with its tokenizer.

    ``options`` go to the LlamaConfig.
    """
    torch.manual_seed(0)
    return _save(
        LlamaForCausalLM(_llama_config(**options)), tiny_tokenizer(), tmp_path / "tiny-llama"
    )


def tiny_mixtral_dir(tmp_path: Path) -> Path:
    """A saved directory of a random mixture of four experts, with an auxiliary loss."""
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        output_router_logits=True,
        router_aux_loss_coef=0.1,
        initializer_range=0.2,
        pad_token_id=PAD,
    )
    return _save(MixtralForCausalLM(config), tiny_tokenizer(), tmp_path / "tiny-mixtral")


def tiny_reward_dir(tmp_path: Path, **options: Any) -> Path:
    """A saved directory of a random Llama reward model (one label) with its tokenizer.

    ``options`` go to the LlamaConfig.
    """
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(_llama_config(num_labels=1, **options))
    return _save(model, tiny_tokenizer(), tmp_path / "tiny-reward")


def tiny_encoder_dir(tmp_path: Path, with_eos: bool = True) -> Path:
    """A saved directory of a random Bert reward model (one label) with its tokenizer.

    ``with_eos=False`` leaves out the end-of-sequence token, as most real encoders do.
    """
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(SPECIAL) + len(WORDS),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=256,
        initializer_range=0.2,
        pad_token_id=PAD,
        num_labels=1,
    )
    model = BertForSequenceClassification(config)
    return _save(model, tiny_tokenizer(with_eos), tmp_path / "tiny-encoder")


def quiet(**options: Any) -> dict[str, Any]:
    """Configuration arguments of a small, silent CPU run in float32 that logs every step."""
    return {
        "use_cpu": True,
        "report_to": "none",
        "bf16": False,
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_strategy": "no",
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "gradient_checkpointing": False,
    } | options


def tiny_pairs(n: int = 16, seed: int = 0, **columns: list[Any]) -> Dataset:
    """n preference pairs of unequal lengths (prompt, chosen, rejected), plus ``columns``."""
    generator = torch.Generator().manual_seed(seed)

    def text(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        chosen = torch.randint(0, len(WORDS), (length,), generator=generator).tolist()
        return " ".join(WORDS[i] for i in chosen)

    rows = {
        "prompt": [text(2, 7) for _ in range(n)],
        "chosen": [" " + text(1, 12) for _ in range(n)],
        "rejected": [" " + text(1, 12) for _ in range(n)],
    }
    return Dataset.from_dict(rows | columns)
