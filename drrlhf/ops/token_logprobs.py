"""`token_logprobs`: logits in, log-probs of the labels out; the gradient is made in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drrlhf.ops.library import autograd, define, first_order_only
from drrlhf.reference import ENTROPY, IS_TOP1, LOG_SUM_SQ_PROBS, MEAN_LOGIT, statistics_dtype

# In the order of the op's outputs, after logp, lse and lse_tail.
OPTIONAL = (ENTROPY, MEAN_LOGIT, IS_TOP1, LOG_SUM_SQ_PROBS)


def fake_statistics(like: Tensor, shape: Any, outputs: int) -> tuple[Tensor, ...]:
    """The seven statistics of tokens (...) without their contents."""
    dtype = statistics_dtype(like)
    always = [like.new_empty(shape, dtype=dtype) for _ in range(3)]
    return (
        *always,
        *(
            like.new_empty(
                shape if outputs & bit else (0,), dtype=torch.bool if bit == IS_TOP1 else dtype
            )
            for bit in OPTIONAL
        ),
    )


def _fake(logits, labels, ignore_index, temperature, softcap, outputs):
    return fake_statistics(logits, logits.shape[:-1], outputs)


def _fake_backward(logits, *rest):
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    logits, labels, ignore_index, temperature, softcap, outputs = inputs
    ctx.options = (ignore_index, temperature, softcap)
    ctx.save_for_backward(logits, labels, *output[:4])
    # The entropy takes a gradient only where it was asked for.
    ctx.mark_non_differentiable(*output[1 : 3 if outputs & ENTROPY else 4], *output[4:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, lse: Any, tail: Any, grad_entropy: Tensor | None,
              *unused: Any) -> tuple:  # fmt: skip
    if grad is None and grad_entropy is None:
        return (None,) * 6
    logits, labels, *statistics = ctx.saved_tensors
    arguments = (labels, grad, grad_entropy, *statistics, *ctx.options)
    found = token_logprobs_backward(logits, *arguments)
    only = first_order_only("token_logprobs", (found,), logits, grad, grad_entropy)
    return only + (None,) * 5


_OP = define(
    "token_logprobs",
    "(Tensor logits, Tensor labels, int ignore_index, float temperature, float? softcap, "
    "int outputs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
_BACKWARD = (
    "Tensor labels, Tensor? grad, Tensor? grad_entropy, Tensor logp, Tensor lse, Tensor lse_tail, "
    "Tensor entropy, int ignore_index, float temperature, float? softcap)"
)
token_logprobs_backward = define(
    "token_logprobs_backward", f"(Tensor logits, {_BACKWARD} -> Tensor", _fake_backward
)
token_logprobs_backward_ = define(
    "token_logprobs_backward_", f"(Tensor(a!) logits, {_BACKWARD} -> ()", lambda *arguments: None
)
token_logprobs = autograd(_OP, _backward, _setup)


class InPlace(torch.autograd.Function):
    """`token_logprobs` whose backward writes the gradient over the logits.

    A second backward finds the logits changed and raises, as after any in-place operation.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, *rest: Any) -> tuple:
        output = token_logprobs(logits, *rest)
        _setup(ctx, (logits, *rest), output)
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *others: Tensor | None) -> tuple:  # type: ignore[override]
        grad_entropy = others[2]
        if grad is None and grad_entropy is None:
            return (None,) * 6
        logits, labels, *statistics = ctx.saved_tensors
        token_logprobs_backward_(logits, labels, grad, grad_entropy, *statistics, *ctx.options)
        torch.autograd.graph.increment_version(logits)  # which the C++ kernel does not do
        only = first_order_only("token_logprobs", (logits.detach(),), logits, grad, grad_entropy)
        return only + (None,) * 5
