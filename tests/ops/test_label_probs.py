"""Labels that are probabilities: losses over both outcomes, and the worst probability near one."""

from __future__ import annotations

import math

import pytest
import torch

import drrlhf as dr
from drrlhf.functional.label_probs import over_outcomes
from drrlhf.reference.pair_losses import PAIR_LOSSES

N = 12


def numbers(seed=0):
    draw = torch.Generator().manual_seed(seed)
    made = torch.randn(4, N, generator=draw, dtype=torch.float64) * 5 - 20
    return [*made.unbind(), torch.rand(N, generator=draw, dtype=torch.float64)]


def scanned(l, other, p, radius):
    """The worst case over a fine grid of probabilities q, by the ball's definition."""
    q = torch.linspace(0, 1, 200_001, dtype=torch.float64)
    inside = (q - p) ** 2 <= 2 * radius * p * (1 - p) + 1e-15
    inside |= (q - p).abs() <= 2.6e-6  # the grid may miss a ball of one point
    return float((q * l + (1 - q) * other)[inside].max())


@pytest.mark.mathematics
@pytest.mark.parametrize("radius", [0.0, 0.02, 0.5, 40.0])
def test_the_worst_probability_by_its_definition(radius):
    draw = torch.Generator().manual_seed(1)
    l, other = torch.randn(2, 40, generator=draw, dtype=torch.float64)
    p = torch.rand(40, generator=draw, dtype=torch.float64)
    p[:4] = torch.tensor([0.0, 1.0, 0.5, 1e-9])
    found = over_outcomes(l, other, p, f"chi2:{radius}")
    expected = [scanned(*one, radius) for one in zip(l, other, p, strict=True)]
    torch.testing.assert_close(found, torch.tensor(expected).double(), rtol=0, atol=4e-5)
    assert torch.equal(found[:2], torch.stack([other[0], l[1]]))  # no doubt


@pytest.mark.mathematics
def test_soft_labels_are_the_cross_entropy():
    *logps, p = numbers()
    margins = 0.3 * ((logps[0] - logps[2]) - (logps[1] - logps[3]))
    expected = torch.nn.functional.binary_cross_entropy_with_logits(margins, p, reduction="none")
    found = dr.preference_loss(*logps, beta=0.3, label_probs=p)
    torch.testing.assert_close(found.losses, expected)
    torch.testing.assert_close(found.loss, expected.mean())
    # cDPO is one probability for all.
    smoothed = dr.preference_loss(*logps, beta=0.3, label_smoothing=0.2)
    same = dr.preference_loss(*logps, beta=0.3, label_probs=torch.full((N,), 0.8).double())
    torch.testing.assert_close(same.losses, smoothed.losses)
    margin = torch.linspace(-1, 1, N, dtype=torch.float64)
    chosen, rejected = logps[0] / 5, logps[1] / 5
    expected = torch.nn.functional.binary_cross_entropy_with_logits(
        chosen - rejected - margin, p, reduction="none"
    )
    rewards = dr.reward_loss(chosen, rejected, margin=margin, center_coefficient=0.1, label_probs=p)
    torch.testing.assert_close(rewards.losses, expected + 0.1 * (chosen + rejected) ** 2)


@pytest.mark.mathematics
@pytest.mark.parametrize("loss_type", PAIR_LOSSES)
def test_certain_labels_are_the_loss_itself(loss_type):
    *logps, _ = numbers()
    logps = logps if PAIR_LOSSES[loss_type].reference else logps[:2]
    lengths = {f"{side}_lengths": torch.arange(3, 3 + N) for side in ("chosen", "rejected")}
    lengths["rejected_lengths"] = lengths["rejected_lengths"].flip(0)
    smoothing = {"label_smoothing": 0.1} if loss_type == "exo_pair" else {}
    options = lengths | smoothing | {"loss_type": loss_type}
    plain = dr.pair_losses(*logps, **options)
    sure = dr.pair_losses(*logps, **options, label_probs=torch.ones(N).double())
    assert torch.equal(sure, plain)
    never = dr.pair_losses(*logps, **options, label_probs=torch.zeros(N).double())
    swapped = [x for pair in (logps[1::-1], logps[:1:-1]) for x in pair]
    turned = options | dict(zip(lengths, [*lengths.values()][::-1], strict=True))
    torch.testing.assert_close(never, dr.pair_losses(*swapped, **turned))


@pytest.mark.mathematics
@pytest.mark.parametrize("ambiguity", ["erm", "tv:0.2"])
def test_gradients_hold_the_worst_probability_fast(ambiguity):
    *logps, p = numbers(2)
    logps = [(x / 5).requires_grad_() for x in logps]
    options = {"label_probs": p, "label_ambiguity": "chi2:0.3", "ambiguity": ambiguity}
    assert torch.autograd.gradcheck(lambda *x: dr.preference_loss(*x, **options).loss, logps)
    assert torch.autograd.gradcheck(lambda *x: dr.reward_loss(*x, **options).loss, logps[:2])
    plain = dr.preference_loss(*logps, label_probs=p, ambiguity=ambiguity).losses
    assert (dr.preference_loss(*logps, **options).losses >= plain - 1e-12).all()


@pytest.mark.parametrize("ambiguity", ["erm", "chi2:0.1"])
def test_no_probability_is_nan_where_nothing_refuses_it(monkeypatch, ambiguity):
    """A GPU does not read the values; a clamp would have made certain labels of them."""
    monkeypatch.setattr("drrlhf.functional.label_probs.check_none", lambda *_: None)
    rewards = torch.tensor([1.0, -2.0, 0.5, 3.0, 0.0])
    probs = torch.tensor([-0.2, 0.7, 1.5, math.nan, math.inf])
    found = dr.reward_loss(
        rewards, torch.zeros(5), label_probs=probs, label_ambiguity=ambiguity
    ).losses
    assert found.isnan().tolist() == [True, False, True, True, True]


def test_a_masked_pair_has_no_gradient_and_an_impossible_outcome_no_loss():
    chosen = torch.tensor([1.0, math.nan, math.inf], requires_grad=True)
    rejected = torch.tensor([0.0, 2.0, 0.0], requires_grad=True)
    found = dr.reward_loss(
        chosen,
        rejected,
        label_probs=torch.tensor([0.7, 0.5, 1.0]),
        label_ambiguity="chi2:1",
        nominal=torch.tensor([1.0, 0.0, 1.0]),
    )
    assert found.loss.isfinite() and found.losses[2] == 0
    found.loss.backward()
    assert chosen.grad[1] == rejected.grad[1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_probs": torch.ones(3)}, r"label_probs: expected shape \(12,\)"),
        (
            {"label_probs": torch.full((N,), 1.1)},
            r"label_probs: expected probabilities in \[0, 1\]",
        ),
        ({"label_probs": torch.full((N,), math.nan)}, "expected probabilities"),
        ({"label_probs": torch.ones(N, dtype=torch.long)}, "label_probs: expected a floating"),
        ({"label_ambiguity": "chi2:0.1"}, "needs the probability of every label"),
        ({"label_ambiguity": "tv:0.1"}, "label_ambiguity: expected 'erm' or 'chi2:RADIUS'"),
        ({"label_ambiguity": "chi2:penalty=1"}, "label_ambiguity: expected"),
    ],
)
def test_wrong_arguments(options, message):
    *logps, _ = numbers()
    for call in (
        dr.preference_loss,
        dr.pair_losses,
        lambda a, b, *_, **o: dr.reward_loss(a, b, **o),
    ):
        with pytest.raises(ValueError, match=message):
            call(*logps, **options)
