"""Logits to token log-probs and statistics, and the gradient of logits."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drrlhf.conventions import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, MEAN_LOGIT, statistics_dtype


def _scaled(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return z if temperature == 1.0 else z / temperature


def counted(labels: Tensor, ignore_index: int) -> Tensor:
    """Which labels are not ignored: in a narrow dtype the number to ignore could be another."""
    return labels.long() != ignore_index


def _counted(labels: Tensor, ignore_index: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which labels count, and which of these are in [0, V) (...); and indices (..., 1) that are
    safe to gather at."""
    labels, valid = labels.long(), counted(labels, ignore_index)
    known = valid & (labels >= 0) & (labels < vocabulary)
    return valid, known, torch.where(known, labels, 0).unsqueeze(-1)


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    outputs: int,
) -> tuple[Tensor, ...]:
    """Seven tensors (...) for logits (..., V): log softmax(z)[label] with
    z = softcap tanh(logits / softcap) / temperature; the log-sum-exp of z and what of it one number
    cannot hold (their sum is it, to the digits that the backward needs); and where `outputs` asks,
    else empty: entropy, mean of z, whether the label is the first maximum, log sum softmax(z)^2.

    Statistics in float32 (float64 for float64 logits), 0 where the label is ignored, NaN where it
    is outside of [0, V). Where the label has the largest logit the log-prob is
    -log1p(sum of the others), which keeps the digits of a confident model.
    """
    z = _scaled(logits.to(statistics_dtype(logits)), temperature, softcap)
    valid, known, index = _counted(labels, ignore_index, z.shape[-1])
    top = z.amax(-1, keepdim=True)
    true = z.gather(-1, index)
    e = torch.exp(z - top)
    others = e.scatter(-1, index, 0.0).sum(-1, keepdim=True)
    log_sum = torch.where(
        true == top, torch.log1p(others), torch.log(others + torch.exp(true - top))
    )
    logp = (true - top) - log_sum
    lse = top + log_sum
    found = [logp, lse, (top - lse) + log_sum]
    sums = [
        (
            ENTROPY,
            lambda: log_sum - torch.where(e > 0, e * (z - top), 0).sum(-1, True) / e.sum(-1, True),
        ),
        (MEAN_LOGIT, lambda: z.mean(-1, keepdim=True)),
        (IS_TOP1, lambda: z.argmax(-1, keepdim=True) == index),
        (
            LOG_SUM_SQ_PROBS,
            lambda: torch.log((e * e).sum(-1, True)) - 2 * torch.log(e.sum(-1, True)),
        ),
    ]
    blank = torch.where(valid, math.nan, 0).to(z.dtype)
    found = [torch.where(known, x.squeeze(-1), blank) for x in found]
    for bit, statistic in sums:
        flag = bit == IS_TOP1
        if outputs & bit:
            x = statistic().squeeze(-1)
            found.append(x & known if flag else torch.where(known, x, blank))
        else:
            found.append(z.new_empty(0, dtype=torch.bool if flag else z.dtype))
    return tuple(found)


def needs_gradient(valid: Tensor, grad: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """Counted tokens with an upstream gradient: nothing of the others matters, NaN or not."""
    asked = torch.zeros_like(valid)
    for g in (grad, grad_entropy):
        asked = asked if g is None else asked | (g != 0)
    return valid & asked


def token_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    logp: Tensor,
    lse: Tensor,
    lse_tail: Tensor,
    entropy: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """grad d logp / d logits + grad_entropy d entropy / d logits (..., V), in the logits' dtype."""
    x = logits.to(lse.dtype)
    z = _scaled(x, temperature, softcap)
    valid, _, index = _counted(labels, ignore_index, z.shape[-1])
    log_p = (z - lse.unsqueeze(-1)) - lse_tail.unsqueeze(-1)
    p = torch.exp(log_p)
    d = torch.zeros_like(z)
    if grad is not None:
        # The true class as -expm1(logp): 1 - p cancels exactly where tuned models live.
        of_logp = (-p).scatter(-1, index, -torch.expm1(logp).unsqueeze(-1))
        d = of_logp * grad.to(z.dtype).unsqueeze(-1)
    if grad_entropy is not None:
        # d entropy / dz_j = -p_j (log p_j + entropy)
        slope = torch.where(p > 0, p * (log_p + entropy.unsqueeze(-1)), 0)
        d = d - grad_entropy.to(z.dtype).unsqueeze(-1) * slope
    d = d / temperature
    if softcap is not None:
        d = d * (1 - torch.tanh(x / softcap) ** 2)
    # Last, for the slope of a capped NaN is NaN, and 0 times it too.
    asked = needs_gradient(valid, grad, grad_entropy).unsqueeze(-1)
    d = torch.where(asked, d, 0)
    return d.to(logits.dtype)


def token_logprobs_backward_(logits: Tensor, *rest) -> None:
    """`token_logprobs_backward` written over the logits."""
    logits.copy_(token_logprobs_backward(logits, *rest))
