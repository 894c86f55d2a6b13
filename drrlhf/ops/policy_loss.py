"""`policy_loss`: token log-probs and rewards to the prompt-weighted clipped surrogate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drrlhf.ops.library import autograd, define, first_order_only
from drrlhf.reference import statistics_dtype

_INPUTS = 25


def _fake(logps, old_logps, ref_logps, entropy, mask, cu_seqlens, advantages, *rest):
    dtype, count, prompts = statistics_dtype(logps), advantages.shape[0], rest[6]
    group_weights = rest[5]
    state = logps.new_empty(0, dtype=torch.float64) if group_weights is None else group_weights
    return (
        logps.new_empty((), dtype=dtype),
        *(logps.new_empty(prompts, dtype=dtype) for _ in range(2)),
        *(logps.new_empty((), dtype=dtype) for _ in range(2)),
        torch.empty_like(state),
        logps.new_empty(count, dtype=dtype),
        logps.new_empty(logps.shape, dtype=dtype),
        logps.new_empty((8, count), dtype=dtype),
    )


def _fake_backward(grad, slopes, coefficients, cu_seqlens):
    return slopes.new_empty(slopes.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[7], output[6], inputs[5])
    # Not the coefficients and slopes: whoever differentiates them must meet an error.
    ctx.mark_non_differentiable(*output[1:6], output[8])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple:
    if grad is None:
        return (None,) * _INPUTS
    slopes, coefficients, cu_seqlens = ctx.saved_tensors
    found = policy_loss_backward(grad, slopes, coefficients, cu_seqlens).to(ctx.dtype)
    only = first_order_only("policy_loss", (found,), grad, slopes, coefficients)
    return only + (None,) * (_INPUTS - 1)


_OP = define(
    "policy_loss",
    "(Tensor logps, Tensor? old_logps, Tensor? ref_logps, Tensor? entropy, Tensor? mask, "
    "Tensor? cu_seqlens, Tensor advantages, Tensor rewards, Tensor prompt_ids, "
    "Tensor? sequence_weights, Tensor? nominal, Tensor? groups, Tensor? group_weights, "
    "SymInt num_prompts, str loss_type, str importance_level, float clip_low, float clip_high, "
    "float kl_beta, bool correct_kl, float max_completion_length, str kind, float a, "
    "float b, float trim) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
policy_loss_backward = define(
    "policy_loss_backward",
    "(Tensor grad, Tensor slopes, Tensor coefficients, Tensor? cu_seqlens) -> Tensor",
    _fake_backward,
)
policy_loss = autograd(_OP, _backward, _setup)
