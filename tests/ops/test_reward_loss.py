"""`reward_loss` against its formula."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from three_ways import BACKENDS

import drrlhf as dr
from drrlhf import backends


@pytest.fixture(params=BACKENDS)
def backend(request):
    with backends.use(request.param):
        yield request.param


def definition(chosen, rejected, margin=0.0, center=0.0):
    return -F.logsigmoid(chosen - rejected - margin) + center * (chosen + rejected) ** 2


@pytest.mark.mathematics
@pytest.mark.pairwise
@pytest.mark.parametrize("margin", [False, True])
@pytest.mark.parametrize("center", [0.0, 0.3])
@pytest.mark.parametrize("ambiguity", ["erm", "tv:0.2", "cvar:0.3", "kl:0.4", "chi2:penalty=0.5"])
def test_equals_losses_then_robust_risk(backend, margin, center, ambiguity):
    c, r = (3 * torch.randn(2, 9, dtype=torch.float64)).unbind()
    c.requires_grad_(), r.requires_grad_()
    m = torch.rand(9, dtype=torch.float64) if margin else None
    losses = definition(c, r, m if margin else 0.0, center)
    risk = dr.robust_risk(losses, ambiguity)
    out = dr.reward_loss(c, r, margin=m, center_coefficient=center, ambiguity=ambiguity)
    torch.testing.assert_close(out.losses, losses.detach())
    torch.testing.assert_close(out.loss, risk.value)
    torch.testing.assert_close(out.weights, risk.weights)
    for a, b in zip(*(torch.autograd.grad(x, (c, r)) for x in (out.loss, risk.value))):
        torch.testing.assert_close(a, b)


@pytest.mark.mathematics
def test_gradcheck(backend):
    c, r = torch.randn(2, 6, dtype=torch.float64).unbind()
    assert torch.autograd.gradcheck(
        lambda x, y: dr.reward_loss(x, y, center_coefficient=0.1, ambiguity="kl:0.2").loss,
        (c.clone().requires_grad_(), r.clone().requires_grad_()),
    )


@pytest.mark.mathematics
def test_confident_pairs_keep_their_digits(backend):
    """-log sigmoid(40) is 4e-18, not 0; its gradient is not 0 either."""
    c = torch.tensor([40.0], requires_grad=True)
    out = dr.reward_loss(c, torch.zeros(1))
    tiny = math.exp(-40.0)
    assert out.losses.item() == pytest.approx(tiny, rel=1e-5, abs=0)
    assert torch.autograd.grad(out.loss, c)[0].item() == pytest.approx(-tiny, rel=1e-5, abs=0)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda x: dr.reward_loss(x, x[:2]), r"rejected_rewards: expected shape \(3,\)"),
        (lambda x: dr.reward_loss(x, x, margin=x[:1]), "margin: expected shape"),
        (lambda x: dr.reward_loss(x, x, center_coefficient=-1.0), "center_coefficient"),
        (lambda x: dr.reward_loss(x.int(), x), "chosen_rewards: expected a floating"),
        (lambda x: dr.reward_loss(x * math.inf, x, check_finite=True), "index 0"),
    ],
)
def test_bad_input(backend, call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([1.0, 2.0, 3.0]))


@pytest.mark.usual
def test_compiles(backend):
    torch._dynamo.reset()
    c, r = torch.randn(2, 5).unbind()
    c.requires_grad_()
    step = lambda x, y: dr.reward_loss(x, y, ambiguity=dr.TV(radius=0.3)).loss  # noqa: E731
    value = torch.compile(step, fullgraph=True, backend="aot_eager")(c, r)
    torch.testing.assert_close(value, step(c, r))
    (ours,), (eager,) = (torch.autograd.grad(x, c) for x in (value, step(c, r)))
    torch.testing.assert_close(ours, eager)
