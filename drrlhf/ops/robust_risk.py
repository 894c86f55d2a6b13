"""`robust_risk`: per-pair losses in; worst-case value, weights and dual out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drrlhf.ops.library import autograd, define
from drrlhf.reference import statistics_dtype


def fake_solution(losses: Tensor, group_weights: Tensor | None) -> tuple[Tensor, ...]:
    """value (), weights (n,), dual (), group weights (G,) without their contents."""
    dtype = statistics_dtype(losses)
    scalar = losses.new_empty((), dtype=dtype)
    state = losses.new_empty(0, dtype=torch.float64) if group_weights is None else group_weights
    return scalar, losses.new_empty(losses.shape, dtype=dtype), scalar.clone(), state.clone()


def _fake(losses, nominal, groups, group_weights, kind, a, b, trim):
    return fake_solution(losses, group_weights)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[1])
    ctx.mark_non_differentiable(*output[1:])
    ctx.dtype = inputs[0].dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_value: Tensor | None, *unused: Any) -> tuple:
    # Danskin: d value / d losses = q, and q itself is a constant.
    (q,) = ctx.saved_tensors
    grad = None if grad_value is None else (grad_value * q).to(ctx.dtype)
    return grad, None, None, None, None, None, None, None


_OP = define(
    "robust_risk",
    "(Tensor losses, Tensor? nominal, Tensor? groups, Tensor? group_weights, str kind, float a, "
    "float b, float trim) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
robust_risk = autograd(_OP, _backward, _setup)
