"""What every launch needs to know: where it runs, and whether kernels are interpreted."""

from __future__ import annotations

import contextlib
import os
from typing import Any

import torch
import triton
from torch import Tensor

# TRITON_INTERPRET=1: kernels run in Python, on CPU tensors.
INTERPRETED = bool(triton.knobs.runtime.interpret)
# DRRLHF_DEBUG=1: kernels assert what they otherwise answer with NaN.
DEBUG = os.environ.get("DRRLHF_DEBUG", "0") not in ("", "0")


def on(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """The tensor's device as the current one: kernels launch on the current stream of that."""
    if tensor.device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(tensor.device).device(tensor.device)
