"""Hidden states and output head to token log-probs, and their gradients."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from drrlhf.conventions import Keep, statistics_dtype
from drrlhf.reference.token_logprobs import (
    needs_gradient,
    token_logprobs,
    token_logprobs_backward,
)


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(hidden weight^T + bias) scale, (..., V), accumulated and kept in float32: never rounded."""
    dtype = statistics_dtype(hidden)
    # An op's kernel is plain arithmetic: autocast around its call must not narrow the product.
    with torch.autocast(hidden.device.type, enabled=False):
        kind = None if bias is None else bias.to(dtype)
        logits = F.linear(hidden.to(dtype), weight.to(dtype), kind)
    return logits if scale == 1.0 else logits * scale


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: int,
    keep: int,
    workspace: int,
) -> tuple[Tensor, ...]:
    """`token_logprobs` of `linear_logits` for hidden (..., D), and in place of what `keep`
    names NaN: the backward here computes the logits again, any other must not take it for theirs.
    """
    logits = linear_logits(hidden, weight, bias, logit_scale)
    found = token_logprobs(logits, labels, ignore_index, temperature, softcap, outputs)
    shape = Keep(keep).shape(hidden, weight.shape[0])
    return (*found, hidden.new_full(shape, math.nan))


def linear_token_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    logp: Tensor,
    lse: Tensor,
    lse_tail: Tensor,
    entropy: Tensor,
    kept: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    keep: int,
    workspace: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (..., D), weight (V, D) and bias (V,), empty where not needed.

    Always from the logits, computed again.
    """
    logits = linear_logits(hidden, weight, bias, logit_scale)
    statistics = (logp, lse, lse_tail, entropy)
    d = token_logprobs_backward(
        logits, labels, grad, grad_entropy, *statistics, ignore_index, temperature, softcap
    )
    d = (d * logit_scale).reshape(-1, weight.shape[0])
    counted = needs_gradient(labels != ignore_index, grad, grad_entropy).reshape(-1, 1)
    rows = torch.where(counted, hidden.reshape(-1, hidden.shape[-1]).to(d.dtype), 0)
    like_bias = weight if bias is None else bias
    with torch.autocast(hidden.device.type, enabled=False):
        return (
            (d @ weight.to(d.dtype)).view(hidden.shape).to(hidden.dtype)
            if need_hidden
            else hidden.new_empty(0),
            (d.T @ rows).to(weight.dtype) if need_weight else weight.new_empty(0),
            d.sum(0).to(like_bias.dtype) if need_bias else like_bias.new_empty(0),
        )
