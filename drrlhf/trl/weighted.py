"""What an adversary weighs, pairs or prompts: one table of scalars, and the metrics made of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# Metrics of one group each are logged for the ids below this: a column of user ids would
# otherwise fill the log.
LOGGED_GROUPS = 32


class Kind(NamedTuple):
    """What the rows of a table are: the names of their metrics, and the sign of what is logged."""

    worst_case: str
    mean: str
    of_group: str
    sign: float


PAIRS = Kind("robust/value", "robust/mean_loss", "loss", 1.0)
# The loss of a prompt is minus its mean reward.
PROMPTS = Kind("robust/worst_case_reward", "robust/reward", "reward", -1.0)


class Weighted(NamedTuple):
    """Detached scalars of n rows, each (n,) or None: losses, nominal weights (0 masks), groups (-1:
    none), worst-case weights, and of pairs whether the chosen one won."""

    losses: Tensor
    nominal: Tensor | None
    groups: Tensor | None
    weights: Tensor | None = None
    correct: Tensor | None = None

    def table(self) -> Tensor:
        """(n, 5), float64: what a rank tells the others; -1 is no group, NaN no weight."""
        ones = torch.ones_like(self.losses, dtype=torch.float64)
        columns = [
            self.losses,
            ones if self.nominal is None else self.nominal,
            -ones if self.groups is None else self.groups,
            ones * torch.nan if self.weights is None else self.weights,
            ones * torch.nan if self.correct is None else self.correct,
        ]
        return torch.stack([column.double() for column in columns], 1)

    def on(self, device: torch.device | str) -> Weighted:
        return Weighted(*(None if x is None else x.to(device) for x in self))  # type: ignore[arg-type]

    def groups_present(self, below: int) -> Iterator[tuple[int, Tensor]]:
        """Each group under a number that has an unmasked row, and which rows (n,) these are."""
        if self.groups is not None:
            assert self.nominal is not None
            for g in self.groups[self.groups < below].unique().tolist():
                rows = (self.groups == g) & (self.nominal > 0)
                if g >= 0 and rows.any():
                    yield g, rows


def concatenate(parts: Sequence[Weighted]) -> Weighted:
    """The rows of several batches; what one of them lacks, none has."""
    columns = [
        None if any(column is None for column in of_all) else torch.cat(of_all)
        for of_all in zip(*parts, strict=True)
    ]
    return Weighted(*columns)  # type: ignore[arg-type]  # losses are always there


def from_table(table: Tensor) -> Weighted:
    """What `Weighted.table` was made of, gathered over ranks and batches."""
    losses, nominal, groups, weights, correct = table.unbind(1)
    ids = groups.long() if bool((groups >= 0).any()) else None
    return Weighted(losses, nominal, ids, weights, correct > 0)


def summary(rows: Weighted, value: float, kind: Kind) -> dict[str, float]:
    """The ``robust/…`` metrics of rows whose worst-case weights are known: the worst case, the
    nominal mean, and how unevenly the weights fall.

    effective_sample_size: 1 / sum q² as a share of the unmasked rows; max_weight: as a multiple of
    the uniform one; kept: the share of unmasked rows with weight.
    """
    assert rows.nominal is not None and rows.weights is not None
    q, unmasked = rows.weights, rows.nominal > 0
    count = max(int(unmasked.sum()), 1)
    squares = q.square().sum().clamp_min(torch.finfo(q.dtype).tiny)
    return {
        kind.worst_case: kind.sign * value,
        kind.mean: kind.sign * nominal_mean(rows.losses, rows.nominal),
        "robust/effective_sample_size": (q.sum().square() / (squares * count)).item(),
        "robust/max_weight": (q.max() * count).item() if len(q) else 0.0,
        "robust/kept": ((q != 0) & unmasked).sum().item() / count,
    }


def nominal_mean(values: Tensor, nominal: Tensor) -> float:
    """The mean of values (n,) by nominal weights (n,), of which only ratios matter; 0 where all of
    them are masked."""
    p = nominal.double()
    p = p / p.amax() if len(p) and p.any() else p
    return (torch.where(p > 0, p * values, 0).sum() / p.sum().clamp_min(1)).item()


def by_group(
    rows: Weighted, state: Tensor | None, label: Callable[[int], str], kind: Kind
) -> dict[str, float]:
    """The ``group/…`` metrics: mean loss or reward, accuracy and weight of each group present, and
    the kept weight of each where a Group set keeps any; group g is called ``label(g)``."""
    metrics: dict[str, float] = {}
    for g, mine in rows.groups_present(LOGGED_GROUPS):
        name = f"group/{label(g)}"
        metrics[f"{name}/{kind.of_group}"] = kind.sign * rows.losses[mine].mean().item()
        if rows.correct is not None:
            metrics[f"{name}/accuracy"] = rows.correct[mine].double().mean().item()
        if rows.weights is not None:
            metrics[f"{name}/weight"] = rows.weights[mine].sum().item()
    kept = [] if state is None else state[:LOGGED_GROUPS].tolist()
    return metrics | {f"group/{label(g)}/state": weight for g, weight in enumerate(kept)}


def worst_group(rows: Weighted) -> dict[str, Any]:
    """Loss of the group with the highest one, and accuracy of the group with the lowest."""
    if rows.groups is None:
        return {}
    assert rows.correct is not None and rows.nominal is not None
    there = (rows.groups >= 0) & (rows.nominal > 0)
    if not there.any():
        return {}
    # All groups at once: a column of user ids has as many groups as rows.
    groups, place = rows.groups[there].unique(return_inverse=True)

    def of_one(values: Tensor, chosen: Callable[[Tensor], Tensor]) -> float:
        """The mean of values (rows there,) in the group that is chosen by these means."""
        sums = values.new_zeros(len(groups)).index_add(0, place, values)
        means = sums / place.bincount(minlength=len(groups))
        return values[place == chosen(means)].mean().item()

    return {
        "robust/worst_group_loss": of_one(rows.losses[there].double(), torch.argmax),
        "robust/worst_group_accuracy": of_one(rows.correct[there].double(), torch.argmin),
    }
