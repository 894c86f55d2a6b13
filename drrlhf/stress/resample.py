"""The bootstrap over prompts, made cheap: prompts are dealt at random into at most 1024 blocks.

Pairs of one prompt stand or fall together, so prompts are what is resampled. Sums over random
blocks of prompts have the variance of sums over prompts, so resampling blocks gives the same bands,
to the 2 % that 1024 blocks allow; with up to 1024 prompts every block is one prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

BLOCKS = 1024
CONFIDENCE = 0.95
# With fewer different prompts than these a band is rough, and reports say so.
FEW_PROMPTS = 30


def blocks_of(prompts: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """The block (n,) of each pair, 0 to J - 1, equal for pairs of a prompt; no block is empty."""
    there, compact = np.unique(prompts, return_inverse=True)
    order = np.random.default_rng([seed, 1]).permutation(len(there))
    return (order % min(BLOCKS, len(there)))[compact]


def resampled(blocks: int, times: int, seed: int) -> NDArray[np.float64]:
    """How often each block is drawn, (times, blocks): rows of a multinomial that sum to blocks."""
    rng = np.random.default_rng([seed, 2])
    return rng.multinomial(blocks, np.full(blocks, 1 / blocks), size=times).astype(np.float64)


def counts(
    blocks: NDArray[np.int64],
    codes: NDArray[np.int64],
    size: int,
    values: NDArray[np.float64] | None = None,
) -> NDArray[np.float64]:
    """(J, size): of each block and code the number of pairs, or the sum of their ``values``."""
    rows = int(blocks.max()) + 1
    flat = np.bincount(blocks * size + codes, weights=values, minlength=rows * size)
    return flat.reshape(rows, size).astype(np.float64)


class Bootstrap(NamedTuple):
    """The blocks (n,) of prompts that pairs lie in, and how often each is drawn (B, J)."""

    blocks: NDArray[np.int64]
    draws: Array

    @classmethod
    def of(cls, prompts: NDArray[np.int64], times: int, seed: int) -> Bootstrap:
        """That of pairs which belong to ``prompts`` (n,)."""
        blocks = blocks_of(prompts, seed)
        return cls(blocks, resampled(int(blocks.max()) + 1, times, seed))

    def drawn(self, values: Array) -> Array:
        """The means of values (n,) or (n, C) in each resample, (B,) or (B, C), over rows without
        NaN; resamples that have no such row are left out."""
        known = np.isfinite(values).reshape(len(values), -1).all(1)
        blocks, size = self.blocks[known], self.draws.shape[1]
        sizes = self.draws @ np.bincount(blocks, minlength=size).astype(np.float64)
        sums = np.zeros((size, *values.shape[1:]))
        np.add.at(sums, blocks, values[known])
        hit = sizes > 0
        return ((self.draws @ sums)[hit].T / sizes[hit]).T

    def mean(self, values: Array) -> dict[str, float]:
        """The mean of values (n,) that are not NaN, with its band; NaN where there are none."""
        known = np.isfinite(values)
        if not known.any():
            return dict.fromkeys(("value", "low", "high"), float("nan"))
        return band(float(values[known].mean()), self.drawn(values))


def band(value: float, drawn: Sequence[float] | Array) -> dict[str, float]:
    """A number with the percentile interval of its resamples."""
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(np.asarray(drawn), [tail, 1 - tail])
    return {"value": value, "low": float(low), "high": float(high)}
