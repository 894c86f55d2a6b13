"""`token_logprobs`: logits in, log-probs of the labels out; the gradient is made in one pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from drrlhf.conventions import ENTROPY, empty_statistics
from drrlhf.ops.library import Op, first_order_only

# What a forward gives by token, in the order of every op over the vocabulary.
STATISTICS = (
    "Tensor logp, Tensor lse, Tensor lse_tail, Tensor entropy, Tensor mean_logit, Tensor is_top1, "
    "Tensor log_sum_sq_probs"
)
# What a backward needs of it, after the upstream gradients.
UPSTREAM = (
    "Tensor? grad, Tensor? grad_entropy, Tensor logp, Tensor lse, Tensor lse_tail, Tensor entropy"
)


def mark_statistics(ctx: Any, outputs: int, results: Any) -> None:
    """Gradients flow to the log-probs, and to the entropy where it was asked for."""
    differentiable = {"logp", "entropy"} if outputs & ENTROPY else {"logp"}
    constants = [x for name, x in results._asdict().items() if name not in differentiable]
    ctx.mark_non_differentiable(*constants)
    ctx.set_materialize_grads(False)


def _fake(logits, labels, ignore_index, temperature, softcap, outputs):
    return tuple(empty_statistics(logits, logits.shape[:-1], outputs))


def _fake_backward(logits, *rest):
    return logits.new_empty(logits.shape)


def _setup(ctx: Any, a: Any, r: Any) -> None:
    ctx.options = (a.ignore_index, a.temperature, a.softcap)
    ctx.save_for_backward(a.logits, a.labels, r.logp, r.lse, r.lse_tail, r.entropy)
    mark_statistics(ctx, a.outputs, r)


def _backward(ctx: Any, grads: Any, in_place: bool = False) -> tuple:
    grad, grad_entropy = grads.logp, grads.entropy
    if grad is None and grad_entropy is None:
        return token_logprobs.gradients()
    logits, labels, *statistics = ctx.saved_tensors
    arguments = (logits, labels, grad, grad_entropy, *statistics, *ctx.options)
    if in_place:
        token_logprobs_backward_(*arguments)
        torch.autograd.graph.increment_version(logits)  # which the C++ kernel does not do
    found = logits.detach() if in_place else token_logprobs_backward(*arguments)
    (only,) = first_order_only("token_logprobs", (found,), logits, grad, grad_entropy)
    return token_logprobs.gradients(logits=only)


token_logprobs = Op(
    "token_logprobs",
    "(Tensor logits, Tensor labels, int ignore_index, float temperature, float? softcap, "
    f"int outputs) -> ({STATISTICS})",
    _fake,
)
_BACKWARD = f"Tensor labels, {UPSTREAM}, int ignore_index, float temperature, float? softcap)"
token_logprobs_backward = Op(
    "token_logprobs_backward", f"(Tensor logits, {_BACKWARD} -> Tensor", _fake_backward
)
token_logprobs_backward_ = Op(
    "token_logprobs_backward_", f"(Tensor(a!) logits, {_BACKWARD} -> ()", lambda *arguments: None
)
token_logprobs.differentiate(_backward, _setup)


class InPlace(torch.autograd.Function):
    """`token_logprobs` whose backward writes the gradient over the logits.

    A second backward finds the logits changed and raises, as after any in-place operation.
    """

    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> tuple:
        results = token_logprobs(*arguments)
        _setup(ctx, token_logprobs.Arguments(*arguments), results)
        return tuple(results)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple:  # type: ignore[override]
        return tuple(_backward(ctx, token_logprobs.Results(*grads), in_place=True))


def token_logprobs_in_place(*arguments: Any) -> Any:
    """`token_logprobs` by `InPlace`."""
    return token_logprobs.Results(*InPlace.apply(*arguments))
