"""`sequence_preference_loss`: token log-probs to DPO's worst case and its gradient in one op."""

from __future__ import annotations

from typing import Any

from drrlhf.conventions import count_of, statistics_dtype
from drrlhf.ops.library import Op, first_order_only
from drrlhf.ops.robust_risk import ADVERSARY, SET, fake_group_weights
from drrlhf.ops.sequence_logprobs import sequence_logprobs_backward


def _fake(logps, labels, cu_seqlens, ref_logps, nominal, groups, group_weights, *rest):
    dtype, count = statistics_dtype(logps), count_of(labels, cu_seqlens)
    pairs = [logps.new_empty(count // 2, dtype=dtype) for _ in range(4)]
    return (
        logps.new_empty((), dtype=dtype),
        *pairs,
        logps.new_empty((), dtype=dtype),
        fake_group_weights(logps, group_weights),
        logps.new_empty(count, dtype=dtype),
        logps.new_empty(count, dtype=dtype),
    )


def _setup(ctx: Any, arguments: Any, results: Any) -> None:
    ctx.dtype, ctx.ignore_index = arguments.logps.dtype, arguments.ignore_index
    ctx.save_for_backward(results.d_sums, arguments.labels, arguments.cu_seqlens)
    # Not the last, the gradient: whoever differentiates it must meet an error.
    ctx.mark_non_differentiable(*results[1:-1])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Any) -> tuple:
    d_sums, labels, cu_seqlens = ctx.saved_tensors
    if grads.value is None:
        return sequence_preference_loss.gradients()
    factor = grads.value * d_sums
    d = sequence_logprobs_backward(factor, labels, cu_seqlens, ctx.ignore_index, False)
    sources = (grads.value, d_sums)
    (only,) = first_order_only("linear_preference_loss", (d.to(ctx.dtype),), *sources)
    return sequence_preference_loss.gradients(logps=only)


sequence_preference_loss = Op(
    "sequence_preference_loss",
    f"(Tensor logps, Tensor labels, Tensor? cu_seqlens, Tensor ref_logps, {ADVERSARY}, "
    f"int ignore_index, float beta, float label_smoothing, {SET}) -> "
    "(Tensor value, Tensor weights, Tensor losses, Tensor chosen_rewards, Tensor rejected_rewards, "
    "Tensor dual, Tensor stepped, Tensor sums, Tensor d_sums)",
    _fake,
)
sequence_preference_loss.differentiate(_backward, _setup)
