"""More pairs than one block, or one launch, has room for, against the reference."""

from __future__ import annotations

import pytest
import torch
from three_ways import BACKENDS, INTERPRETED

from drrlhf import backends, ops
from drrlhf.ambiguity import Encoded, parse_ambiguity

# One Triton launch takes 8192, one block of CUDA threads 16384. Interpreted, where a pair takes two
# programs of some milliseconds, that launch takes fewer here; of which a tenth is no whole number,
# for the dual variable of tv:0.1 is any number between two losses otherwise.
PAIRS = 70 + (8192 if INTERPRETED else 16384)
FEWER = 103
SETS = ["erm", "tv:0.1", "kl:0.2", "chi2:0.5", "chi2:penalty=0.3", "cvar:0.3,trim=0.01"]


@pytest.fixture(params=[b for b in BACKENDS if b != "reference"])
def backend(request):
    with backends.use(request.param):
        yield request.param


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hold(op, arguments, state=None):
    """Value, weights and everything else as the reference has it."""
    ours = getattr(ops, op)(*arguments)
    with backends.use("reference"):
        truth = getattr(ops, op)(*arguments)
    for a, b in zip(ours, truth):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


def adversary(text, n=PAIRS):
    """groups, group_weights and the encoded set."""
    if text != "group":
        return (None, None), parse_ambiguity(text).encode()
    groups = torch.arange(n) * 7 % 5
    weights = torch.full((5,), 0.2, dtype=torch.float64)
    return (groups, weights), Encoded("group", 0.5)


@pytest.mark.parametrize("text", [*SETS, "group"])
def test_robust_risk(backend, text):
    groups, encoded = adversary(text)
    hold("robust_risk", (numbers(PAIRS), numbers(PAIRS, seed=1).abs(), *groups, *encoded))


@pytest.mark.parametrize("text", ["tv:0.1", "group"])
def test_sequence_preference_loss(backend, text, monkeypatch):
    n = PAIRS
    if INTERPRETED:
        from drrlhf.kernels import sequence_preference_loss

        n = FEWER
        monkeypatch.setattr(sequence_preference_loss, "ONE_LAUNCH", n - 1)
    groups, encoded = adversary(text, n)
    logps, labels = -numbers(2 * n, 3).abs(), torch.ones(2 * n, 3, dtype=torch.long)
    labels[::5, 1:] = -100
    references = numbers(2 * n, seed=1)
    rest = (None, references, None, *groups, -100, 0.1, 0.2, *encoded)
    hold("sequence_preference_loss", (logps, labels, *rest))


def test_equal_bit_for_bit_from_run_to_run(backend):
    groups, encoded = adversary("kl:0.2")
    for n in (PAIRS, 600):
        losses = 30 * numbers(n)
        runs = [ops.robust_risk(losses, None, *groups, *encoded) for _ in range(3)]
        for again in runs[1:]:
            assert all(torch.equal(a, b) for a, b in zip(again, runs[0]))
