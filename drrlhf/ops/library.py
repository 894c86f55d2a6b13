"""The torch.library that holds every op: schema, kernel by backend, fake and autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from drrlhf import backends

LIBRARY = torch.library.Library("drrlhf", "DEF")


def define(name: str, schema: str, fake: Callable[..., Any]) -> Any:
    """Register `drrlhf::name`, run by whichever backend serves it; returns the op overload.

    The kernel is registered for all devices at once: `drrlhf.backends` decides at every call, so
    that a choice made by name holds inside compiled graphs too.
    """

    def run(first: Tensor, *rest: Any) -> Any:
        return backends.kernel(name, first.device.type, first.dtype)(first, *rest)

    LIBRARY.define(name + schema)
    LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"drrlhf::{name}", fake, lib=LIBRARY)
    return getattr(torch.ops.drrlhf, name).default


def transformed() -> bool:
    """Whether `torch.func` transforms what runs: grad, vjp, jacrev, vmap ..."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def autograd(op: Any, backward: Callable[..., Any], setup: Callable[..., None]) -> Any:
    """Register the backward of the overload `op`; returns the op for callers.

    What torch.library makes of a backward cannot be transformed by torch.func, an
    autograd.Function that sets its context up apart from its forward can: there it takes over.
    """
    torch.library.register_autograd(op, backward, setup_context=setup, lib=LIBRARY)
    parts = {
        "forward": staticmethod(lambda *arguments: op(*arguments)),
        "setup_context": staticmethod(lambda ctx, inputs, output: setup(ctx, inputs, output)),
        "backward": staticmethod(backward),
        "generate_vmap_rule": True,
    }
    function: Any = type(f"{op._opname}_transformed", (torch.autograd.Function,), parts)

    def call(*arguments: Any) -> Any:
        return function.apply(*arguments) if transformed() else op(*arguments)

    return call


def first_order_only(op: str, gradients: tuple, *sources: Tensor | None) -> tuple:
    """`gradients`, of which the derivative by any of `sources` is refused.

    They were made in the forward pass, as constants: their derivative would be 0 without a word.
    It is the second derivative that raises, not create_graph=True: torch.func always asks for it.
    """
    if not torch.is_grad_enabled() or torch.compiler.is_compiling():
        return gradients
    made = [x for x in gradients if x is not None]
    found = iter(_FirstOrder.apply(op, len(made), *made, *sources))
    return tuple(None if x is None else next(found) for x in gradients)


class _FirstOrder(torch.autograd.Function):
    """The first `count` of some tensors, whose derivative by any of them is an error."""

    generate_vmap_rule = True

    @staticmethod
    def forward(op: str, count: int, *tensors: Tensor | None) -> tuple:
        return tensors[:count]

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        raise RuntimeError(
            f"drrlhf.{ctx.op} has no double backward: its gradients are computed in the forward "
            "pass. Differentiate once, or build second derivatives from drrlhf.pair_losses and "
            "drrlhf.robust_risk"
        )
