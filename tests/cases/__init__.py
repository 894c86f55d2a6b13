"""The tables on which every backend must equal plain PyTorch, outputs and gradients: a file an op.

A row is a case that a backend could get wrong by itself: an edge of its blocks, an option, a
layout, a trap. What the formula means is proved elsewhere, on plain PyTorch alone. Options that do
not hang together are covered by pairs (`pairwise`), not as a product.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Made(NamedTuple):
    """A problem: run(*leaves) gives results by name, of which those in `upstream` are
    differentiated with that gradient by the leaves."""

    run: Callable[..., Any]
    leaves: list[Tensor]
    upstream: dict[str, Tensor]


class Case(NamedTuple):
    """A row: what it is about, why it stands there, and its problem, made where it is run."""

    name: str
    why: str
    make: Callable[[], Made]
    thorough: bool = False  # see tests/conftest.py


def numbers(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Normal numbers, the same on every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    """Integers in [low, high), the same on every call."""
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed))


def pairwise(**options: list) -> Iterator[dict[str, Any]]:
    """Few combinations in which any two values of two options meet at least once: each next one
    has as many new pairs as any. The first has the first value of every option."""
    names = list(options)
    every = list(itertools.product(*(range(len(options[n])) for n in names)))
    for k in cover(every):
        yield {n: options[n][i] for n, i in zip(names, every[k])}


def cover(rows: Sequence[tuple[int, ...]]) -> Iterator[int]:
    """Places of few rows in which any two columns have every pair of values that they have in all
    of them; the first one is 0."""
    if len(rows[0]) < 2:
        yield from range(len(rows))
        return
    columns = [*itertools.combinations(range(len(rows[0])), 2)]
    pairs = [{(i, row[i], j, row[j]) for i, j in columns} for row in rows]
    missing = set().union(*pairs)
    k = 0
    while missing:
        missing -= pairs[k]
        yield k
        k = max(range(len(rows)), key=lambda k: len(missing & pairs[k]))


def said(values: dict[str, Any]) -> str:
    """A combination as part of a name."""
    text = lambda x: str(x).removeprefix("torch.")  # noqa: E731
    return ", ".join(f"{name} {text(x)}" for name, x in values.items())


INFINITY, NAN = math.inf, math.nan
# Ways for a tensor to lie in memory that are not the dense one.
LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda x: x.mT.contiguous().mT,
    "every other column": lambda x: torch.stack([x, -x], -1)[..., 0],
    "one element into its storage": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(
        x.shape
    ),
    "one row for all": lambda x: x[:1].expand(x.shape),
    "part of wider rows": lambda x: torch.cat([x, -x], -1)[..., : x.shape[-1]],
}
