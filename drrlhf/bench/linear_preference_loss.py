"""The whole preference head, from hidden states to the loss and its gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import drrlhf as dr
from drrlhf import backends
from drrlhf.bench import heads, peers
from drrlhf.bench.gate import Gate
from drrlhf.bench.heads import COMPILED, LIGER, PLAIN, TRL, Problem
from drrlhf.bench.registry import OURS, SUITES, Case, Contest, Unavailable, Work, with_gradients

# Pairs, tokens of a sequence, vocabulary, depth.
SHAPES = {"cpu": (4, 128, 32000, 1024), "gpu": (8, 512, 151936, 4096), "quick": (3, 8, 211, 32)}
BETA = 0.1
ROBUST = "tv:0.1"
ERM = f"{OURS} (erm)"
KERNELS = ("linear_token_logprobs", "sequence_preference_loss")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden (2n, L, D), weight, labels (2n, L)


def cases(suite: str) -> Iterator[Case]:
    """Robust against plain with our head, and plain DPO by others, for both heads.

    The reference log-probs are 0, so that Liger, which takes none precomputed, computes the same.
    """
    for head in ("frozen", "trained"):
        yield _case(suite, SHAPES[suite], torch.bfloat16, head)


def _case(suite: str, shape: tuple[int, int, int, int], dtype: torch.dtype, head: str) -> Case:
    pairs, length, v, d = shape
    return Case(
        op="linear_preference_loss",
        metric=f"{ROBUST}, forward+backward",
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        head=head,
        memory=True,
        kernels=KERNELS,
        order=4,
        flops=2 * (2 * pairs * length) * v * d * {"frozen": 2, "trained": 3}[head],
        build=lambda: _contest(suite, shape, dtype, head == "trained"),
    )


def dpo_loss(sequence_logps: Tensor) -> Tensor:
    """Plain DPO () of sequences (2n,) [chosen..., rejected...], the reference at 0."""
    chosen, rejected = sequence_logps.chunk(2)
    return -functional.logsigmoid(BETA * (chosen - rejected)).mean()


def robust_dpo_loss(sequence_logps: Tensor, ambiguity: str) -> Tensor:
    """The same in the worst case, by plain PyTorch; differentiable."""
    chosen, rejected = sequence_logps.chunk(2)
    zeros = torch.zeros_like(chosen)
    with backends.use("reference"):
        return dr.preference_loss(
            chosen, rejected, zeros, zeros, beta=BETA, ambiguity=ambiguity
        ).loss


def _over(head: heads.Head) -> Loss:
    """Plain DPO over somebody's token log-probs."""

    def loss(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
        logps = head(hidden.flatten(0, 1), weight, labels.flatten())
        return dpo_loss(logps.view_as(labels).sum(1))

    return loss


def _liger(suite: str) -> Loss:
    if suite == "quick":
        raise Unavailable(peers.NOT_IN_QUICK)
    function = peers.load("liger_kernel.chunked_loss", "liger-kernel").LigerFusedLinearDPOLoss(
        beta=BETA, use_ref_model=False
    )
    return lambda hidden, weight, labels: function(weight, hidden, labels)[0]


def _contest(
    suite: str, shape: tuple[int, int, int, int], dtype: torch.dtype, trained: bool
) -> Contest:
    pairs, length, v, d = shape
    device = SUITES[suite]
    problem = Problem(2 * pairs * length, v, d, dtype, device, trained)
    labels = problem.labels.view(2 * pairs, length)
    reference = torch.zeros(2 * pairs, device=device)

    def ours(ambiguity: str) -> Loss:
        function: Any = partial(dr.linear_preference_loss, beta=BETA, ambiguity=ambiguity)
        return lambda *inputs: function(*inputs, reference).loss

    def work(loss: Loss) -> Work:
        def of_states() -> Tensor:
            hidden = problem.hidden.view(2 * pairs, length, d)
            return loss(hidden, problem.weight, labels).float()

        return with_gradients(of_states, problem.clear, problem.gradients)

    erm, robust = (_gate(problem, labels, ambiguity) for ambiguity in ("erm", ROBUST))
    implementations: dict[str, Callable[[], Work]] = {
        OURS: lambda: work(ours(ROBUST)),
        ERM: lambda: work(ours("erm")),
        PLAIN: lambda: work(_over(heads.plain)),
        COMPILED: lambda: work(peers.compiled(_over(heads.plain), suite)),
        TRL: lambda: work(_over(heads.trl())),
        LIGER: lambda: work(_liger(suite)),
    }
    gates = dict.fromkeys(implementations, erm) | {OURS: robust}
    return Contest(implementations, ours=(OURS, ERM), baseline=(ERM,), gates=gates)


def _gate(problem: Problem, labels: Tensor, ambiguity: str) -> Gate:
    """The truth of the whole head, whose pair weights depend on every token."""
    known: dict[str, Any] = {}

    def slopes(logps: Tensor) -> Tensor:
        """From float64 log-probs (N,) of all tokens to the loss's derivative by each."""
        with torch.enable_grad():
            sums = logps.view_as(labels).sum(1).requires_grad_()
            loss = robust_dpo_loss(sums, ambiguity)
            (slope,) = torch.autograd.grad(loss, sums)
        known.update(loss=loss.detach(), sums=sums.detach(), slope=slope, logps=logps)
        return slope.repeat_interleave(labels.shape[1])

    def truth() -> Mapping[str, Tensor]:
        found = problem.truth(slopes, everything=True)
        found.pop("log-probs")
        return {"loss": known["loss"], **found}

    def by_plain() -> Mapping[str, Tensor]:
        problem.clear()
        logps = heads.plain(problem.hidden, problem.weight, problem.labels)
        loss = robust_dpo_loss(logps.view_as(labels).sum(1), ambiguity)
        loss.backward()
        return {"loss": loss.detach(), **problem.gradients()}

    def floors() -> Mapping[str, float]:
        # One number may be exact by luck. What is to be expected: each token's log-prob rounded
        # in the dtype of the head, each sequence's sum in float32, independently.
        slope, tokens = known["slope"], known["slope"].repeat_interleave(labels.shape[1])
        of_tokens = torch.finfo(problem.dtype).eps / 4 * (tokens * known["logps"]).norm()
        of_sums = torch.finfo(torch.float32).eps * (slope * known["sums"]).norm()
        return {"loss": float(of_tokens + of_sums)}

    return Gate(truth, by_plain, floors)
