"""A subclass that adds a term to the loss, as people do to regularise."""

from __future__ import annotations

import pytest

pytest.importorskip("trl")

import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl_fixtures import quiet, tiny_llama_dir, tiny_pairs, tiny_reward_dir

from drrlhf.trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

PAIRS = 12
OWN = {
    "dpo": (DPOTrainer, DPOConfig, AutoModelForCausalLM, tiny_llama_dir),
    "reward": (RewardTrainer, RewardConfig, AutoModelForSequenceClassification, tiny_reward_dir),
}


def regularised(base):
    class Mine(base):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
            extra = 0.5 * self.model.model.norm.weight.square().sum()
            return (loss[0] + extra, loss[1]) if return_outputs else loss + extra

    return Mine


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("ambiguity", ["erm", "kl:temperature=1", "tv:0.4", "cvar:0.3"])
@pytest.mark.parametrize("kind", OWN)
def test_accumulation_takes_the_mean_of_a_term_that_a_subclass_adds(
    kind, ambiguity, weighted, tmp_path
):
    """As of one large batch, where the term is there once."""
    base, configuration, auto, made = OWN[kind]
    folder = made(tmp_path / "model")
    rows = {"weight": [1.0 + i % 3 for i in range(PAIRS)]} if weighted else {}

    def step(accumulated):
        model = auto.from_pretrained(folder)
        before = torch.cat([one.detach().clone().flatten() for one in model.parameters()])
        config = configuration(
            str(tmp_path / "out"),
            max_steps=1,
            ambiguity=ambiguity,
            max_grad_norm=0.0,
            **quiet(
                per_device_train_batch_size=PAIRS // accumulated,
                gradient_accumulation_steps=accumulated,
                learning_rate=1.0,
                optim="sgd",
            ),
        )
        trainer = regularised(base)(
            model=model,
            args=config,
            train_dataset=tiny_pairs(PAIRS, **rows),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
        trainer.train()
        after = torch.cat([one.detach().flatten() for one in model.parameters()])
        return before - after, trainer.state.log_history[0]["loss"]

    whole, loss = step(1)
    assert whole.norm() > 5  # the term: its gradient is the weights of the norm, which are ones
    for accumulated in (2, 4):
        parts, logged = step(accumulated)
        assert (parts - whole).norm() < 1e-4 * whole.norm()
        assert logged == pytest.approx(loss, abs=1e-3)


def test_evaluation_is_no_part_of_the_stream_of_training(tmp_path):
    """With momentum the worst case of an evaluation set is that of the set without it, by hand."""
    folder = tiny_reward_dir(tmp_path / "model")
    pairs = tiny_pairs(11, 7)
    config = RewardConfig(
        str(tmp_path / "out"),
        ambiguity="kl:temperature=1,momentum=0.9",
        max_steps=6,
        **quiet(learning_rate=1e-2),
    )
    trainer = RewardTrainer(
        AutoModelForSequenceClassification.from_pretrained(folder),
        config,
        train_dataset=tiny_pairs(24),
        eval_dataset=pairs,
        processing_class=AutoTokenizer.from_pretrained(folder),
    )
    trainer.train()
    kept = trainer.normaliser_state.state_dict()
    found = trainer.evaluate()
    losses = []
    with torch.no_grad():
        for row in trainer.eval_dataset:
            chosen, rejected = (
                trainer.model(torch.tensor([row[f"{side}_ids"]])).logits.double().squeeze()
                for side in ("chosen", "rejected")
            )
            losses.append(torch.nn.functional.softplus(rejected - chosen))
    exact = torch.stack(losses).exp().mean().log().item()
    assert found["eval_loss"] == pytest.approx(exact, rel=1e-4)
    assert found["eval_robust/value"] == pytest.approx(exact, rel=1e-4)
    assert exact > found["eval_robust/mean_loss"]
    assert all(
        torch.equal(one, kept[name]) for name, one in trainer.normaliser_state.state_dict().items()
    )
