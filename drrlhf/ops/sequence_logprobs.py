"""`sequence_logprobs`: sums or means of token log-probs by sequence, padded or packed."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drrlhf.ops.library import autograd, define
from drrlhf.reference import statistics_dtype


def sequences(labels: Tensor, cu_seqlens: Tensor | None) -> Any:
    """How many sequences there are."""
    return labels.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1


def _fake(logps, labels, cu_seqlens, ignore_index, mean):
    return logps.new_empty(sequences(labels, cu_seqlens), dtype=statistics_dtype(logps))


def _fake_backward(grad, labels, cu_seqlens, ignore_index, mean):
    return grad.new_empty(labels.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    values, labels, cu_seqlens, *ctx.options = inputs
    ctx.dtype = values.dtype
    ctx.save_for_backward(labels, cu_seqlens)


def _backward(ctx: Any, grad: Tensor) -> tuple:
    found = sequence_logprobs_backward(grad, *ctx.saved_tensors, *ctx.options)
    return found.to(ctx.dtype), None, None, None, None


def _backward_backward(ctx: Any, grad: Tensor) -> tuple:
    # The op is linear: the gradient of its gradient is itself.
    found = sequence_logprobs(grad, *ctx.saved_tensors, *ctx.options)
    return found.to(ctx.dtype), None, None, None, None


_REST = "Tensor labels, Tensor? cu_seqlens, int ignore_index, bool mean) -> Tensor"
_OP = define("sequence_logprobs", f"(Tensor logps, {_REST}", _fake)
_BACKWARD_OP = define("sequence_logprobs_backward", f"(Tensor grad, {_REST}", _fake_backward)
sequence_logprobs = autograd(_OP, _backward, _setup)
sequence_logprobs_backward = autograd(_BACKWARD_OP, _backward_backward, _setup)
