"""Shared prompts: the numbers of a batch without them, from a row that has each prompt once."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

from trl_fixtures import (  # isort: skip
    quiet,
    tiny_llama_dir,
    tiny_pairs,
    tiny_reward_dir,
    tiny_tokenizer,
)

import steps
import torch
from peft import LoraConfig

from drrlhf.layouts import layout
from drrlhf.trl import DPOConfig, DPOTrainer


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return {
        "dpo": str(tiny_llama_dir(tmp_path_factory.mktemp("llama"))),
        "grpo": str(tiny_llama_dir(tmp_path_factory.mktemp("grpo"))),
        "reward": str(tiny_reward_dir(tmp_path_factory.mktemp("reward"))),
    }


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
    scale = apart["gradients"][0].abs().max()
    assert scale > 1e-3
    torch.testing.assert_close(
        shared["gradients"], apart["gradients"], rtol=0, atol=2e-6 * max(float(scale), 1)
    )
    for ours, theirs in zip(shared["logs"], apart["logs"], strict=True):
        assert set(ours) == set(theirs)
        for name in theirs:
            if name not in ("epoch", "step"):
                assert ours[name] == pytest.approx(theirs[name], rel=1e-4, abs=1e-5), name


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
