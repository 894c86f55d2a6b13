"""Random problems for the mathematics, hard on purpose, and what the solvers need of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch


class Problem(NamedTuple):
    """Losses (n,) float64 of any sign and size, nominal weights (n,) or None for uniform."""

    losses: np.ndarray
    nominal: np.ndarray | None

    @property
    def p(self) -> np.ndarray:
        """Normalised nominal weights."""
        n = len(self.losses)
        nominal = np.ones(n) if self.nominal is None else self.nominal
        return nominal / nominal.sum()

    def tensors(self, dtype: torch.dtype = torch.float64) -> tuple:
        nominal = None if self.nominal is None else torch.tensor(self.nominal, dtype=torch.float64)
        return torch.tensor(self.losses).to(dtype), nominal


def random_problem(rng: np.random.Generator) -> Problem:
    """n from 1 to 200, losses of 1e-6 to 1e4 of both signs, ties, masks, uneven weights."""
    n = int(rng.choice([1, 2, 3, 5, int(rng.integers(1, 30)), int(rng.integers(30, 201))]))
    scale = 10.0 ** rng.uniform(-6, 4)
    losses = rng.standard_normal(n)
    shape = rng.integers(4)
    if shape == 1:
        losses = np.round(losses * 2) / 2  # ties
    elif shape == 2:
        losses = np.exp(2 * losses)  # heavy tail
    elif shape == 3:
        losses = losses + rng.choice([-10.0, 10.0])  # one sign only
    losses = losses * scale
    if rng.random() < 0.1:
        losses = np.full(n, losses[0] or scale)
    nominal = None
    if rng.random() < 0.6:
        nominal = rng.uniform(0.05, 1.0, n)
        if rng.random() < 0.5:
            nominal[rng.random(n) < 0.3] = 0.0
            nominal[rng.integers(n)] = 1.0
    return Problem(losses, nominal)


def trimmed(p: np.ndarray, losses: np.ndarray, trim: float) -> np.ndarray:
    """p after setting the top `trim` of mass aside, ties sharing; by a plain loop over levels."""
    kept, left = p.copy(), trim
    for level in sorted(set(losses[p > 0]), reverse=True):
        at = losses == level
        mass = kept[at].sum()
        taken = min(mass, left)
        kept[at] *= 0.0 if mass - taken < 1e-13 else 1 - taken / mass
        left -= taken
        if left <= 1e-15:
            break
    return kept / kept.sum()
