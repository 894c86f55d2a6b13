"""`sequence_preference_loss`: token log-probs to robust loss and gradients in one op."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drrlhf.ops.library import autograd, define, first_order_only
from drrlhf.ops.sequence_logprobs import sequence_logprobs_backward, sequences
from drrlhf.reference import statistics_dtype


def _fake(logps, labels, cu_seqlens, ref_logps, nominal, groups, group_weights, *rest):
    dtype, count = statistics_dtype(logps), sequences(labels, cu_seqlens)
    pairs = [logps.new_empty(count // 2, dtype=dtype) for _ in range(4)]
    state = logps.new_empty(0, dtype=torch.float64) if group_weights is None else group_weights
    return (
        logps.new_empty((), dtype=dtype), *pairs, logps.new_empty((), dtype=dtype),
        torch.empty_like(state), *(logps.new_empty(count, dtype=dtype) for _ in range(2)),
    )  # fmt: skip


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    logps, labels, cu_seqlens, *_ = inputs
    ctx.dtype, ctx.ignore_index = logps.dtype, inputs[7]
    ctx.save_for_backward(output[8], labels, cu_seqlens)
    # Not the last, the gradient: whoever differentiates it must meet an error.
    ctx.mark_non_differentiable(*output[1:8])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple:
    d_sums, labels, cu_seqlens = ctx.saved_tensors
    if grad is None:
        return (None,) * 19
    d = sequence_logprobs_backward(grad * d_sums, labels, cu_seqlens, ctx.ignore_index, False)
    only = first_order_only("linear_preference_loss", (d.to(ctx.dtype),), grad, d_sums)
    return only + (None,) * 18


_OP = define(
    "sequence_preference_loss",
    "(Tensor logps, Tensor labels, Tensor? cu_seqlens, Tensor? ref_logps, Tensor? nominal, "
    "Tensor? groups, Tensor? group_weights, int ignore_index, str loss_type, float beta, "
    "float label_smoothing, float simpo_gamma, float discopop_tau, str f_divergence, "
    "float f_alpha, str kind, float a, float b, float trim) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
sequence_preference_loss = autograd(_OP, _backward, _setup)
