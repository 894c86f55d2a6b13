"""`linear_token_logprobs`: hidden states and output head in, log-probs of the labels out.

No tensor of tokens times vocabulary outlives a call, unless the caller's budget keeps one.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from drrlhf.ops.library import autograd, define, first_order_only
from drrlhf.ops.token_logprobs import fake_statistics
from drrlhf.reference import ENTROPY, KEEP_HIDDEN, KEEP_RATIOS, KEEP_ROWS, KEEP_SLAB, ratios_width


def _fake(hidden, weight, bias, labels, ignore_index, temperature, softcap, logit_scale, outputs,
          keep, workspace):  # fmt: skip
    shape: Any = (0,)
    if keep == KEEP_HIDDEN:
        shape = hidden.shape
    elif keep == KEEP_SLAB:
        shape = (weight.shape[0], labels.numel())
    elif keep in (KEEP_RATIOS, KEEP_ROWS):
        shape = (labels.numel(), ratios_width(weight.shape[0]))
    return (*fake_statistics(hidden, labels.shape, outputs), hidden.new_empty(shape))


def _fake_backward(hidden, weight, bias, *rest):
    need_hidden, need_weight, need_bias = rest[-3:]
    kind = weight if bias is None else bias
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        kind.new_empty((weight.shape[0],) if need_bias else (0,)),
    )


def _setup(ctx: Any, inputs: Any, output: Any) -> None:
    hidden, weight, bias, labels, *options = inputs
    *ctx.options, _, keep, workspace = options
    ctx.keep = (keep, workspace)
    ctx.save_for_backward(hidden, weight, bias, labels, *output[:4], output[7])
    # The entropy takes a gradient only where it was asked for.
    outputs = options[-3]
    ctx.mark_non_differentiable(*output[1 : 3 if outputs & ENTROPY else 4], *output[4:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad: Tensor | None, lse: Any, tail: Any, grad_entropy: Tensor | None,
              *unused: Any) -> tuple:  # fmt: skip
    if grad is None and grad_entropy is None:
        return (None,) * 11
    hidden, weight, bias, labels, *rest = ctx.saved_tensors
    needs = tuple(bool(need) for need in ctx.needs_input_grad[:3])
    found = linear_token_logprobs_backward(
        hidden, weight, bias, labels, grad, grad_entropy, *rest, *ctx.options, *ctx.keep, *needs
    )
    gradients = tuple(x if need else None for x, need in zip(found, needs))
    sources = (hidden, weight, bias, grad, grad_entropy)
    return first_order_only("linear_token_logprobs", gradients, *sources) + (None,) * 8


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_OPTIONS = "int ignore_index, float temperature, float? softcap, float logit_scale"
_OP = define(
    "linear_token_logprobs",
    f"({_HEAD}, {_OPTIONS}, int outputs, int keep, int workspace) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake,
)
linear_token_logprobs_backward = define(
    "linear_token_logprobs_backward",
    f"({_HEAD}, Tensor? grad, Tensor? grad_entropy, Tensor logp, Tensor lse, Tensor lse_tail, "
    f"Tensor entropy, Tensor kept, {_OPTIONS}, int keep, int workspace, bool need_hidden, "
    "bool need_weight, bool need_bias) -> (Tensor, Tensor, Tensor)",
    _fake_backward,
)
linear_token_logprobs = autograd(_OP, _backward, _setup)
