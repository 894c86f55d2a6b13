"""The worst case of each row of a table: every row is a problem of its own with few entries.

Notation: `l` losses, `p` nominal distribution, `q` worst-case weights, all (n, K), by row.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from drrlhf.conventions import MASS_ROUNDING, statistics_dtype


def row_worst_case(
    table: Tensor, mask: Tensor | None, nominal: Tensor | None, kind: str, parameter: float
) -> tuple[Tensor, Tensor]:
    """max over q in the set around p of sum_k q_k l_k (minus the set's penalty), and q.

    Args:
        table: (n, K) losses. NaN that counts gives NaN, and is the largest of its row.
        mask: (n, K) bool, False where an entry does not count, whatever it is.
        nominal: (K,) >= 0, float32 or float64: p is in proportion to it among what counts, and what
            has weight 0 does not count. 1 each unless given.
        kind, parameter: of an `Encoded` set, one of `KINDS`.

    Returns:
        values (n,) and weights (n, K), in the dtype of statistics. A row in which nothing counts
        has value 0 and weights 0.
    """
    dtype = statistics_dtype(table)
    if not table.shape[1]:
        return table.new_zeros(len(table), dtype=dtype), table.new_zeros(table.shape, dtype=dtype)
    l = table.detach().double()
    mass = torch.ones_like(l) if nominal is None else nominal.double().expand(l.shape)
    if mask is not None:
        mass = torch.where(mask, mass, 0.0)
    counts = mass > 0
    total = mass.sum(1, keepdim=True)
    empty = total == 0
    p = mass / torch.where(empty, 1.0, total)
    l = torch.where(counts, l, 0.0)
    if kind == "kl_temperature":
        values, q = _tilted(l / parameter, p, counts)
        values = parameter * values
    else:
        q = _moved(l, p, counts, kind, parameter)
        # Not 0 times infinity where an entry has no weight; NaN is never hidden.
        values = torch.where((q > 0) | l.isnan(), q * l, 0.0).sum(1)
    values = torch.where(empty.squeeze(1), 0.0, values)
    return values.to(dtype), torch.where(empty, 0.0, q).to(dtype)


def _tilted(x: Tensor, p: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """log sum p exp(x), and q in proportion to p exp(x); what is infinite has all of it."""
    rank = torch.where(x.isnan(), math.inf, x)
    top = _largest(rank, counts)
    grown = torch.where(rank == top, 1.0, torch.where(top.isinf(), 0.0, (rank - top).exp()))
    grown = torch.where(counts, p * grown, 0.0)
    z = grown.sum(1, keepdim=True)
    # Where all are near the largest, log z is a small number of its own.
    less = torch.where(counts & ~top.isinf(), p * torch.expm1(rank - top), 0.0).sum(1, keepdim=True)
    log_z = torch.where((z > 0.5) & ~top.isinf(), torch.log1p(less), z.log())
    values = (top + log_z).squeeze(1)
    values = torch.where((x.isnan() & counts).any(1), math.nan, values)
    return values, grown / z


def _moved(l: Tensor, p: Tensor, counts: Tensor, kind: str, parameter: float) -> Tensor:
    """q of "erm", of "cvar": the worst share `parameter`; of "tv": that share of the mass moves
    from the smallest losses to the largest. Ties share in proportion to p."""
    if kind == "erm":
        return p
    rank = torch.where(counts, torch.where(l.isnan(), math.inf, l), -math.inf)
    kept = parameter if kind == "cvar" else 1.0 - parameter
    ordered, order = rank.sort(1, descending=True)
    mass = p.gather(1, order)
    before = mass.cumsum(1) - mass
    # The last entry of which some is kept; what does not count comes behind, without mass.
    place = ((before < kept) & (mass > 0)).sum(1, keepdim=True).sub(1).clamp(min=0)
    boundary = ordered.gather(1, place)
    above, at = rank > boundary, (rank == boundary) & counts
    rest = kept - torch.where(above, p, 0.0).sum(1, keepdim=True)
    held = torch.where(at, p, 0.0).sum(1, keepdim=True)
    # A part below the rounding of the masses is none: of an infinite loss 1e-17 would be seen.
    share = torch.where(held - rest < MASS_ROUNDING, 1.0, rest / held)
    share = torch.where(rest < MASS_ROUNDING, 0.0, share)
    q = torch.where(above, p, torch.where(at, p * share, 0.0))
    if kind == "cvar":
        return q / q.sum(1, keepdim=True)
    top = torch.where((rank == _largest(rank, counts)) & counts, p, 0.0)
    return q + (1.0 - q.sum(1, keepdim=True)) * top / top.sum(1, keepdim=True)


def _largest(rank: Tensor, counts: Tensor) -> Tensor:
    return torch.where(counts, rank, -math.inf).amax(1, keepdim=True)
