"""GRPO where a batch has no token that counts, and where streamed data have wrong weights."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

import datasets
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl_fixtures import WORDS, quiet, tiny_llama_dir

from drrlhf.trl import GRPOConfig, GRPOTrainer

PROMPTS = [" ".join(WORDS[(7 * i + j) % 100] for j in range(3 + i % 6)) for i in range(12)]


def trained(tmp_path, data, **options):
    """The log of two steps."""
    folder = tiny_llama_dir(tmp_path / "model")
    config = GRPOConfig(
        str(tmp_path / "out"),
        num_generations=4,
        max_completion_length=3,
        shuffle_dataset=False,
        **quiet(max_steps=2, per_device_train_batch_size=4, gradient_accumulation_steps=2),
        **options,
    )
    trainer = GRPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(folder),
        reward_funcs=lambda completions, **_: [float(len(one) % 7) for one in completions],
        args=config,
        train_dataset=data,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    return trainer.state.log_history


def test_a_batch_without_a_token_that_counts_is_no_extreme(tmp_path):
    """All completions are cut at three tokens, and so masked: nothing was clipped, nor not."""
    data = datasets.Dataset.from_dict({"prompt": PROMPTS})
    options = {"ambiguity": "kl:temperature=1", "mask_truncated_completions": True}
    first = trained(tmp_path, data, **options)[0]
    assert first["completions/clipped_ratio"] == 1
    assert first["clip_ratio/low_min"] is None and first["clip_ratio/high_max"] is None
    options["mask_truncated_completions"] = False
    assert trained(tmp_path, data, **options)[0]["clip_ratio/low_min"] == 0


@pytest.mark.parametrize("wrong", [None, -1.0, "2"])
def test_a_wrong_weight_in_a_stream_is_named(tmp_path, wrong):
    rows = [{"prompt": prompt, "weight": wrong} for prompt in PROMPTS]
    stream = datasets.Dataset.from_list(rows).to_iterable_dataset()
    with pytest.raises(ValueError, match=f"column 'weight' holds {wrong!r}: expected"):
        trained(tmp_path, stream)
