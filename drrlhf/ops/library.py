"""The torch.library that holds every op: its schema, kernel by backend, fake and autograd.

A schema stands in one place, the op's file, and names every argument and result. From it come the
definitions that the compiled backends implement, and the named tuples in which Python has an op's
arguments and results: nobody counts positions.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from drrlhf import backends

LIBRARY = torch.library.Library("drrlhf", "DEF")
# The compiled extension registers implementations alone (csrc/ops.cpp, csrc/ops_cuda.cpp).
COMPILED = torch.library.Library("drrlhf_cpp", "DEF")
SCHEMAS: dict[str, str] = {}


def _named(kind: str, fields: list[str]) -> Any:
    return namedtuple(kind, fields)  # type: ignore[misc]


class Op:
    """An op `drrlhf::name`, run by whichever backend serves it.

    Calling it gives its results by name (a single one as it is). `Arguments` and `Results` are
    named tuples in the order of the schema.
    """

    def __init__(self, name: str, schema: str, fake: Callable[..., Any]) -> None:
        def run(first: Tensor, *rest: Any) -> Any:
            device = first.device
            return backends.kernel(name, device.type, first.dtype, device.index)(first, *rest)

        SCHEMAS[name] = name + schema
        for library in (LIBRARY, COMPILED):
            library.define(name + schema)
        # For all devices at once: `drrlhf.backends` decides at every call, so that a choice made by
        # name holds inside compiled graphs too.
        LIBRARY.impl(name, run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"drrlhf::{name}", fake, lib=LIBRARY)
        self.name = name
        self.run = run
        self.overload = getattr(torch.ops.drrlhf, name).default
        parsed = self.overload._schema
        self.Arguments = _named(f"{name}_arguments", [a.name for a in parsed.arguments])
        results = [r.name for r in parsed.returns]
        self.Results: Any = _named(f"{name}_results", results) if len(results) > 1 else None
        self._call: Callable[..., Any] = self.overload

    def __call__(self, *arguments: Any, **named: Any) -> Any:
        if named:
            arguments = self.Arguments(*arguments, **named)
        found = self._call(*arguments)
        return found if self.Results is None else self.Results(*found)

    def gradients(self, **known: Any) -> tuple:
        """What a backward returns: these gradients, and None for every other argument."""
        return self.Arguments(**dict.fromkeys(self.Arguments._fields) | known)

    def differentiate(self, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
        """Register backward(ctx, grads) and setup(ctx, arguments, results), both by name.

        What torch.library makes of a backward serves graphs. It cannot be transformed by
        torch.func, an autograd.Function that sets its context up apart from its forward can: there
        it takes over. Called eagerly, one that does so within it takes half the time of either.
        """
        results = self.Results or _named(f"{self.name}_result", ["value"])

        def by_name(ctx: Any, inputs: Any, output: Any) -> None:
            output = output if isinstance(output, tuple) else (output,)
            setup(ctx, self.Arguments(*inputs), results(*output))

        def from_named(ctx: Any, *grads: Any) -> tuple:
            return tuple(backward(ctx, results(*grads)))

        op, run = self.overload, self.run
        torch.library.register_autograd(op, from_named, setup_context=by_name, lib=LIBRARY)

        def forward(ctx: Any, *arguments: Any) -> Any:
            with torch._C._AutoDispatchBelowAutograd():
                output = (run if unobserved(arguments) else op)(*arguments)
            by_name(ctx, arguments, output)
            return output

        def derived(kind: str, **parts: Any) -> Any:
            made = {name: staticmethod(part) for name, part in parts.items()}
            made["backward"] = staticmethod(from_named)
            return type(f"{self.name}_{kind}", (torch.autograd.Function,), made)

        apart = derived("transformed", forward=lambda *a: op(*a), setup_context=by_name)
        apart.generate_vmap_rule = True
        within = derived("eager", forward=forward)

        def call(*arguments: Any) -> Any:
            if transformed():
                return apart.apply(*arguments)
            if torch.compiler.is_compiling() or not (torch.is_grad_enabled() or _has_tangents()):
                return op(*arguments)
            return within.apply(*arguments)

        self._call = call


def transformed() -> bool:
    """Whether `torch.func` transforms what runs: grad, vjp, jacrev, vmap ..."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def _has_tangents() -> bool:
    """Whether tensors may carry tangents, which no_grad leaves to them: no op takes them along, and
    an autograd.Function says so, where what torch.library makes would drop them."""
    return forward_ad._current_level >= 0


_PLAIN = (Tensor, torch.nn.Parameter)


def unobserved(arguments: Sequence[Any]) -> bool:
    """Whether a backend may be called without the dispatcher, which takes longer than a small op:
    no mode, no tensor of a class of its own or without values would meet another op there."""
    return not torch._C._len_torch_dispatch_stack() and all(
        type(x) in _PLAIN and not x.is_meta for x in arguments if isinstance(x, Tensor)
    )


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
