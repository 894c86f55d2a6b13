"""The bootstrap over prompts, made cheap: prompts are dealt at random into at most 1024 blocks.

Pairs of one prompt stand or fall together, so prompts are what is resampled. Sums over random
blocks of prompts have the variance of sums over prompts, so resampling blocks gives the same bands,
to the 2 % that 1024 blocks allow; with up to 1024 prompts every block is one prompt.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

BLOCKS = 1024
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
