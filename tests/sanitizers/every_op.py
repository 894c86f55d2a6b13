"""Every op of the C++ backend, forwards and backwards, on few and awkward sizes; for memcheck.

Every result is compared with 0: memcheck reports a branch on memory that nothing wrote.
"""

from __future__ import annotations

import torch

import drrlhf as dr
from drrlhf.conventions import IMPORTANCE_LEVELS, POLICY_LOSS_TYPES
from drrlhf.reference.pair_losses import PAIR_LOSSES

SETS = (
    "erm",
    "kl:0.1",
    "kl:temperature=1",
    "tv:0.2",
    "chi2:0.5",
    "chi2:penalty=1",
    "cvar:0.3",
    "cvar:alpha=0.3,temperature=1",
    "tv:0.2,trim=0.1",
)
OUTPUTS = ("entropy", "logsumexp", "mean_logit", "is_top1", "log_sum_sq_probs")


def read(*tensors: torch.Tensor | None) -> None:
    for x in tensors:
        if x is not None:
            sum(1 for number in x.detach().double().flatten().tolist() if number > 0)


def backward(value: torch.Tensor, *leaves: torch.Tensor) -> None:
    read(value)
    value.backward()
    read(*(x.grad for x in leaves))


def leaf(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape).to(dtype).requires_grad_()


def pairs() -> None:
    for n in (1, 2, 17):
        nominal = torch.ones(n)
        nominal[1::2] = 0
        for ambiguity in SETS:
            a, b, c, d = (leaf(n) for _ in range(4))
            risk = dr.robust_risk(a, ambiguity, nominal=nominal)
            read(risk.weights, risk.dual)
            backward(risk.value, a)
            out = dr.preference_loss(a, b, c, d, ambiguity=ambiguity)
            read(*out)
            backward(out.loss, a, b, c, d)
            read(*(rewards := dr.reward_loss(a, b, ambiguity=ambiguity)))
            backward(rewards.loss, a, b)
        group = dr.Group(num_groups=3, step_size=0.1)
        read(*dr.robust_risk(torch.randn(n), group, groups=torch.arange(n) % 3))
        for loss_type in PAIR_LOSSES:
            smooth = 0.1 if PAIR_LOSSES[loss_type].smoothing else 0.0
            a, b = leaf(n), leaf(n)
            refs = [None, None] if loss_type == "simpo" else [torch.zeros(n)] * 2
            lengths = [torch.ones(n)] * 2 if PAIR_LOSSES[loss_type].lengths else [None] * 2
            out = dr.preference_loss(
                a,
                b,
                *refs,
                loss_type=loss_type,
                label_smoothing=smooth,
                chosen_lengths=lengths[0],
                rejected_lengths=lengths[1],
            )
            read(*out)
            backward(out.loss, a, b)


def tokens() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for n, width, vocabulary in ((1, 2, 1), (5, 8, 65), (18, 16, 70), (37, 24, 131)):
            labels, upstream = torch.randint(0, vocabulary, (n,)), torch.randn(n)
            labels[1::4], upstream[2::5] = -100, 0.0
            for softcap in (None, 5.0):
                logits = leaf(n, vocabulary, dtype=dtype)
                found = dr.token_logprobs(logits, labels, softcap=softcap, outputs=OUTPUTS)
                read(*found)
                backward(found.logps @ upstream + found.entropy.sum(), logits)
            inplace = dr.token_logprobs(logits * 1.0, labels, inplace_backward=True)
            backward(inplace @ upstream, logits)
            for budget in (None, 0):
                for head in (False, True):
                    hidden, weight = (
                        leaf(n, width, dtype=dtype),
                        leaf(vocabulary, width, dtype=dtype),
                    )
                    bias = leaf(vocabulary, dtype=dtype)
                    for x in (weight, bias):
                        x.requires_grad_(head)
                    logps = dr.linear_token_logprobs(
                        hidden, weight, labels, bias=bias, memory_budget=budget
                    )
                    backward(logps @ upstream, *([hidden, weight, bias] if head else [hidden]))
            more = dr.linear_token_logprobs(hidden, weight, labels, outputs=OUTPUTS)
            read(*more)
            backward(more.logps @ upstream + more.entropy.sum(), hidden, weight)


def sequences() -> None:
    boundaries = torch.tensor([0, 3, 3, 9, 12])
    for cu_seqlens, shape in ((boundaries, (12,)), (None, (4, 3))):
        labels = torch.randint(0, 11, shape)
        labels.view(-1)[1::4] = -100
        for reduction in ("sum", "mean"):
            logps = leaf(*shape)
            sums = dr.sequence_logprobs(logps, labels, cu_seqlens=cu_seqlens, reduction=reduction)
            backward(sums @ torch.randn(4), logps)
        hidden, weight = leaf(*shape, 8), leaf(11, 8)
        out = dr.linear_preference_loss(
            hidden, weight, labels, torch.randn(4), cu_seqlens=cu_seqlens, ambiguity="tv:0.2"
        )
        read(*out)
        backward(out.loss, hidden, weight)


def policies() -> None:
    boundaries, prompts = torch.tensor([0, 3, 4, 150, 290]), torch.tensor([0, 1, 0, 1])
    for cu_seqlens, shape in ((boundaries, (290,)), (None, (4, 9))):
        for loss_type in POLICY_LOSS_TYPES:
            for level in IMPORTANCE_LEVELS:
                logps = leaf(*shape)
                out = dr.policy_loss(
                    logps,
                    torch.randn(shape),
                    torch.randn(4),
                    torch.randn(4),
                    prompts,
                    cu_seqlens=cu_seqlens,
                    ref_logps=torch.randn(shape),
                    kl_beta=0.1,
                    loss_type=loss_type,
                    importance_level=level,
                    max_completion_length=9,
                    entropy=torch.rand(shape),
                    ambiguity="kl:0.1",
                )
                read(*out[:-1], *out[-1])
                backward(out.loss, logps)


if __name__ == "__main__":
    torch.manual_seed(0)
    for part in (pairs, tokens, sequences, policies):
        part()
        print(f"{part.__name__}: done", flush=True)
