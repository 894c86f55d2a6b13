"""The module twins: same numbers, state that is saved, left alone in eval mode."""

from __future__ import annotations

import pytest
import torch

import drrlhf as dr


def test_modules_equal_functions():
    l = torch.randn(6)
    z = torch.zeros(6)
    torch.testing.assert_close(
        dr.RobustRiskModule("tv:0.2")(l).value, dr.robust_risk(l, "tv:0.2").value
    )
    module = dr.PreferenceLossModule("cvar:0.5", beta=0.3, loss_type="hinge")
    out = dr.preference_loss(l, z, z, z, beta=0.3, loss_type="hinge", ambiguity="cvar:0.5")
    torch.testing.assert_close(module(l, z, z, z).loss, out.loss)
    module = dr.RewardLossModule(dr.KL(radius=0.2), center_coefficient=0.1)
    out = dr.reward_loss(l, z, center_coefficient=0.1, ambiguity="kl:0.2")
    torch.testing.assert_close(module(l, z).loss, out.loss)
    assert "kl:0.2" in repr(module)


def test_group_state_is_stepped_saved_and_left_alone_in_eval():
    module = dr.RobustRiskModule(dr.Group(2, step_size=1.0))
    l, groups = torch.tensor([1.0, 3.0]), torch.tensor([0, 1])
    module(l, groups=groups)
    stepped = module.group_state.weights.clone()
    assert stepped[1] > stepped[0]
    module.eval()
    risk = module(l, groups=groups)
    assert torch.equal(module.group_state.weights, stepped)
    torch.testing.assert_close(risk.weights.double(), stepped)
    other = dr.RobustRiskModule(dr.Group(2))
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.group_state.weights, stepped)


def test_the_head_module_equals_its_function():
    hidden, weight = torch.randn(4, 3, 8), torch.randn(11, 8)
    labels, references = torch.randint(0, 11, (4, 3)), -5 * torch.rand(4)
    given = {"beta": 0.3, "softcap": 5.0, "label_probs": torch.tensor([0.9, 0.4])}
    module = dr.LinearPreferenceLossModule("tv:0.2", **given)
    out = dr.linear_preference_loss(hidden, weight, labels, references, ambiguity="tv:0.2", **given)
    torch.testing.assert_close(module(hidden, weight, labels, references).loss, out.loss)


@pytest.mark.parametrize(
    ("kind", "options", "words"),
    [
        (dr.RobustRiskModule, {"betta": 1}, "RobustRiskModule.*'betta': there is no such"),
        (dr.RobustRiskModule, {"beta": 1}, "'beta': there is no such"),
        (dr.PolicyLossModule, {"label_probs": None}, "'label_probs': there is no such"),
        (dr.RewardLossModule, {"update": False}, "'update': it is the module's own"),
    ],
)
def test_a_module_refuses_what_its_function_does_not_take(kind, options, words):
    with pytest.raises(TypeError, match=words):
        kind("erm", **options)
