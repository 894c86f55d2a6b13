"""Shared prompts: the numbers of a batch without them, from a row that has each prompt once."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

from trl_fixtures import (  # isort: skip
    tiny_llama_dir,
    tiny_reward_dir,
)

import steps
import torch
from peft import LoraConfig

from drrlhf.layouts import layout
from drrlhf.trl import prompts


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
