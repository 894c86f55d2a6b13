"""`sequence_preference_loss`: from token log-probs to gradients, as `preference_loss`."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from drrlhf import ops
from drrlhf.ambiguity import parse_ambiguity
from drrlhf.bench.preference_loss import SETS, Call, contest
from drrlhf.bench.registry import SUITES, Case

PAIRS = {"cpu": (64, 4096), "gpu": (64, 4096), "quick": (8,)}
TOKENS = 512  # of a pair
BETA = 0.1


def cases(suite: str) -> Iterator[Case]:
    """One op that returns loss, weights and gradients by sequence, for each kind of set."""
    for pairs in PAIRS[suite]:
        for text in SETS:
            yield Case(
                op="sequence_preference_loss",
                metric=f"token log-probs to gradients, {text}",
                dtype="float32",
                shape=(pairs, TOKENS),
                unit="us",
                threads=1,
                order=4,
                build=lambda pairs=pairs, text=text: contest(  # type: ignore[misc]
                    "sequence_preference_loss", suite, _tokens(SUITES[suite], pairs, text)
                ),
            )


def _tokens(device: str, pairs: int, text: str) -> Call:
    generator = torch.Generator().manual_seed(0)
    shape = (2 * pairs, TOKENS // 2)
    logps = -torch.rand(shape, generator=generator).mul(4).to(device)
    labels = torch.ones(shape, dtype=torch.long, device=device)
    references = torch.randn(2 * pairs, generator=generator).mul(20).sub(TOKENS).to(device)
    encoded = parse_ambiguity(text).encode()

    def call(dtype: torch.dtype) -> tuple[Tensor, ...]:
        tokens = (logps.to(dtype), labels, None, references.to(dtype), None, None, None, -100)
        out = ops.sequence_preference_loss(*tokens, BETA, 0.0, *encoded)
        return out.value, out.weights, out.d_sums

    return call
