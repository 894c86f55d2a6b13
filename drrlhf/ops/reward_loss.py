"""`reward_loss`: reward differences, worst-case weights and gradients in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drrlhf.ops.library import autograd, define, first_order_only
from drrlhf.ops.robust_risk import fake_solution


def _fake(chosen_rewards, rejected_rewards, *rest):
    value, q, dual, state = fake_solution(chosen_rewards, rest[3])
    return (
        value, q, torch.empty_like(q), dual, state,
        torch.empty_like(chosen_rewards), torch.empty_like(rejected_rewards),
    )  # fmt: skip


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[5], output[6])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple:
    d_chosen, d_rejected = ctx.saved_tensors
    if grad is None:
        return (None,) * 11
    gradients = tuple((grad * d).to(d.dtype) for d in (d_chosen, d_rejected))
    return first_order_only("reward_loss", gradients, grad, d_chosen, d_rejected) + (None,) * 9


_OP = define(
    "reward_loss",
    "(Tensor chosen_rewards, Tensor rejected_rewards, Tensor? margin, Tensor? nominal, "
    "Tensor? groups, Tensor? group_weights, float center_coefficient, str kind, float a, float b, "
    "float trim) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
reward_loss = autograd(_OP, _backward, _setup)
