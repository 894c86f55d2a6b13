"""The worst case of each row of a table, in closed form: for `worst_view` and `robust_reward`.

A row is a problem of its own with few entries, so all of them are solved at once by PyTorch's own
operations, on whatever device they are.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drrlhf.ambiguity import CVaR, Encoded, parse_ambiguity
from drrlhf.checks import constant_in_graphs

# "max" is TV with all of the mass: it goes to the largest entries.
NAMES = {"max": "tv:1", "mean": "erm"}
KINDS = ("erm", "tv", "kl_temperature", "cvar")


class Rows(NamedTuple):
    """values (n,), with the gradient of Danskin's theorem; weights (n, K), detached."""

    values: Tensor
    weights: Tensor


@constant_in_graphs
def solvable(option: str, ambiguity: str) -> Encoded:
    """The set that a string names, encoded, if its worst case has a closed form by rows.

    Raises:
        ValueError: it has none, or there is no such set.
    """
    found = parse_ambiguity(NAMES.get(ambiguity.strip().lower(), ambiguity))
    encoded = found.encode()
    if encoded.kind not in KINDS or encoded.trim or (isinstance(found, CVaR) and found.temperature):
        raise ValueError(
            f"{option}: expected 'max', 'mean', 'tv:r', 'kl:temperature=t' or 'cvar:a', without "
            f"trim, got {ambiguity!r}; another set has no closed form for the few entries of a row"
        )
    return encoded


def row_worst_case(table: Tensor, nominal: Tensor, encoded: Encoded) -> Rows:
    """max over q in the set around p of sum_k q_k l_k (minus the set's penalty), for every row.

    Args:
        table: (n, K) losses, float32 or float64.
        nominal: (n, K) of the same dtype, >= 0, which p is in proportion to; where it is 0 the
            entry does not matter, even NaN, and gets no gradient. A row of zeros has value 0.
        encoded: from `solvable`.
    """
    total = nominal.sum(1, keepdim=True)
    known = nominal > 0
    if not table.shape[1]:
        return Rows(table.sum(1), nominal)
    # A row of nothing is solved as a row of zeros, so that no gradient of it is NaN.
    empty = total == 0
    p = torch.where(empty, 1.0 / table.shape[1], nominal / torch.where(empty, 1.0, total))
    losses = torch.where(known, table, 0.0)
    with torch.no_grad():
        weights = _weights(losses.detach(), p, encoded)
        weights = torch.where(empty, 0.0, weights)
    if encoded.kind == "kl_temperature":
        t = encoded.parameter
        # Entries that do not count are left out by their weight: log 0 = -inf.
        values = t * torch.logsumexp(losses / t + p.log(), 1)
        values = torch.where(empty.squeeze(1), 0.0, values)
    else:
        # Not 0 times infinity where nothing is asked for. NaN is never hidden.
        lost = losses.isnan() & known
        values = torch.where((weights > 0) | lost, weights * losses, 0.0).sum(1)
    return Rows(values, weights)


def _weights(losses: Tensor, p: Tensor, encoded: Encoded) -> Tensor:
    """The worst-case weights q (n, K); p sums to 1 in every row."""
    kind, parameter = encoded.kind, encoded.parameter
    if kind == "erm":
        return p
    if kind == "kl_temperature":
        return torch.softmax(losses / parameter + p.log(), 1)
    # The mass that stays, filled from the largest loss down; what is masked comes last.
    kept = parameter if kind == "cvar" else 1.0 - parameter
    ranked = torch.where(p > 0, losses, -torch.inf)
    order = torch.sort(ranked, dim=1, descending=True, stable=True).indices
    ordered = p.gather(1, order)
    before = ordered.cumsum(1) - ordered
    filled = torch.minimum(ordered, (kept - before).clamp(min=0.0))
    weights = torch.zeros_like(p).scatter(1, order, filled)
    if kind == "cvar":
        return weights / weights.sum(1, keepdim=True)
    # TV: the rest goes to the largest, in proportion to p.
    largest = ranked.amax(1, keepdim=True)
    top = torch.where((losses == largest) & (p > 0), p, 0.0)
    rest = 1.0 - weights.sum(1, keepdim=True)
    return weights + rest * top / top.sum(1, keepdim=True)
