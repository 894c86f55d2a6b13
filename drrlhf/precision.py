"""Which precision a CPU is fast in, and which one autocast multiplies in."""

from __future__ import annotations

import torch


def has_bfloat16() -> bool:
    """Whether the CPU multiplies bfloat16 itself: AVX512_BF16 or AMX."""
    return getattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)()


def emulates_bfloat16() -> bool:
    """Whether the CPU is known to multiply bfloat16 by other means: of AVX alone. With AVX2 a
    product takes about eight times as long as in float32."""
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512") and not has_bfloat16()


def fast_dtype() -> torch.dtype:
    """bfloat16 where the CPU multiplies it itself (twice as fast there), else float32."""
    return torch.bfloat16 if has_bfloat16() else torch.float32


def multiplied_in(tensor: torch.Tensor) -> torch.dtype:
    """The dtype in which autocast, where it is on, would multiply a tensor: as it is in float64."""
    kind = tensor.device.type
    if tensor.dtype == torch.float64 or not torch.is_autocast_enabled(kind):
        return tensor.dtype
    return torch.get_autocast_dtype(kind)
