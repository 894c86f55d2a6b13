"""`robust_risk`: losses in; worst-case value, weights and dual out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drrlhf.conventions import statistics_dtype
from drrlhf.ops.library import Op

# What every op with an adversary takes: nominal weights, groups, and an `ambiguity.Encoded`.
ADVERSARY = "Tensor? nominal, Tensor? groups, Tensor? group_weights"
SET = "str kind, float parameter, float temperature, float trim, bool update"


def fake_group_weights(like: Tensor, group_weights: Tensor | None) -> Tensor:
    """Group weights (G,) without their contents; (0,) without a group set."""
    if group_weights is None:
        return like.new_empty(0, dtype=torch.float64)
    return torch.empty_like(group_weights)


def _fake(losses, nominal, groups, group_weights, *rest):
    dtype = statistics_dtype(losses)
    return (
        losses.new_empty((), dtype=dtype),
        losses.new_empty(losses.shape, dtype=dtype),
        losses.new_empty((), dtype=dtype),
        fake_group_weights(losses, group_weights),
    )


def _setup(ctx: Any, arguments: Any, results: Any) -> None:
    ctx.save_for_backward(results.weights)
    ctx.mark_non_differentiable(*results[1:])
    ctx.dtype = arguments.losses.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Any) -> tuple:
    # Danskin: d value / d losses = q, and q itself is a constant.
    (q,) = ctx.saved_tensors
    return robust_risk.gradients(
        losses=None if grads.value is None else (grads.value * q).to(ctx.dtype)
    )


robust_risk = Op(
    "robust_risk",
    f"(Tensor losses, {ADVERSARY}, {SET}) -> "
    "(Tensor value, Tensor weights, Tensor dual, Tensor stepped)",
    _fake,
)
robust_risk.differentiate(_backward, _setup)
