"""What the machine can do at best: copying memory, and one big matrix product."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from drrlhf.bench.registry import SUITES, Case, Contest, Work

COPIED = {"cpu": 1 << 27, "gpu": 1 << 30, "quick": 1 << 16}  # float32 elements
GEMM = {"cpu": 2048, "gpu": 8192, "quick": 64}  # rows, columns and depth


def cases(suite: str) -> Iterator[Case]:
    """Bandwidth of a copy (bytes read and written), and bfloat16 TFLOP/s of a square product."""
    n, side, device = COPIED[suite], GEMM[suite], SUITES[suite]

    def copy() -> Contest:
        source = torch.ones(n, device=device)
        target = torch.empty_like(source)
        return Contest({"torch.copy_": lambda: Work(lambda: target.copy_(source))}, ours=())

    def product() -> Contest:
        left, right = torch.randn(2, side, side, device=device).bfloat16().unbind()
        return Contest({"torch.mm": lambda: Work(lambda: torch.mm(left, right))}, ours=())

    yield Case("ceilings", "copy", "float32", (n,), copy, bytes=8 * n, order=1)
    yield Case(
        "ceilings",
        "matrix product",
        "bfloat16",
        (side, side, side),
        product,
        flops=2 * side**3,
        order=1,
    )
