"""`use_liger_kernel=True`: Liger's layers in the model, our head and our losses where they were.

Its kernels are a GPU's. What is tested without one: what training asks Liger to put in, with Liger
itself where it is installed; and that a step stays the same where the layers compute the same.
"""

from __future__ import annotations

import types

import pytest

pytest.importorskip("trl")

from trl_fixtures import quiet, tiny_pairs, tiny_tokenizer  # isort: skip

import steps
import torch
import transformers
from three_ways import in_turn
from transformers import TrainerCallback

import drrlhf.trl as ours
from drrlhf.trl.head import TokenLogprobHead

METHODS = ["dpo", "reward", "grpo"]


class Stop(Exception):
    pass


class Begun(TrainerCallback):
    """Ends training before the first step, with the model as it would be trained."""

    def on_train_begin(self, *args, model=None, **kwargs):
        self.model = model
        raise Stop


def base(model):
    return getattr(model, model.base_model_prefix)


@pytest.fixture
def liger_put_back():
    """Liger's names in the module of the model, which it replaces for the whole process."""
    from transformers.models.llama import modeling_llama

    before = dict(vars(modeling_llama))
    yield
    vars(modeling_llama).update(before)


@pytest.mark.parametrize("method", METHODS)
def test_liger_itself_gets_the_layers_and_not_the_head(method, models, tmp_path, liger_put_back):
    pytest.importorskip("liger_kernel")
    begun = Begun()
    trainer = steps.trainer(
        method, models[method], str(tmp_path), trainer_callbacks=[begun], use_liger_kernel=True
    )
    forward = trainer.model.forward
    with pytest.raises(Stop):
        trainer.train()
    for layer in base(begun.model).layers:
        assert "Liger" in layer.mlp._get_name() and "Liger" in repr(layer.input_layernorm)
    assert begun.model.forward == forward, "the forward that our head hangs on is gone"


class FakeLiger:
    """Puts into a model what Liger does: layers (that compute the same here), and, unless it is
    told not to, a forward with its own loss."""

    def __init__(self):
        self.configs, self.runs = [], 0

    def apply(self, model, config):
        config = config or {}
        self.configs.append(config)
        if config.get("fused_linear_cross_entropy", True):

            def forward(*args, **kwargs):
                raise AssertionError("Liger's own loss was reached")

            model.forward = forward
        for layer in base(model).layers:
            plain = layer.mlp.forward

            def counted(module, x, plain=plain):
                self.runs += 1
                return plain(x)

            layer.mlp.forward = types.MethodType(counted, layer.mlp)


@pytest.fixture
def fake(monkeypatch):
    liger = FakeLiger()
    monkeypatch.setattr(transformers.trainer, "apply_liger_kernel", liger.apply)
    return liger


@pytest.mark.parametrize("method, ambiguity", in_turn(METHODS, ["tv:0.3", "erm"]))
def test_a_step_is_the_same_through_its_layers(
    method, ambiguity, models, tmp_path, fake, monkeypatch
):
    rows = []
    apply = TokenLogprobHead.apply

    def spy(self, hidden, *rest):
        rows.append(len(hidden))
        return apply(self, hidden, *rest)

    monkeypatch.setattr(TokenLogprobHead, "apply", spy)
    options = {"ambiguity": ambiguity, "max_steps": 2}
    options |= {} if method == "reward" else {"head": "drrlhf"}
    plain = steps.run(method, models[method], str(tmp_path / "plain"), **options)
    alone, seen = len(rows), fake.runs
    assert not seen and not fake.configs
    liger = steps.run(
        method, models[method], str(tmp_path / "liger"), use_liger_kernel=True, **options
    )
    (config,) = fake.configs
    assert config["fused_linear_cross_entropy"] is False and fake.runs
    assert len(rows) == 2 * alone and (alone > 0) == (method != "reward")
    for a, b in zip(plain["gradients"], liger["gradients"], strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_evaluation_goes_through_them_too(method, models, tmp_path, fake):
    """transformers hands a model with Liger's layers one more argument there."""
    data = tiny_pairs(8)
    if method == "grpo":
        data = data.remove_columns(["chosen", "rejected"])
    trainer = steps.trainer(
        method, models[method], str(tmp_path), use_liger_kernel=True, trainer_eval_dataset=data
    )
    trainer.train()
    before = fake.runs
    assert "eval_loss" in trainer.evaluate() and fake.runs > before


@pytest.mark.parametrize("method", METHODS)
def test_liger_s_own_loss_is_refused(method, models, tmp_path):
    with pytest.raises(ValueError, match="fused_linear_cross_entropy"):
        steps.trainer(
            method,
            models[method],
            str(tmp_path),
            use_liger_kernel=True,
            liger_kernel_config={"fused_linear_cross_entropy": True},
        )


def test_the_rest_of_its_configuration_is_kept(models, tmp_path):
    config = ours.RewardConfig(
        str(tmp_path), **quiet(use_liger_kernel=True, liger_kernel_config={"rope": False})
    )
    ours.RewardTrainer(
        model=models["reward"],
        args=config,
        train_dataset=tiny_pairs(4),
        processing_class=tiny_tokenizer(),
    )
    assert config.liger_kernel_config == {"rope": False, "fused_linear_cross_entropy": False}
