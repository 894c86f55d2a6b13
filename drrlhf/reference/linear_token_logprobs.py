"""Hidden states and output head to token log-probs, and their gradients."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drrlhf.conventions import HeadGradient, Keep, statistics_dtype
from drrlhf.reference.token_logprobs import (
    counted,
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


def linear_token_logprobs_backward(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (..., D), weight (V, D) and bias (V,), empty where not needed.

    Always from the logits, computed again.
    """
    a = HeadGradient(*arguments)
    weight, grads = a.weight, (a.grad, a.grad_entropy)
    logits = linear_logits(a.hidden, weight, a.bias, a.logit_scale)
    statistics = (a.logp, a.lse, a.lse_tail, a.entropy)
    d = token_logprobs_backward(
        logits, a.labels, *grads, *statistics, a.ignore_index, a.temperature, a.softcap
    )
    d = (d * a.logit_scale).reshape(-1, weight.shape[0])
    trained = needs_gradient(counted(a.labels, a.ignore_index), *grads).reshape(-1, 1)
    hidden = a.hidden.reshape(-1, a.hidden.shape[-1])
    like_bias = weight if a.bias is None else a.bias
    with torch.autocast(hidden.device.type, enabled=False):
        d_hidden = (
            (d @ weight.to(d.dtype)).view(a.hidden.shape) if a.need_hidden else d.new_empty(0)
        )
        d_weight = d.new_empty(0)
        if a.need_weight:
            d_weight = d.T @ torch.where(trained, hidden.to(d.dtype), 0)
        d_bias = d.sum(0) if a.need_bias else d.new_empty(0)
    return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), d_bias.to(like_bias.dtype)
