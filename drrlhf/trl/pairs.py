"""What is known of the pairs of a step, and the metrics that are made of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Metrics of one group each are logged for the ids below this: a column of user ids would
# otherwise fill the log.
LOGGED_GROUPS = 32


class Pairs(NamedTuple):
    """Detached scalars of n pairs: losses, whether the chosen one won, nominal weights, groups,
    worst-case weights; each (n,) or None."""

    losses: Tensor
    correct: Tensor
    nominal: Tensor | None
    groups: Tensor | None
    weights: Tensor | None = None

    def table(self) -> Tensor:
        """(n, 5), float64: what a rank tells the others; -1 is no group, NaN no weight."""
        ones = torch.ones_like(self.losses, dtype=torch.float64)
        columns = [
            self.losses,
            self.correct,
            ones if self.nominal is None else self.nominal,
            -ones if self.groups is None else self.groups,
            ones * torch.nan if self.weights is None else self.weights,
        ]
        return torch.stack([column.double() for column in columns], 1)


def together(parts: Sequence[Pairs]) -> Pairs:
    """The pairs of several batches; what one of them lacks, none has."""
    columns = [
        None if any(column is None for column in of_all) else torch.cat(of_all)
        for of_all in zip(*parts, strict=True)
    ]
    return Pairs(*columns)  # type: ignore[arg-type]  # losses and correct are always there


def from_table(table: Tensor) -> Pairs:
    """What `Pairs.table` was made of, put together over ranks and batches."""
    losses, correct, nominal, groups, weights = table.unbind(1)
    ids = groups.long() if len(table) and bool((groups >= 0).all()) else None
    return Pairs(losses, correct > 0, nominal, ids, weights)


def summary(pairs: Pairs, value: float) -> dict[str, float]:
    """The ``robust/…`` metrics of pairs whose worst-case weights are known.

    value, mean_loss (the nominal mean), effective_sample_size 1 / sum q² as a share of the unmasked
    pairs, max_weight as a multiple of the uniform one, kept: the share of unmasked pairs with
    weight.
    """
    assert pairs.nominal is not None and pairs.weights is not None
    own = {
        "robust/value": value,
        "robust/mean_loss": nominal_mean(pairs.losses, pairs.nominal),
    }
    return own | unevenness(pairs.weights, pairs.nominal > 0)


def nominal_mean(values: Tensor, nominal: Tensor) -> float:
    """The mean of values (n,) by nominal weights (n,), of which only ratios matter; 0 where all of
    them are masked."""
    p = nominal.double()
    p = p / p.amax() if len(p) and p.any() else p
    return (torch.where(p > 0, p * values, 0).sum() / p.sum().clamp_min(1)).item()


def unevenness(q: Tensor, unmasked: Tensor) -> dict[str, float]:
    """How unevenly weights (n,) fall on what is not masked (n,): the last three of `summary`."""
    count = max(int(unmasked.sum()), 1)
    squares = q.square().sum().clamp_min(torch.finfo(q.dtype).tiny)
    return {
        "robust/effective_sample_size": (q.sum().square() / (squares * count)).item(),
        "robust/max_weight": (q.max() * count).item() if len(q) else 0.0,
        "robust/kept": ((q != 0) & unmasked).sum().item() / count,
    }


def _groups(pairs: Pairs) -> Iterator[tuple[int, Tensor]]:
    """Each group that has an unmasked pair, and which pairs (n,) these are."""
    if pairs.groups is not None:
        assert pairs.nominal is not None
        for g in pairs.groups.unique().tolist():
            rows = (pairs.groups == g) & (pairs.nominal > 0)
            if rows.any():
                yield g, rows


def by_group(pairs: Pairs, state: Tensor | None) -> dict[str, float]:
    """The ``group/…`` metrics: loss, accuracy, weight of each group present, and its state."""
    metrics: dict[str, float] = {}
    for g, rows in _groups(pairs):
        if g < LOGGED_GROUPS:
            metrics[f"group/{g}/loss"] = pairs.losses[rows].mean().item()
            metrics[f"group/{g}/accuracy"] = pairs.correct[rows].double().mean().item()
            if pairs.weights is not None:
                metrics[f"group/{g}/weight"] = pairs.weights[rows].sum().item()
    return metrics | states(state)


def states(state: Tensor | None) -> dict[str, float]:
    """The kept weight of each group, where a Group set keeps any."""
    kept = [] if state is None else state[:LOGGED_GROUPS].tolist()
    return {f"group/{g}/state": weight for g, weight in enumerate(kept)}


def worst_group(pairs: Pairs) -> dict[str, Any]:
    """Loss of the group with the highest one, and accuracy of the group with the lowest."""
    rows = [rows for _, rows in _groups(pairs)]
    if not rows:
        return {}
    return {
        "robust/worst_group_loss": max(pairs.losses[r].mean().item() for r in rows),
        "robust/worst_group_accuracy": min(pairs.correct[r].double().mean().item() for r in rows),
    }
