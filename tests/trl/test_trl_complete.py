"""What else a run may ask of the trainers: adapters, compilation, evaluation, resuming, streams."""

from __future__ import annotations

import time

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
from peft import LoraConfig, get_peft_model
from three_ways import in_turn

import drrlhf as dr
from drrlhf.trl import DPOConfig, DPOTrainer, weighted

PARTS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}


@pytest.fixture
def make(models, tmp_path):
    def make(method="dpo", **options):
        return steps.trainer(method, models[method], str(tmp_path / "out"), **options)

    return make


# --------------------------------------------------------------------------------------- adapters


@pytest.mark.parametrize("wrapped", [False, True])
def test_an_adapter_on_the_head_is_refused(make, models, tmp_path, wrapped):
    """The fused head reads the weight itself: a factorised update of it would be left out."""
    config = LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["lm_head", "q_proj"])
    with pytest.raises(ValueError, match=r"adapter to `?lm_head`? is not supported.*never be"):
        if not wrapped:
            make(trainer_peft_config=config)
        DPOTrainer(
            model=get_peft_model(steps.away(models["dpo"]), config),
            args=DPOConfig(str(tmp_path), **quiet()),
            train_dataset=tiny_pairs(4),
            processing_class=tiny_tokenizer(),
        )


def test_a_head_trained_beside_adapters_is_exact(make):
    config = LoraConfig(
        r=4, task_type="CAUSAL_LM", target_modules=["q_proj"], modules_to_save=["lm_head"]
    )
    trainer = make(trainer_peft_config=config, ambiguity="cvar:0.3", **PARTS)
    with torch.no_grad():
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn_like(parameter)
    batch = next(iter(trainer.get_train_dataloader()))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    fused = trainer.model(**inputs, labels=labels, fused_lm_head=True).log_probs
    logits = trainer.model(**inputs).logits[:, :-1].log_softmax(-1)
    by_hand = logits.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
    mask = batch["completion_mask"][:, 1:]
    torch.testing.assert_close(fused * mask, by_hand * mask, rtol=1e-4, atol=1e-5)
    trainer.train()


# ------------------------------------------------------------------------------------ compilation


@pytest.mark.parametrize("method", ["dpo", pytest.param("reward", marks=pytest.mark.thorough)])
def test_a_compiled_model_takes_the_same_step(tmp_path, method):
    """Of one layer and two microbatches, for each of another shape is a trace, of seconds."""
    model = str(
        {"dpo": tiny_llama_dir, "reward": tiny_reward_dir}[method](tmp_path, num_hidden_layers=1)
    )
    options = {"ambiguity": "cvar:0.4", **PARTS, "gradient_accumulation_steps": 2}
    eager = steps.run(method, model, str(tmp_path), **options)
    compiled = steps.run(
        method,
        model,
        str(tmp_path),
        torch_compile=True,
        torch_compile_backend="aot_eager",
        **options,
    )
    torch.testing.assert_close(
        compiled["gradients"][0], eager["gradients"][0], rtol=1e-4, atol=1e-5
    )


# ------------------------------------------------------------------------------------- evaluation


@pytest.mark.parametrize(
    "ambiguity, method", in_turn(["erm", "cvar:0.3", "group:3,step_size=0.5"], ["dpo", "reward"])
)
def test_evaluation_is_over_the_whole_set(make, method, ambiguity):
    """However it is batched; and the worst group is the one that a user would find by hand."""
    data = tiny_pairs(10, seed=3, group=[0, 1, 2, 1, 0] * 2)
    found = []
    for size in (2, 10):
        trainer = make(
            method,
            data=tiny_pairs(8, group=[0, 1] * 4),
            ambiguity=ambiguity,
            trainer_eval_dataset=data,
            per_device_eval_batch_size=size,
        )
        found.append(trainer.evaluate())
    small, whole = found
    names = [n for n in whole if n.startswith(("eval_robust/", "eval_group/"))] + ["eval_loss"]
    for name in names:
        assert small[name] == pytest.approx(whole[name], rel=1e-5, abs=1e-6), name
    losses = [whole[f"eval_group/{g}/loss"] for g in range(3)]
    assert whole["eval_robust/worst_group_loss"] == max(losses)
    accuracies = [whole[f"eval_group/{g}/accuracy"] for g in range(3)]
    assert whole["eval_robust/worst_group_accuracy"] == min(accuracies)
    assert ("eval_robust/value" in whole) == (ambiguity != "erm")
    if ambiguity == "cvar:0.3":
        assert whole["eval_loss"] == whole["eval_robust/value"] > whole["eval_robust/mean_loss"]
        assert whole["eval_robust/max_weight"] == pytest.approx(1 / 0.3)
        assert whole["eval_robust/effective_sample_size"] == pytest.approx(0.3, rel=1e-4)


def test_the_worst_of_as_many_groups_as_rows():
    """Such as user ids. It took time and memory by the square: 10 GB here."""
    n, start = 100_000, time.process_time()
    losses = torch.arange(n, dtype=torch.float64).flip(0)
    losses[0] = losses[1] = 2.0 * n  # the first is masked, the second in no group
    nominal, groups = torch.ones(n, dtype=torch.float64), torch.arange(n) // 2 + 40
    nominal[0], groups[1] = 0, -1
    correct = torch.arange(n) != 2 * 70
    rows = weighted.Weighted(losses, nominal, groups, nominal / n, correct)
    assert weighted.worst_group(rows) == {
        "robust/worst_group_loss": n - 3.5,  # rows 2 and 3
        "robust/worst_group_accuracy": 0.5,
    }
    assert weighted.by_group(rows, None, str, weighted.PAIRS) == {}
    assert time.process_time() - start < 5


# -------------------------------------------------------------------------------- streams, resume


def test_a_stream_takes_every_batch_once(make):
    trainer = make(ambiguity="kl:temperature=0.5,momentum=0.9", max_steps=2, **PARTS)
    calls, original = [], trainer._pair_risk

    def spy(*arguments):
        value = original(*arguments)
        calls.append(trainer.normaliser_state.log_normaliser.item())
        return value

    trainer._pair_risk = spy
    trainer.train()
    assert len(calls) == 8 and len(set(calls)) == 8
    before = trainer.normaliser_state.log_normaliser.clone()
    trainer.evaluate(tiny_pairs(4, seed=1))
    assert torch.equal(trainer.normaliser_state.log_normaliser, before)


@pytest.mark.parametrize(
    "ambiguity, method",
    in_turn(
        ["cvar:0.4", "group:3,step_size=0.5", "kl:temperature=0.5,momentum=0.9"], ["dpo", "reward"]
    ),
)
def test_resumed_runs_are_the_uninterrupted_ones_bit_for_bit(models, tmp_path, method, ambiguity):
    options = {
        "ambiguity": ambiguity,
        "data": tiny_pairs(32, group=[0, 1, 2, 1] * 8),
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "disable_dropout": False,
        "optim": "adamw_torch",
        **PARTS,
    }
    whole = steps.run(method, models[method], str(tmp_path / "whole"), **options)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed = steps.run(
        method,
        models[method],
        str(tmp_path / "resumed"),
        resume_from_checkpoint=checkpoint,
        **options,
    )
    assert torch.equal(resumed["parameters"], whole["parameters"])
    assert [log["loss"] for log in resumed["logs"]] == [log["loss"] for log in whole["logs"]]


def test_another_number_of_processes_is_refused_on_resume(make, models, tmp_path, monkeypatch):
    options = {"ambiguity": "cvar:0.4", "save_strategy": "steps", "save_steps": 1, **PARTS}
    make(**options).train()
    trainer = make(**options, max_steps=2)
    monkeypatch.setattr(type(trainer.args), "world_size", 2)
    with pytest.raises(ValueError, match=r"saved with processes: 1, resumed with 2"):
        trainer.check_resume(tmp_path / "out" / "checkpoint-1")


def test_no_set_is_no_state(make):
    trainer = make()
    assert trainer.group_state is None and trainer.normaliser_state is None
    assert trainer.ambiguity == dr.ERM()
