"""Micro-benchmarks of single calls, for watching one op while it is worked on.

    make bench-micro

``drrlhf bench`` compares with others and checks the results; this does neither.
"""

from __future__ import annotations

import pytest
import torch

import drrlhf as dr
from drrlhf.threads import threads

PAIRS = (8, 256, 4096)


@pytest.fixture(autouse=True)
def one_thread():
    with threads(1):
        yield


def leaf(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype).requires_grad_()


@pytest.mark.parametrize("n", PAIRS)
@pytest.mark.parametrize("ambiguity", ["erm", "tv:0.1", "kl:0.1", "chi2:0.5", "cvar:0.3"])
def test_robust_risk(benchmark, ambiguity, n):
    losses, ambiguity = leaf(n), dr.parse_ambiguity(ambiguity)

    @benchmark
    def step():
        losses.grad = None
        dr.robust_risk(losses, ambiguity).value.backward()


@pytest.mark.parametrize("n", PAIRS)
@pytest.mark.parametrize("ambiguity", ["erm", "tv:0.1"])
def test_preference_loss(benchmark, ambiguity, n):
    chosen, rejected = leaf(n), leaf(n, seed=1)
    reference, ambiguity = torch.zeros(n), dr.parse_ambiguity(ambiguity)

    @benchmark
    def step():
        chosen.grad = rejected.grad = None
        dr.preference_loss(
            chosen, rejected, reference, reference, ambiguity=ambiguity
        ).loss.backward()


@pytest.mark.parametrize("n", PAIRS)
def test_reward_loss(benchmark, n):
    chosen, rejected = leaf(n), leaf(n, seed=1)
    ambiguity = dr.parse_ambiguity("tv:0.1")

    @benchmark
    def step():
        chosen.grad = rejected.grad = None
        dr.reward_loss(chosen, rejected, ambiguity=ambiguity).loss.backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "forward+backward"])
def test_token_logprobs(benchmark, backward, dtype):
    logits = leaf(64, 8192, dtype=dtype).detach().requires_grad_(backward)
    labels = torch.arange(64) * 100

    @benchmark
    def step():
        logits.grad = None
        logps = dr.token_logprobs(logits, labels)
        if backward:
            logps.sum().backward()
