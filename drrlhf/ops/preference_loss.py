"""`preference_loss`: margins, per-pair losses, worst-case weights and gradients in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drrlhf.ops.library import autograd, define, first_order_only
from drrlhf.ops.robust_risk import fake_solution


def _fake(chosen_logps, rejected_logps, *rest):
    value, q, dual, state = fake_solution(chosen_logps, rest[6])
    per_pair = (q, *(torch.empty_like(q) for _ in range(3)))
    return (
        value, *per_pair, dual, state,
        torch.empty_like(chosen_logps), torch.empty_like(rejected_logps),
    )  # fmt: skip


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    ctx.save_for_backward(output[7], output[8])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple:
    d_chosen, d_rejected = ctx.saved_tensors
    if grad is None:
        return (None,) * 20
    chosen = (grad * d_chosen).to(d_chosen.dtype)
    rejected = (grad * d_rejected).to(d_rejected.dtype)
    # A log-ratio is a difference, so a trained reference gets the negative.
    ref_chosen = -chosen if ctx.needs_input_grad[2] else None
    ref_rejected = -rejected if ctx.needs_input_grad[3] else None
    gradients = (chosen, rejected, ref_chosen, ref_rejected)
    only = first_order_only("preference_loss", gradients, grad, d_chosen, d_rejected)
    return only + (None,) * 16


_OP = define(
    "preference_loss",
    "(Tensor chosen_logps, Tensor rejected_logps, Tensor? ref_chosen_logps, "
    "Tensor? ref_rejected_logps, Tensor? chosen_lengths, Tensor? rejected_lengths, "
    "Tensor? nominal, Tensor? groups, Tensor? group_weights, str loss_type, float beta, "
    "float label_smoothing, float simpo_gamma, float discopop_tau, str f_divergence, "
    "float f_alpha, str kind, float a, float b, float trim) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
preference_loss = autograd(_OP, _backward, _setup)
