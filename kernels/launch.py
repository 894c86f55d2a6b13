"""What every launch needs to know: where it runs, and whether kernels are interpreted."""

from __future__ import annotations

import contextlib
import struct
from typing import Any

import torch
import triton
from torch import Tensor

from drrlhf.checks import DEBUG

__all__ = ["DEBUG", "INTERPRETED", "numbers", "on", "registers"]

LARGEST = torch.finfo(torch.float32).max

# TRITON_INTERPRET=1: kernels run in Python, on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)


def on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The tensor's device as the current one: kernels launch on the current stream of that."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)


def registers(tensor: Tensor, count: int) -> dict[str, int]:
    """Launch options by which ptxas may give a thread `count` registers. Left alone it settles for
    fewer than float64 divisions and exponentials need, and spills around them."""
    return {"maxnreg": count} if tensor.is_cuda and torch.version.hip is None else {}


def numbers(*values: float) -> tuple[tuple[float, float], ...]:
    """Arguments of a kernel that `numerics.number` puts together again, to 48 bits and more, and at
    most 6.8e38: twice the largest float32."""
    pairs = []
    for value in values:
        # Beyond float32 what is left of an infinite number would be the other infinity.
        high = struct.unpack("f", struct.pack("f", _clamped(value)))[0]
        pairs.append((high, _clamped(value - high)))
    return tuple(pairs)


def _clamped(value: float) -> float:
    return min(max(value, -LARGEST), LARGEST)
