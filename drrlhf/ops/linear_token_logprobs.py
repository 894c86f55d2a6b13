"""`linear_token_logprobs`: hidden states and output head in, log-probs of the labels out.

No tensor of tokens times vocabulary outlives a call, unless the caller's budget keeps one.
"""

from __future__ import annotations

from typing import Any

from drrlhf.conventions import Keep, empty_statistics
from drrlhf.ops.library import Op, first_order_only
from drrlhf.ops.token_logprobs import STATISTICS, UPSTREAM, mark_statistics


def _fake(hidden, weight, bias, labels, *options):
    *_, outputs, keep, _ = options
    kept = hidden.new_empty(Keep(keep).shape(hidden, weight.shape[0]))
    return (*empty_statistics(hidden, labels.shape, outputs), kept)


def _fake_backward(hidden, weight, bias, *rest):
    *_, need_hidden, need_weight, need_bias = rest
    kind = weight if bias is None else bias
    return (
        hidden.new_empty(hidden.shape if need_hidden else (0,)),
        weight.new_empty(weight.shape if need_weight else (0,)),
        kind.new_empty((weight.shape[0],) if need_bias else (0,)),
    )


def _setup(ctx: Any, a: Any, r: Any) -> None:
    ctx.options = (a.ignore_index, a.temperature, a.softcap, a.logit_scale, a.keep, a.workspace)
    statistics = (r.logp, r.lse, r.lse_tail, r.entropy)
    ctx.save_for_backward(a.hidden, a.weight, a.bias, a.labels, *statistics, r.kept)
    mark_statistics(ctx, a.outputs, r)


def _backward(ctx: Any, grads: Any) -> tuple:
    grad, grad_entropy = grads.logp, grads.entropy
    if grad is None and grad_entropy is None:
        return linear_token_logprobs.gradients()
    hidden, weight, bias, labels, *rest = ctx.saved_tensors
    needs = tuple(bool(need) for need in ctx.needs_input_grad[:3])
    found = linear_token_logprobs_backward(
        hidden, weight, bias, labels, grad, grad_entropy, *rest, *ctx.options, *needs
    )
    wanted = tuple(x if need else None for x, need in zip(found, needs))
    sources = (hidden, weight, bias, grad, grad_entropy)
    only = first_order_only("linear_token_logprobs", wanted, *sources)
    return linear_token_logprobs.gradients(**dict(zip(("hidden", "weight", "bias"), only)))


_HEAD = "Tensor hidden, Tensor weight, Tensor? bias, Tensor labels"
_OPTIONS = "int ignore_index, float temperature, float? softcap, float logit_scale"
linear_token_logprobs = Op(
    "linear_token_logprobs",
    f"({_HEAD}, {_OPTIONS}, int outputs, int keep, int workspace) -> ({STATISTICS}, Tensor kept)",
    _fake,
)
linear_token_logprobs_backward = Op(
    "linear_token_logprobs_backward",
    f"({_HEAD}, {UPSTREAM}, Tensor kept, {_OPTIONS}, int keep, int workspace, bool need_hidden, "
    "bool need_weight, bool need_bias) -> (Tensor d_hidden, Tensor d_weight, Tensor d_bias)",
    _fake_backward,
)
linear_token_logprobs.differentiate(_backward, _setup)
