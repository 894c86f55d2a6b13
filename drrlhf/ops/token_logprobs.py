"""`token_logprobs`: logits in, log-probs of the labels out; the gradient is made in one pass."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drrlhf.ops.library import autograd, define, first_order_only
from drrlhf.reference import statistics_dtype


def _fake(logits, labels, ignore_index, temperature, softcap):
    shape, dtype = logits.shape[:-1], statistics_dtype(logits)
    return tuple(logits.new_empty(shape, dtype=dtype) for _ in range(3))


def _fake_backward(grad, logits, labels, logp, top, log_sum, ignore_index, temperature, softcap):
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    logits, labels, ctx.ignore_index, ctx.temperature, ctx.softcap = inputs
    ctx.save_for_backward(logits, labels, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, *unused: Any) -> tuple:
    if grad is None:
        return (None,) * 5
    first_order_only("token_logprobs")
    options = (ctx.ignore_index, ctx.temperature, ctx.softcap)
    return (token_logprobs_backward(grad, *ctx.saved_tensors, *options),) + (None,) * 4


token_logprobs = define(
    "token_logprobs",
    "(Tensor logits, Tensor labels, int ignore_index, float temperature, float? softcap) -> "
    "(Tensor, Tensor, Tensor)",
    _fake,
)
token_logprobs_backward = define(
    "token_logprobs_backward",
    "(Tensor grad, Tensor logits, Tensor labels, Tensor logp, Tensor top, Tensor log_sum, "
    "int ignore_index, float temperature, float? softcap) -> Tensor",
    _fake_backward,
)
autograd("token_logprobs", _backward, _setup)
