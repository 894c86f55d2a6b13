"""`policy_loss`: token log-probs to the clipped surrogate of each sequence."""

from __future__ import annotations

from typing import Any

import torch

from drrlhf.conventions import SequenceStatistics, statistics_dtype
from drrlhf.ops.library import Op, first_order_only


def _fake(logps, old_logps, ref_logps, entropy, mask, cu_seqlens, advantages, *rest):
    dtype, count = statistics_dtype(logps), advantages.shape[0]
    return (
        logps.new_empty(count, dtype=torch.float64),
        logps.new_empty(logps.shape, dtype=dtype),
        logps.new_empty((len(SequenceStatistics._fields), count), dtype=dtype),
    )


def _fake_backward(grad, slopes, cu_seqlens):
    return slopes.new_empty(slopes.shape)


def _setup(ctx: Any, arguments: Any, results: Any) -> None:
    ctx.dtype = arguments.logps.dtype
    ctx.save_for_backward(results.slopes, arguments.cu_seqlens)
    # Not the slopes: whoever differentiates them must meet an error.
    ctx.mark_non_differentiable(results.table)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Any) -> tuple:
    if grads.losses is None:
        return policy_loss.gradients()
    slopes, cu_seqlens = ctx.saved_tensors
    found = policy_loss_backward(grads.losses, slopes, cu_seqlens).to(ctx.dtype)
    (only,) = first_order_only("policy_loss", (found,), grads.losses, slopes)
    return policy_loss.gradients(logps=only)


policy_loss = Op(
    "policy_loss",
    "(Tensor logps, Tensor? old_logps, Tensor? ref_logps, Tensor? entropy, Tensor? mask, "
    "Tensor? cu_seqlens, Tensor advantages, bool by_sequence, float clip_low, float clip_high, "
    "float kl_beta, bool correct_kl) -> (Tensor losses, Tensor slopes, Tensor table)",
    _fake,
)
policy_loss_backward = Op(
    "policy_loss_backward",
    "(Tensor grad, Tensor slopes, Tensor? cu_seqlens) -> Tensor",
    _fake_backward,
)
policy_loss.differentiate(_backward, _setup)
