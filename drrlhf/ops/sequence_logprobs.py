"""`sequence_logprobs`: sums or means of token log-probs by sequence, padded or packed."""

from __future__ import annotations

from typing import Any

from drrlhf.conventions import count_of, statistics_dtype
from drrlhf.ops.library import Op


def _fake(logps, labels, cu_seqlens, ignore_index, mean):
    return logps.new_empty(count_of(labels, cu_seqlens), dtype=statistics_dtype(logps))


def _fake_backward(grad, labels, cu_seqlens, ignore_index, mean):
    return grad.new_empty(labels.shape)


def _setup(ctx: Any, arguments: Any, results: Any) -> None:
    values, labels, cu_seqlens, *ctx.options = arguments
    ctx.dtype = values.dtype
    ctx.save_for_backward(labels, cu_seqlens)


def _backward(ctx: Any, grads: Any) -> tuple:
    found = sequence_logprobs_backward(grads.value, *ctx.saved_tensors, *ctx.options)
    return sequence_logprobs.gradients(logps=found.to(ctx.dtype))


def _backward_backward(ctx: Any, grads: Any) -> tuple:
    # The op is linear: the gradient of its gradient is itself.
    found = sequence_logprobs(grads.value, *ctx.saved_tensors, *ctx.options)
    return sequence_logprobs_backward.gradients(grad=found.to(ctx.dtype))


_REST = "Tensor labels, Tensor? cu_seqlens, int ignore_index, bool mean) -> Tensor"
sequence_logprobs = Op("sequence_logprobs", f"(Tensor logps, {_REST}", _fake)
sequence_logprobs_backward = Op(
    "sequence_logprobs_backward", f"(Tensor grad, {_REST}", _fake_backward
)
sequence_logprobs.differentiate(_backward, _setup)
sequence_logprobs_backward.differentiate(_backward_backward, _setup)
