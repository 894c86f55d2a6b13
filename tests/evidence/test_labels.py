"""The evidence on labels: what a label says, and the loss of each method, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from drrlhf.demo.sentiment import Text
from evidence.labels import run
from evidence.shift.shifts import Drawing, Drawn


def texts():
    return [
        Text("movie", str(i), f"text {i}", 0.0, votes)
        for i, votes in enumerate([(3, 3, 4), (1, 3, 5), (0, 0, 0)])
    ]


def drawing(n=2000):
    rows = torch.tensor([[0, 1], [0, 2]]).repeat(n // 2, 1)
    return Drawing(Drawn(rows, torch.zeros(n)), torch.zeros(n), {}, {})


def test_labels_are_votes_that_do_not_tie():
    found = run.labels(drawing(), texts(), seed=3)
    # Of nine votes for the first two, 3 > 1 twice, 4 > 1, 4 > 3; 3 < 5 twice, 4 < 5; two tie.
    assert found["chance"][:2].tolist() == pytest.approx([4 / 7, 1])
    assert found["first"][0::2].mean().item() == pytest.approx(4 / 7, abs=0.05)
    p = 4 / 7
    two_or_three = p**3 + 3 * p**2 * (1 - p)
    assert found["majority"][0::2].mean().item() == pytest.approx(two_or_three, abs=0.05)
    assert found["share"][0::2].mean().item() == pytest.approx(p, abs=0.03)
    assert (found["majority"] == (found["share"] > 0.5)).all()
    assert all((one[1::2] == 1).all() for one in found.values())
    assert {*found["share"].tolist()} == {*torch.tensor([0, 1 / 3, 2 / 3, 1]).tolist()}
    again = run.labels(drawing(), texts(), seed=3)
    assert all(torch.equal(found[name], again[name]) for name in found)


@pytest.mark.parametrize("name", run.METHODS)
def test_the_loss_of_each_method(name):
    method, beta = run.METHODS[name], 0.5
    logps, references = ([2.0, -1.0], [1.0, 0.5]), ([0.5, 0.0], [0.25, 0.75])
    probs = [1.0, 0.0] if method.label in ("first", "majority") else [2 / 3, 1 / 3]
    tensors = [tuple(torch.tensor(x).double() for x in pair) for pair in (logps, references)]
    found = run.loss(*tensors, torch.tensor(probs).double(), method, beta)
    total = 0.0
    for i, p in enumerate(probs):
        margin = beta * ((logps[0][i] - references[0][i]) - (logps[1][i] - references[1][i]))
        one, other = (math.log1p(math.exp(-sign * margin)) for sign in (1, -1))
        if name in ("smooth", "unbiased"):
            e = 0.2
            kept, turned = (1 - e, e) if name == "smooth" else ((1 - e) / 0.6, -e / 0.6)
            p = p * kept + (1 - p) * turned
            total += p * one + (kept + turned - p) * other
            continue
        if name == "pro":  # the worst probability of a chi-square ball of radius 0.1 around p
            away = math.sqrt(2 * 0.1 * p * (1 - p))
            p = min(max(p + away * math.copysign(1, one - other), 0), 1)
        total += p * one + (1 - p) * other
    assert found.item() == pytest.approx(total / 2, rel=1e-6)
