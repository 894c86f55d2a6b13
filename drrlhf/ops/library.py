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


def autograd(name: str, backward: Callable[..., Any], setup: Callable[..., None]) -> None:
    """Register the backward of `drrlhf::name`."""
    torch.library.register_autograd(f"drrlhf::{name}", backward, setup_context=setup, lib=LIBRARY)


def first_order_only(op: str) -> None:
    """Refuse create_graph=True: these gradients were made in the forward pass, as constants."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"drrlhf.{op} has no double backward: its gradients are computed in the forward pass. "
            "Drop create_graph=True, or build second derivatives from drrlhf.pair_losses and "
            "drrlhf.robust_risk"
        )
