"""What our trainers add to TRL's: ambiguity sets, columns, group state, checks and messages."""

from __future__ import annotations

import itertools
import logging
import subprocess
import sys
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")

from trl_fixtures import (  # isort: skip  (first: it settles the environment)
    PAD,
    quiet,
    tiny_llama_dir,
    tiny_pairs,
    tiny_reward_dir,
    tiny_tokenizer,
)

import torch
import torch.nn.functional as F
import trl
from safetensors.torch import load_file, save_file
from steps import away
from transformers import AutoModelForCausalLM, HfArgumentParser

import drrlhf as dr
from drrlhf.groups import Groups
from drrlhf.trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, seam
from drrlhf.trl.columns import PairColumns
from drrlhf.trl.state import STATE_FILE


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(tiny_llama_dir(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def reward_model(tmp_path_factory):
    return str(tiny_reward_dir(tmp_path_factory.mktemp("reward")))


def dpo(model, tmp_path, data=None, trainer_options=None, **options):
    return DPOTrainer(
        model=model,
        args=DPOConfig(str(tmp_path / "dpo"), **quiet(**options)),
        train_dataset=data or tiny_pairs(8),
        processing_class=tiny_tokenizer(),
        **(trainer_options or {}),
    )


def reward(model, tmp_path, data=None, **options):
    return RewardTrainer(
        model=model,
        args=RewardConfig(str(tmp_path / "reward"), **quiet(**options)),
        train_dataset=data or tiny_pairs(8),
        processing_class=tiny_tokenizer(),
    )


def first_batch(trainer):
    return next(iter(trainer.get_train_dataloader()))


def gradient(trainer, batch):
    """Loss and flat gradient of one call."""
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, dict(batch))
    loss.backward()
    flat = torch.cat([p.grad.flatten() for p in trainer.model.parameters() if p.grad is not None])
    return loss.detach(), flat.clone()


def dpo_losses_by_hand(model, reference, batch, beta=0.1):
    """-log sigmoid of each pair from full logits: nothing of TRL's or ours is used."""

    def sums(m):
        logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        logps = logits[:, :-1].log_softmax(-1)
        tokens = logps.gather(-1, batch["input_ids"][:, 1:, None]).squeeze(-1)
        return (tokens * batch["completion_mask"][:, 1:]).sum(1)

    with torch.no_grad():
        base = sums(reference)
    chosen, rejected = (sums(model) - base).chunk(2)
    return -F.logsigmoid(beta * (chosen - rejected))


# -------------------------------------------------------------------------- the weighted losses


def test_tv_by_hand(llama, tmp_path):
    """TV(0.1) of 4 equal pairs: the best one gives 0.1 of its mass to the worst one."""
    trainer = dpo(away(llama), tmp_path, ambiguity="tv:0.1")
    batch = first_batch(trainer)
    losses = dpo_losses_by_hand(trainer.model, trainer.ref_model, batch)
    q = torch.full((4,), 0.25)
    q[losses.argmin()] -= 0.1
    q[losses.argmax()] += 0.1
    expected = (q * losses).sum()
    assert expected > losses.mean() + 1e-3
    expected.backward()
    by_hand = torch.cat([p.grad.flatten() for p in trainer.model.parameters()])
    found, ours = gradient(trainer, batch)
    torch.testing.assert_close(found, expected.detach(), rtol=1e-5, atol=0)
    torch.testing.assert_close(ours, by_hand, rtol=0, atol=1e-5 * by_hand.abs().max().item())


def test_reward_cvar_by_hand(reward_model, tmp_path):
    """CVaR(0.5) of 4 equal pairs: the mean of the two worst, margin and centring included."""
    data = tiny_pairs(8, margin=[0.3] * 8)
    trainer = reward(
        reward_model, tmp_path, data, ambiguity="cvar:0.5", center_rewards_coefficient=0.1
    )
    batch = first_batch(trainer)
    with torch.no_grad():
        logits = trainer.model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    chosen, rejected = logits.squeeze(-1).chunk(2)
    losses = -F.logsigmoid(chosen - rejected - 0.3) + 0.1 * (chosen + rejected) ** 2
    found, _ = gradient(trainer, batch)
    torch.testing.assert_close(found, losses.topk(2).values.mean(), rtol=1e-5, atol=0)
    assert found > losses.mean() + 1e-3


def test_combined_losses_are_weighed_as_one(llama, tmp_path):
    trainer = dpo(
        away(llama),
        tmp_path,
        ambiguity="cvar:0.25",
        loss_type=["sigmoid", "hinge"],
        loss_weights=[0.5, 2.0],
    )
    batch = first_batch(trainer)
    sigmoid = dpo_losses_by_hand(trainer.model, trainer.ref_model, batch).detach()
    h = -torch.log(torch.expm1(sigmoid))  # sigmoid = log(1 + exp(-h))
    combined = 0.5 * sigmoid + 2.0 * (1 - h).clamp(min=0)
    found, _ = gradient(trainer, batch)
    torch.testing.assert_close(found, combined.max(), rtol=1e-4, atol=0)


def test_sft_stays_outside_the_ambiguity_set(llama, tmp_path):
    model = away(llama)
    pure = dpo(model, tmp_path, ambiguity="cvar:0.25")
    both = dpo(model, tmp_path, ambiguity="cvar:0.25", loss_type=["sigmoid", "sft"])
    sft = dpo(model, tmp_path, loss_type="sft")
    for trainer in (both, sft):  # the reference is the same model for all
        trainer.ref_model = pure.ref_model
    batch = first_batch(pure)
    values = [gradient(trainer, batch)[0] for trainer in (pure, sft, both)]
    torch.testing.assert_close(values[0] + values[1], values[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("ambiguity", ["erm", "kl:0.2"])
def test_a_pair_of_weight_0_is_as_if_absent(llama, tmp_path, ambiguity):
    weights = [1.0, 0.0, 1.0, 1.0] * 2
    trainer = dpo(away(llama), tmp_path, tiny_pairs(8, weight=weights), ambiguity=ambiguity)
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    rows = torch.tensor([0, 2, 3])
    without = {
        name: value[torch.cat([rows, rows + 4])] if len(value) == 8 else value[rows]
        for name, value in batch.items()
    }
    (masked, gradient_masked), (absent, gradient_absent) = (
        gradient(trainer, b) for b in (batch, without)
    )
    torch.testing.assert_close(masked, absent, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient_masked, gradient_absent, rtol=1e-4, atol=1e-7)
    batch["input_ids"][[1, 5]] = 7  # whatever the masked pair holds
    torch.testing.assert_close(gradient(trainer, batch)[0], masked, rtol=1e-6, atol=0)


def test_weight_column_is_the_nominal_weight(llama, tmp_path):
    trainer = dpo(away(llama), tmp_path, tiny_pairs(8, weight=[1.0, 2.0, 3.0, 4.0] * 2))
    batch = first_batch(trainer)
    losses = dpo_losses_by_hand(trainer.model, trainer.ref_model, batch).detach()
    assert batch["weight"].dtype == torch.float64
    p = (batch["weight"] / batch["weight"].sum()).float()
    assert len(set(p.tolist())) > 1
    torch.testing.assert_close(gradient(trainer, batch)[0], (p * losses).sum(), rtol=1e-5, atol=0)
    logged = trainer._metrics["train" if trainer.model.training else "eval"]["robust/mean_loss"]
    assert logged[-1] == pytest.approx((p * losses).sum().item(), rel=1e-5)


def test_deepspeed_does_not_round_our_columns(reward_model, tmp_path, monkeypatch):
    """Its batches have the model's precision: float16 knows no weight above 65504, and bfloat16 no
    probability between 0.996 and 1."""
    data = tiny_pairs(8, weight=[1e6, 1.0] * 4, p_chosen=[0.998, 0.6] * 4)
    trainer = reward(reward_model, tmp_path, data)
    batch = first_batch(trainer)
    precision = SimpleNamespace(hf_ds_config=SimpleNamespace(dtype=lambda: torch.float16))
    state = SimpleNamespace(deepspeed_plugin=precision)
    monkeypatch.setattr(trainer, "is_deepspeed_enabled", True)
    monkeypatch.setattr(trainer.accelerator, "state", state)
    prepared = trainer._prepare_inputs(trainer._prepare_inputs(batch))
    for name in ("weight", "p_chosen"):
        assert torch.equal(prepared[name], batch[name])


def test_weighted_runs_train(llama, reward_model, tmp_path):
    for build, model in ((dpo, llama), (reward, reward_model)):
        trainer = build(model, tmp_path, tiny_pairs(16), ambiguity="tv:0.3", max_steps=6)
        before = {n: p.clone() for n, p in trainer.model.named_parameters()}
        trainer.train()
        moved = [not torch.equal(p, before[n]) for n, p in trainer.model.named_parameters()]
        assert sum(moved) > len(moved) / 2
        log = trainer.state.log_history[-2]
        assert log["robust/value"] == pytest.approx(log["loss"], rel=1e-5)
        assert 0 < log["robust/mean_loss"] < log["robust/value"]
        # TV(0.3) on 4 pairs that differ: q = 0.55, 0.25, 0.2, 0
        assert log["robust/max_weight"] == pytest.approx(4 * 0.55, rel=1e-5)
        share = 1 / (0.55**2 + 0.25**2 + 0.2**2) / 4
        assert log["robust/effective_sample_size"] == pytest.approx(share, rel=1e-5)


# ------------------------------------------------------------------------------------- columns


def spy_on_forward(model, seen):
    model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.update(kwargs), with_kwargs=True
    )


@pytest.mark.parametrize("precompute", [False, True], ids=["reference", "precomputed"])
def test_columns_never_reach_a_dpo_model(llama, tmp_path, precompute):
    seen = {}
    model = AutoModelForCausalLM.from_pretrained(llama)
    spy_on_forward(model, seen)
    trainer = dpo(
        model,
        tmp_path,
        tiny_pairs(8, group=[0, 1] * 4, weight=[1.0] * 8),
        precompute_ref_log_probs=precompute,
        max_steps=1,
    )
    assert {"group", "weight"} <= set(first_batch(trainer))
    # a dataset handed to `evaluate` is precomputed through our collator
    trainer.evaluate(tiny_pairs(4, seed=2, group=[0] * 4, weight=[1.0] * 4))
    trainer.train()
    assert "input_ids" in seen and not {"group", "weight"} & set(seen)


def test_columns_never_reach_a_reward_model(reward_model, tmp_path):
    seen = {}
    data = tiny_pairs(8, group=[0, 1] * 4, weight=[1.0] * 8)
    trainer = reward(reward_model, tmp_path, data, max_steps=1)
    spy_on_forward(trainer.model, seen)
    trainer.train()
    assert "input_ids" in seen and not {"group", "weight"} & set(seen)


def test_a_collator_of_the_users_own_is_wrapped(llama, tmp_path):
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    calls = []

    def collator(examples):
        calls.append(len(examples))
        return DataCollatorForPreference(pad_token_id=PAD)(examples)

    trainer = dpo(
        llama,
        tmp_path,
        tiny_pairs(8, group=[0, 1] * 4),
        {"data_collator": collator},
        ambiguity="group:2",
        max_steps=2,
    )
    trainer.train()
    assert calls and first_batch(trainer)["group"].dtype == torch.int64


@pytest.mark.parametrize("brought", [1, 2], ids=["one-side", "both"])
def test_a_reference_that_a_dataset_brings_along_is_not_asked(llama, tmp_path, brought):
    """TRL reads such columns with precompute_ref_log_probs alone, which makes them itself: they may
    be left from another model, or from answers that were cut elsewhere."""
    names = ("ref_chosen_logps", "ref_rejected_logps")[:brought]
    data = tiny_pairs(8, **{name: [-3.0 * i for i in range(8)] for name in names})
    for rows in (data, data.to_iterable_dataset()):
        for unused in (True, False):
            trainer = dpo(away(llama), tmp_path, rows, max_steps=1, remove_unused_columns=unused)
            batch = first_batch(trainer)
            expected = dpo_losses_by_hand(trainer.model, trainer.ref_model, batch).mean()
            torch.testing.assert_close(gradient(trainer, batch)[0], expected.detach())


def test_streamed_data(llama, tmp_path):
    data = tiny_pairs(8, group=[0, 1] * 4, weight=[1.0, 2.0] * 4).to_iterable_dataset()
    trainer = dpo(llama, tmp_path, data, ambiguity="group:2", max_steps=2)
    trainer.train()
    assert trainer.state.log_history[0]["group/1/loss"] == pytest.approx(0.6931, abs=1e-3)


def test_a_group_column_of_names_is_left_alone_without_a_group_set(llama, tmp_path):
    trainer = dpo(llama, tmp_path, tiny_pairs(8, group=["a", "b"] * 4), max_steps=1)
    trainer.train()
    assert not any(key.startswith("group/") for key in trainer.state.log_history[0])


def test_group_metrics(llama, tmp_path):
    groups = [0, 1, 1, 1]
    trainer = dpo(
        away(llama), tmp_path, tiny_pairs(4, group=groups), ambiguity="group:3,step_size=1"
    )
    batch = trainer.data_collator([trainer.train_dataset[i] for i in range(4)])
    losses = dpo_losses_by_hand(trainer.model, trainer.ref_model, batch).detach()
    trainer.model.train()
    trainer.compute_loss(trainer.model, dict(batch))
    metrics = {name: value[-1] for name, value in trainer._metrics["train"].items()}
    assert metrics["group/0/loss"] == pytest.approx(losses[0].item(), rel=1e-5)
    assert metrics["group/1/loss"] == pytest.approx(losses[1:].mean().item(), rel=1e-5)
    log2 = torch.tensor(2.0).log()
    assert metrics["group/1/accuracy"] == pytest.approx((losses[1:] < log2).float().mean().item())
    # one exponentiated step from (1/3, 1/3, 1/3); group 2 is absent and keeps its third
    step = torch.stack([losses[0], losses[1:].mean()]).double().softmax(0) * 2 / 3
    assert metrics["group/0/state"] == pytest.approx(step[0].item(), rel=1e-5)
    assert metrics["group/2/state"] == pytest.approx(1 / 3)
    assert metrics["group/0/weight"] == pytest.approx(1.5 * step[0].item(), rel=1e-5)
    assert "group/2/loss" not in metrics


# -------------------------------------------------------------------------------- group state


@pytest.mark.parametrize("scope", ["step", "microbatch"])
def test_state_steps_once_for_each_optimizer_step_and_not_in_eval(llama, tmp_path, scope):
    trainer = dpo(
        away(llama),
        tmp_path,
        tiny_pairs(32, group=[0, 1] * 16),
        max_steps=2,
        robust_scope=scope,
        ambiguity="group:2,step_size=0.5",
        gradient_accumulation_steps=4,
    )
    states = [trainer.group_state.weights.clone()]
    original = trainer.training_step

    def step(*args):
        result = original(*args)
        states.append(trainer.group_state.weights.clone())
        return result

    trainer.training_step = step
    trainer.train()
    changed = [not torch.equal(a, b) for a, b in itertools.pairwise(states)]
    assert changed == [False, False, False, True] * 2
    trainer.evaluate(tiny_pairs(4, seed=1, group=[0, 0, 1, 1]))
    assert torch.equal(trainer.group_state.weights, states[-1])


@pytest.mark.parametrize("method", ["dpo", "reward"])
def test_resume_is_the_uninterrupted_run_bit_for_bit(llama, reward_model, tmp_path, method):
    def build(folder):
        data = tiny_pairs(24, group=[0, 1, 2] * 8)
        options = {
            "ambiguity": "group:3,step_size=0.5",
            "max_steps": 6,
            "save_strategy": "steps",
            "save_steps": 3,
            "per_device_train_batch_size": 3,
        }
        build_ = dpo if method == "dpo" else reward
        return build_(llama if method == "dpo" else reward_model, folder, data, **options)

    whole = build(tmp_path / "whole")
    whole.train()
    checkpoint = tmp_path / "whole" / method / "checkpoint-3"
    saved = load_file(checkpoint / STATE_FILE)["group_state.weights"]
    assert saved.dtype == torch.float64 and not torch.equal(saved, whole.group_state.weights)

    resumed = build(tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert torch.equal(resumed.group_state.weights, whole.group_state.weights)
    for (name, mine), theirs in zip(
        resumed.model.named_parameters(), whole.model.parameters(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (resumed, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 6


def test_resume_with_another_objective_is_refused(llama, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1}
    data = tiny_pairs(8, group=[0, 1] * 4)
    dpo(llama, tmp_path, data, ambiguity="group:3,step_size=1", **options).train()
    checkpoint = tmp_path / "dpo" / "checkpoint-1"

    def resume(ambiguity, **more):
        trainer = dpo(llama, tmp_path, data, ambiguity=ambiguity, **options | more)
        trainer.train(resume_from_checkpoint=str(checkpoint))
        return trainer

    with pytest.raises(ValueError, match=r"saved with ambiguity='group:3.*resumed with 'tv:0.1'.*"):
        resume("tv:0.1")
    fresh = resume("group:2,step_size=0", resume_with_changed_ambiguity=True)
    assert torch.equal(fresh.group_state.weights, dr.GroupState(2).weights)
    with pytest.raises(ValueError, match=r"saved with pairs per step: 4, resumed with 2"):
        resume("group:3,step_size=1", per_device_train_batch_size=2)
    with pytest.raises(ValueError, match=r"saved with robust_scope: step, resumed with micro"):
        resume("group:3,step_size=1", robust_scope="microbatch")
    facts = {"ambiguity": "group:3,step_size=1"}
    tensors = {"group_state.weights": dr.GroupState(5).weights}
    save_file(tensors, checkpoint / STATE_FILE, metadata=facts)
    with pytest.raises(ValueError, match=r"expected group_state with .*\(3,\).*found .*\(5,\)"):
        resume("group:3,step_size=1")
    (checkpoint / STATE_FILE).unlink()  # as TRL leaves its checkpoints
    with pytest.raises(ValueError, match=r"without a word of its set.*resumed with 'group:3"):
        resume("group:3,step_size=1")
    resume("erm")


def test_every_option_of_the_objective_is_asked_for_on_resume(reward_model, tmp_path):
    """Only another set over pairs, or other groups, lets the kept weights go."""
    data = tiny_pairs(8, group=[0, 1] * 4, p_chosen=[0.5, 0.9] * 4)
    options = {"ambiguity": "group:2,step_size=1", "views": ["handle"], "max_steps": 1}
    options |= {"label_ambiguity": "chi2:0.1", "view_consistency_coefficient": 0.5}
    saved = reward(reward_model, tmp_path, data, save_strategy="steps", save_steps=1, **options)
    saved.train()
    checkpoint = tmp_path / "reward" / "checkpoint-1"

    def check(**more):
        return reward(reward_model, tmp_path, data, **options | more).check_resume(checkpoint)

    assert check() is True
    others = {
        "label_ambiguity": "erm",
        "view_consistency_coefficient": 0.25,
        "batch_sum_coefficient": 0.1,
        "views": ["url"],
    }
    for name, value in others.items():
        with pytest.raises(ValueError, match=rf"saved with {name}=.*another objective"):
            check(**{name: value})
    assert check(**others, resume_with_changed_ambiguity=True) is True
    fresh = {"ambiguity": "group:2,step_size=2", "resume_with_changed_ambiguity": True}
    assert check(**fresh, views=["url"]) is False
    # Files of older versions name fewer options.
    known = {"ambiguity", "views", "robust_scope", "groups", "processes", "pairs per step"}
    facts = {name: value for name, value in saved._facts().items() if name in known}
    tensors = {"group_state.weights": saved.group_state.weights}
    save_file(tensors, checkpoint / STATE_FILE, metadata=facts)
    assert check() is True and check(label_ambiguity="erm") is True
    with pytest.raises(ValueError, match="saved with views="):
        check(views=["url"])


# ------------------------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("columns", "ambiguity", "message"),
    [
        ({}, "group:2", r"train_dataset has no column 'group'.*0 to 1"),
        (
            {"group": [0, 1, 2, 1] * 2},
            "group:2",
            r"train_dataset has 3 groups \(0 to 2\).*\[0, 2\)",
        ),
        ({"group": [0, -1, 0, 1] * 2}, "group:2", r"holds -1"),
        ({"group": ["a", "b", "c", "b"] * 2}, "group:2", r"has 3 groups \(a, b, c\)"),
        ({"group": [7, 20240115] * 4}, "group:3", r"has 2 groups \(7, 20240115\).*\[0, 3\)"),
        ({"group": ["a", None] * 4}, "group:2", r"holds None: expected text"),
        ({"group": [0, 0.5] * 4}, "group", r"holds 0.5: expected an integer from 0 up"),
        ({"weight": [1.0, -0.5] * 4}, "erm", r"'weight' of train_dataset holds -0.5.*>= 0"),
        ({"weight": [1.0, float("nan")] * 4}, "tv:0.1", r"holds nan"),
        ({"weight": ["heavy"] * 8}, "erm", r"holds 'heavy'"),
    ],
)
def test_bad_columns_are_refused_before_the_model_is_loaded(tmp_path, columns, ambiguity, message):
    for build in (dpo, reward):
        with pytest.raises(ValueError, match=message):
            build("/no/such/model", tmp_path, tiny_pairs(8, **columns), ambiguity=ambiguity)


def test_eval_data_needs_groups_too(llama, tmp_path):
    data = tiny_pairs(8, group=[0, 1] * 4)
    for eval_dataset, name in ((tiny_pairs(4), "eval_dataset"), ({"a": tiny_pairs(4)}, "'a'")):
        with pytest.raises(ValueError, match=rf"{name}\]? has no column 'group'"):
            dpo(llama, tmp_path, data, {"eval_dataset": eval_dataset}, ambiguity="group:2")
    trainer = dpo(llama, tmp_path, data, ambiguity="group:2")
    with pytest.raises(ValueError, match=r"group:2' needs a column 'group', and the batch has"):
        trainer.evaluate(tiny_pairs(4))


def test_streamed_values_are_checked_as_they_come():
    collate = PairColumns(lambda examples: {}, Groups(2))
    with pytest.raises(ValueError, match=r"column 'group' holds 2: expected .*\[0, 2\)"):
        collate([{"group": 0}, {"group": 2}])
    with pytest.raises(ValueError, match="column 'group' holds None"):
        collate([{"group": 0}, {}])
    with pytest.raises(ValueError, match="column 'weight' holds inf"):
        collate([{"group": 0, "weight": float("inf")}])
    batch = collate([{"group": torch.tensor(1), "weight": 2}])  # 0-d tensors and ints are fine
    assert batch["group"].tolist() == [1] and batch["weight"].tolist() == [2.0]


@pytest.mark.parametrize("loss_type", ["aot", "aot_unpaired"])
def test_sorted_losses_are_refused_with_weights(tmp_path, loss_type):
    with pytest.raises(ValueError, match=rf"'{loss_type}' sorts the batch.*ambiguity='tv:0.1'"):
        dpo("/no/such/model", tmp_path, loss_type=["sigmoid", loss_type], ambiguity="tv:0.1")
    with pytest.raises(ValueError, match=rf"'{loss_type}' sorts .* a column 'weight'"):
        dpo("/no/such/model", tmp_path, tiny_pairs(8, weight=[1.0] * 8), loss_type=loss_type)


def test_losses_without_pairs_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"\['sft'\] has no preference loss for .*kl:0.1"):
        dpo("/no/such/model", tmp_path, loss_type="sft", ambiguity="kl:0.1")
    with pytest.raises(ValueError, match=r"loss_type: unknown 'sigmiod'; expected one of sigmoid"):
        dpo("/no/such/model", tmp_path, loss_type="sigmiod")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": -1.0}, r"beta: expected a number > 0, got -1.0"),
        ({"label_smoothing": 0.7}, r"label_smoothing: sigmoid expects \[0, 0.5\), got 0.7"),
        ({"loss_type": ["sft", "exo_pair"]}, r"label_smoothing: exo_pair expects \(0, 1\), got 0"),
        ({"loss_type": "bco_pair", "f_divergence_type": "forward_kl"}, r"f_divergence: forward_kl"),
        ({"loss_type": "discopop", "discopop_tau": 0.0}, r"discopop_tau: expected a number > 0"),
    ],
)
def test_numbers_that_no_loss_takes_are_refused_before_the_model_is_loaded(
    tmp_path, options, message
):
    with pytest.raises(ValueError, match=message):
        dpo("/no/such/model", tmp_path, **options)


@pytest.mark.parametrize("ambiguity", ["group:2", "kl:temperature=1,momentum=0.5"])
def test_states_of_several_processes_are_not_left_to_drift(tmp_path, monkeypatch, ambiguity):
    monkeypatch.setattr(DPOConfig, "world_size", 2)
    options = {"ambiguity": ambiguity, "robust_scope": "microbatch"}
    with pytest.raises(ValueError, match=r"'microbatch' on 2 processes: the .* would drift"):
        dpo("/no/such/model", tmp_path, tiny_pairs(8, group=[0, 1] * 4), **options)


@pytest.mark.parametrize("kind", ["context", "sequence"])
def test_parts_of_sequences_on_several_processes_are_refused(
    llama, reward_model, tmp_path, monkeypatch, kind
):
    """A process would score the last token of its part, and add up the log-probs of that alone."""
    for build, model in ((dpo, llama), (reward, reward_model)):
        monkeypatch.setattr(build(model, tmp_path).__class__, f"get_{kind[0]}p_size", lambda _: 2)
        for options in ({}, {"ambiguity": "tv:0.1", "robust_scope": "microbatch"}):
            with pytest.raises(ValueError, match=rf"{kind} parallelism of 2: .* part of every"):
                build(model, tmp_path, **options)


def test_the_same_pairs_on_several_processes_are_refused(llama, tmp_path, monkeypatch):
    monkeypatch.setattr(DPOTrainer, "get_tp_size", lambda _: 2)
    with pytest.raises(ValueError, match=r"'step' with tensor parallelism of 2: .* same pairs"):
        dpo(llama, tmp_path, ambiguity="tv:0.1")
    dpo(llama, tmp_path)
    dpo(llama, tmp_path, ambiguity="tv:0.1", robust_scope="microbatch")


# -------------------------------------------------------------------------------------- config


@pytest.mark.parametrize("config", [DPOConfig, RewardConfig])
def test_config(tmp_path, config):
    assert config(str(tmp_path), **quiet()).ambiguity == "erm"
    made = config(str(tmp_path), **quiet(ambiguity=dr.CVaR(alpha=0.3, trim=0.05)))
    assert made.ambiguity == "cvar:0.3,trim=0.05"
    assert '"ambiguity": "cvar:0.3,trim=0.05"' in made.to_json_string()
    (parsed,) = HfArgumentParser(config).parse_args_into_dataclasses(
        ["--output_dir", str(tmp_path), "--ambiguity", "kl:0.10", "--use_cpu", "--bf16", "false"]
    )
    assert parsed.ambiguity == "kl:0.1"
    with pytest.raises(ValueError, match="did you mean 'tv'"):
        config(str(tmp_path), **quiet(ambiguity="tvv:0.1"))
    with pytest.raises(ValueError, match="radius"):
        config(str(tmp_path), **quiet(ambiguity="tv:1.5"))
    with pytest.raises(ValueError, match="robust_scope: unknown 'micro'; did you mean 'microb"):
        config(str(tmp_path), **quiet(robust_scope="micro"))


def test_trl_configuration_is_erm(llama, tmp_path):
    trainer = DPOTrainer(llama, None, trl.DPOConfig(str(tmp_path), **quiet()), None, tiny_pairs(4))
    assert trainer.ambiguity == dr.ERM()


# ----------------------------------------------------------------------------------- messages


def messages(caplog):
    return [r.getMessage() for r in caplog.records if r.name.startswith("drrlhf")]


def test_the_device_batch_is_named_where_it_is_not_the_steps(llama, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    small = {"robust_scope": "microbatch", "gradient_accumulation_steps": 2}
    dpo(llama, tmp_path, ambiguity="tv:0.1", gradient_accumulation_steps=2)
    dpo(llama, tmp_path, ambiguity="tv:0.1", robust_scope="microbatch")
    dpo(llama, tmp_path, ambiguity="erm", **small)
    assert messages(caplog) == []
    dpo(llama, tmp_path, ambiguity="tv:0.1", max_steps=2, **small).train()
    assert len(messages(caplog)) == 1
    assert "batch of each device (4 pairs)" in messages(caplog)[0]
    dpo(llama, tmp_path, tiny_pairs(8, weight=[1.0] * 8), **small)
    assert "batch of each device" in messages(caplog)[1]
    assert "'weight' is used as the nominal weight" in messages(caplog)[2]


def test_an_optimizer_that_steps_inside_of_backward_is_refused_for_two_passes(llama, tmp_path):
    """The weights of a step are those of the model before it."""
    fused = {"optim": "adalomo", "ambiguity": "tv:0.1"}
    dpo(llama, tmp_path, **fused)
    dpo(llama, tmp_path, gradient_accumulation_steps=2, robust_scope="microbatch", **fused)
    with pytest.raises(ValueError, match="optim='adalomo' steps inside of every backward"):
        dpo(llama, tmp_path, gradient_accumulation_steps=2, **fused)


def test_a_precision_that_the_cpu_only_emulates_is_named(
    llama, reward_model, tmp_path, caplog, monkeypatch
):
    caplog.set_level(logging.WARNING)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    dpo(llama, tmp_path, bf16=False)
    assert messages(caplog) == []
    dpo(llama, tmp_path, bf16=True)
    reward(reward_model, tmp_path, bf16=True)
    assert len(messages(caplog)) == 2 and all("bf16=False" in m for m in messages(caplog))
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    dpo(llama, tmp_path, bf16=True)
    monkeypatch.setattr("torch.backends.cpu.get_cpu_capability", lambda: "DEFAULT")  # Arm, say
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    dpo(llama, tmp_path, bf16=True)
    assert len(messages(caplog)) == 2


def test_label_smoothing_is_named(llama, tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    options = {"label_smoothing": 0.1, "max_steps": 2}
    dpo(llama, tmp_path, loss_type="robust", **options)
    assert messages(caplog) == []
    dpo(llama, tmp_path, loss_type="sigmoid", **options).train()
    assert len(messages(caplog)) == 1 and "applied to loss_type='sigmoid'" in messages(caplog)[0]
    dpo(llama, tmp_path, loss_type=["hinge", "robust", "ipo"], **options).train()
    assert len(messages(caplog)) == 2
    assert "label_smoothing=0.1 has no effect on loss_type=hinge, ipo" in messages(caplog)[1]


# ---------------------------------------------------------------------------- migration, seams

SCRIPT = """
from trl import DPOConfig, DPOTrainer

args = DPOConfig(output_dir, max_steps=3, **quiet())
trainer = DPOTrainer(model=model, args=args, train_dataset=dataset)
trainer.train()
losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
"""


def test_changing_the_import_is_the_whole_migration(llama, tmp_path):
    def run(script):
        names = {"model": llama, "dataset": tiny_pairs(8), "quiet": quiet}
        names["output_dir"] = str(tmp_path)
        exec(script, names)
        return names

    ours = SCRIPT.replace("from trl import", "from drrlhf.trl import")
    before = run(SCRIPT)
    after = run(ours)
    assert type(after["trainer"]) is DPOTrainer
    assert after["losses"] == pytest.approx(before["losses"], rel=2e-6)
    weighted = run(ours.replace("max_steps=3", "max_steps=3, ambiguity='tv:0.1'"))
    assert weighted["losses"][-1] != pytest.approx(before["losses"][-1], rel=1e-4)


@pytest.mark.parametrize("version", ["1.9.9", "1.15.3", "2.0.0", "1.16.0rc1"])
def test_versions_outside_the_range(monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    with pytest.raises(ImportError, match=rf"supports trl>=1.16,<2, found trl {version}"):
        seam.check()


@pytest.mark.filterwarnings("ignore:drrlhf.trl is tested with:UserWarning")
@pytest.mark.parametrize("version", ["1.16.0", "1.100.0"])
def test_versions_inside_the_range(monkeypatch, version):
    monkeypatch.setattr(trl, "__version__", version)
    seam.check()


def test_moved_seams_are_named(monkeypatch):
    from transformers import Trainer

    def check(match):
        with pytest.raises(ImportError, match=match) as error:
            seam.check()
        assert trl.__version__ in str(error.value) and "pip install" in str(error.value)

    with monkeypatch.context() as patch:
        patch.delattr(trl.DPOTrainer, "_compute_loss")
        check(r"DPOTrainer._compute_loss is gone")
    with monkeypatch.context() as patch:
        patch.setattr(trl.RewardTrainer, "compute_loss", lambda self, model, batch: None)
        check(r"RewardTrainer.compute_loss takes \('self', 'model', 'batch'\), expected")
    with monkeypatch.context() as patch:
        patch.delattr(Trainer, "_load_optimizer_and_scheduler")
        check(r"Trainer._load_optimizer_and_scheduler is gone")
    with monkeypatch.context() as patch:
        patch.delattr("trl.trainer.dpo_config.DPOConfig")
        check(r"DPOConfig is gone")
    seam.check()


def test_a_loss_that_no_longer_calls_the_model_is_named(llama, tmp_path, monkeypatch):
    trainer = dpo(llama, tmp_path)
    monkeypatch.setattr(trl.DPOTrainer, "_compute_loss", lambda *args: 0.0)
    with pytest.raises(ImportError, match="outputs in the loss have no 'log_probs'"):
        trainer.compute_loss(trainer.model, dict(first_batch(trainer)))
    assert trainer.loss_types == ["sigmoid"] and not trainer.precompute_ref_logps


def test_import_drrlhf_leaves_trl_alone_and_a_missing_trl_is_named():
    code = (
        "import sys, drrlhf\n"
        "assert not {'trl', 'transformers'} & set(sys.modules)\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'trl': raise ModuleNotFoundError('no', name='trl')\n"
        "sys.meta_path.insert(0, Absent())\n"
        "try: import drrlhf.trl\n"
        "except ImportError as error: print(error)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install 'drrlhf[trl]'" in run.stdout
