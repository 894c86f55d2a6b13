"""Losses to their worst case: value, weights and dual variable of every ambiguity set.

Written to be checked by eye against the formulas of `drrlhf.ambiguity`: ordered sets are solved
by sorting and prefix sums, the two without a closed form by bisection. All of it is float64, free
of host synchronisation, and independent of the compiled backends, which search without sorting.

Notation: `l` losses (n,), `p` nominal weights (n,) with sum 1, `q` worst-case weights (n,).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from drrlhf.ambiguity import Encoded
from drrlhf.checks import check_none
from drrlhf.conventions import MASS_ROUNDING, statistics_dtype


def _upper_tail(l: Tensor, p: Tensor, mass: Tensor | float) -> tuple[Tensor, Tensor]:
    """Fractions k (n,) in [0, 1] with sum p k = mass, largest losses first, and the threshold.

    Ties at the threshold share in proportion to p. `mass` in (0, 1].
    """
    order = torch.argsort(l, descending=True)
    covered = torch.cumsum(p[order], 0)
    position = torch.searchsorted(covered, torch.as_tensor(mass, dtype=l.dtype, device=l.device))
    threshold = l[order][position.clamp(max=l.numel() - 1)]
    above, at = l > threshold, l == threshold
    part, mass_at = mass - (p * above).sum(), (p * at).sum()
    # A part below the rounding of the masses is none: trimming must not leave 1e-17 of a loss
    # behind for the adversary to find.
    share = torch.where(mass_at - part < MASS_ROUNDING, 1, part / mass_at)
    share = torch.where(part < MASS_ROUNDING, 0, share)
    return above + torch.where(at, share, 0), threshold


def _exponential_weights(x: Tensor, p: Tensor) -> tuple[Tensor, Tensor]:
    """q proportional to p exp(x), and log sum p exp(x), for x <= 0 with its maximum at 0."""
    e = p * torch.exp(x)
    z = e.sum()
    # log1p keeps the digits that 1 - small loses; log keeps those that small loses in 1 - small.
    log_z = torch.where(z > 0.5, torch.log1p((p * torch.expm1(x)).sum()), torch.log(z))
    return e / z, log_z


def _kl_radius(l: Tensor, p: Tensor, r: float, top: Tensor, span: Tensor):
    """Bisect the inverse temperature s of q ~ p exp(-s d) on a log scale, d = (max - l) / span."""
    d = (top - l) / span
    # KL(s) <= s^2 / 8 for losses in [0, 1] (Hoeffding) bounds s from below; from 1e18 on,
    # neighbouring float64 losses are already apart by more than e^-100.
    low = torch.full_like(top, math.log(max(math.sqrt(8 * r), 1e-150)))
    high = torch.full_like(top, math.log(1e18))
    for _ in range(100):
        middle = (low + high) / 2
        s = torch.exp(middle)
        q, log_z = _exponential_weights(-s * d, p)
        below = -s * (q * d).sum() - log_z < r
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return q, span / s


def _chi_square_radius(l: Tensor, p: Tensor, r: float, top: Tensor, span: Tensor):
    """q ~ p (l - eta)_+; on the k largest losses eta solves a quadratic; the first valid k wins."""
    d, order = torch.sort((top - l) / span)
    w = p[order]
    m0, m1, m2 = torch.cumsum(w, 0), torch.cumsum(w * d, 0), torch.cumsum(w * d * d, 0)
    mean = m1 / m0
    variance = (m2 / m0 - mean * mean).clamp(min=0)
    # (1 + 2 r) m0 - 1, of which a small radius would leave the rounding of m0 alone.
    slack = 2 * r * m0 - (torch.cumsum(w.flip(0), 0).flip(0) - w)
    eta = mean + torch.sqrt(variance / torch.where(slack > 0, slack, 1))
    following = torch.cat([d[1:], d.new_full((1,), math.inf)])
    valid = (slack > 0) & (eta <= following)
    eta = eta[valid.to(torch.int8).argmax()]
    q = p * (eta - (top - l) / span).clamp(min=0)
    return q / q.sum(), top - span * eta


def _chi_square_penalty(l: Tensor, p: Tensor, c: float, top: Tensor, span: Tensor):
    """q = p (l - eta)_+ / c ; on the k largest losses eta is linear, the first valid k wins."""
    d, order = torch.sort((top - l) / span)
    w = p[order]
    m0, m1 = torch.cumsum(w, 0), torch.cumsum(w * d, 0)
    eta = m1 / m0 + c / span / m0
    following = torch.cat([d[1:], d.new_full((1,), math.inf)])
    eta = eta[((m0 > 0) & (eta <= following)).to(torch.int8).argmax()]
    q = p * (eta - (top - l) / span).clamp(min=0)
    q = q / q.sum()
    ratio = torch.where(p > 0, q / torch.where(p > 0, p, 1), 1)
    return q, top - span * eta, 0.5 * c * (p * (ratio - 1) ** 2).sum()


def _cvar_temperature(l: Tensor, p: Tensor, alpha: float, t: float):
    """q = p min(exp((l - eta)/t), 1/alpha); the first valid number of capped losses wins."""
    ordered, order = torch.sort(l, descending=True)
    w = p[order]
    anchor = _upper_tail(l, p, alpha)[1]  # close to eta, so that exponents that matter are small
    x = (ordered - anchor) / t
    capped = torch.cat([w.new_zeros(1), torch.cumsum(w, 0)])[:-1]  # mass of the k largest
    free = torch.logcumsumexp((x + torch.log(w)).flip(0), 0).flip(0)
    log_y = torch.log((1 - capped / alpha).clamp(min=0)) - free  # (anchor - eta) / t
    valid = (log_y + x <= -math.log(alpha) + 1e-12) & (capped < alpha)
    valid &= x < 1e3  # so far above the tail's edge all are capped, and x + log w is x alone
    log_y = log_y[valid.to(torch.int8).argmax()]
    z = torch.minimum((l - anchor) / t + log_y, torch.full_like(l, -math.log(alpha)))
    q = p * torch.exp(z)
    return q / q.sum(), anchor - t * log_y, t * (q * z.clamp(min=-1e3)).sum()


def worst_case(
    l: Tensor, p: Tensor, kind: str, parameter: float, temperature: float, trim: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Value (), weights q (n,), dual () of one problem: float64, finite, sum p = 1, n >= 1."""
    if trim > 0:
        p = p * (1 - _upper_tail(l, p, trim)[0])
        p = p / p.sum()
    present = p > 0
    top = torch.where(present, l, -math.inf).amax()
    bottom = torch.where(present, l, math.inf).amin()
    l = torch.where(present, l, top)
    at_top = p * (l == top)
    q_top = at_top / at_top.sum()  # all mass on the largest losses
    span = torch.where(top > bottom, top - bottom, 1)
    penalty = torch.zeros_like(top)
    if (
        kind == "erm"
        or (parameter == 0 and kind in ("kl_radius", "chi2_radius", "tv"))
        or (parameter == 1 and kind in ("cvar", "cvar_temperature"))
    ):  # the set holds p alone
        limits = {"erm": 0.0, "kl_radius": math.inf, "chi2_radius": -math.inf}
        q, dual = p, torch.full_like(top, limits[kind]) if kind in limits else bottom
    elif kind == "kl_radius":
        q, dual = _kl_radius(l, p, parameter, top, span)
        everything = parameter >= -torch.log(at_top.sum())
        q, dual = torch.where(everything, q_top, q), torch.where(everything, 0.0, dual)
    elif kind == "kl_temperature":
        anchor = top if parameter > 0 else bottom
        q, log_z = _exponential_weights((l - anchor) / parameter, p)
        return anchor + parameter * log_z, q, torch.full_like(top, parameter)
    elif kind == "tv":
        kept, dual = (
            _upper_tail(l, p, 1 - parameter) if parameter < 1 else (torch.zeros_like(p), top)
        )
        q = p * kept + parameter * q_top
    elif kind == "chi2_radius":
        q, dual = _chi_square_radius(l, p, parameter, top, span)
        everything = parameter >= (1 / at_top.sum() - 1) / 2
        q, dual = torch.where(everything, q_top, q), torch.where(everything, top, dual)
    elif kind == "chi2_penalty":
        q, dual, penalty = _chi_square_penalty(l, p, parameter, top, span)
    elif kind == "cvar":
        kept, dual = _upper_tail(l, p, parameter)
        q = p * kept / parameter
    elif kind == "cvar_temperature":
        q, log_z = _exponential_weights((l - top) / temperature, p)
        capped_q, capped_dual, capped_penalty = _cvar_temperature(l, p, parameter, temperature)
        capped_value = (capped_q * l).sum() - capped_penalty
        free = -log_z <= -math.log(parameter)  # the cap binds nowhere: KL(temperature=temperature)
        value = torch.where(free, top + temperature * log_z, capped_value)
        dual = torch.where(free, top + temperature * log_z, capped_dual)
        return value, torch.where(free, q, capped_q), dual
    else:
        raise AssertionError(f"unknown kind {kind!r}")
    # Equal losses leave every radius ball's adversary without parameter choice that pays: q = p.
    q = torch.where((top > bottom) | (p <= 0), q, p)
    penalty = torch.where(top > bottom, penalty, 0)
    return top + (q * (l - top)).sum() - penalty, q, dual


def _group_step(
    l: Tensor, p: Tensor, groups: Tensor, w: Tensor, step_size: float, update: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Value, q and the new group weights (G,): one exponentiated-gradient step, see `Group`."""
    mass = torch.zeros_like(w).index_add_(0, groups, p)
    total_loss = torch.zeros_like(w).index_add_(0, groups, p * l)
    present = mass > 0
    safe_mass = torch.where(present, mass, 1)
    held = (w * present).sum()
    if update:
        gain = torch.where(present, step_size * total_loss / safe_mass, -math.inf)
        stepped = w * torch.exp(gain - torch.where(held > 0, gain.amax(), 0))
        stepped = stepped * (held / stepped.sum())
        # A weight that underflowed to 0 could never come back.
        w = torch.where(present, stepped.clamp(min=torch.finfo(w.dtype).tiny), w)
    share = torch.where(present, w, 0)
    q = (share / share.sum() / safe_mass)[groups] * p
    return (q * l).sum(), q, w


def normalised(nominal: Tensor | None, n: int, like: Tensor) -> Tensor:
    """Nominal weights as float64 (n,) with sum 1, or all 0 where nothing is unmasked; all NaN where
    one is negative or not finite."""
    if nominal is None:
        return torch.full((n,), 1.0 / max(n, 1), dtype=torch.float64, device=like.device)
    p = nominal.double()
    legal = torch.isfinite(p) & (p >= 0)
    check_none(
        lambda: ~legal,
        lambda read, i: (
            f"nominal: expected finite weights >= 0 (0 masks a pair), got {read(p)[i].item()} at "
            f"index {i}; drop or clamp it"
        ),
        p,
    )
    p = torch.where(legal, p, math.nan)
    total = p.sum()
    return torch.where(total > 0, p / torch.where(total > 0, total, 1), 0 * total)


def check_groups(groups: Tensor | None, group_weights: Tensor | None) -> Tensor:
    """Which group ids are outside of [0, G); ValueError for the first of them on the CPU."""
    assert groups is not None and group_weights is not None, "Group needs groups and state"
    groups, size = groups.long(), group_weights.numel()
    outside = (groups < 0) | (groups >= size)
    check_none(
        lambda: outside,
        lambda read, i: (
            f"groups: expected ids in [0, {size}) for Group(num_groups={size}), got "
            f"{int(read(groups)[i])} at index {i}; raise num_groups or fix the column"
        ),
        groups,
    )
    return outside


def solve(
    losses: Tensor,
    nominal: Tensor | None,
    groups: Tensor | None,
    group_weights: Tensor | None,
    ambiguity: Encoded,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value (), weights (n,), dual () and new group weights (G,) of `losses` (n,), all float64."""
    kind, parameter, temperature, trim, update = ambiguity
    p = normalised(nominal, losses.numel(), losses)
    masked = p == 0
    l = torch.where(masked, 0, losses.double())
    state = torch.zeros(0, dtype=torch.float64, device=l.device)
    legal = ~p.isnan().any()
    if kind == "group":
        outside = check_groups(groups, group_weights)
        legal = legal & ~outside.any()
        ids = torch.where(outside, 0, groups.long())  # type: ignore[union-attr]
        state = group_weights.clone()  # type: ignore[union-attr]
    if l.numel() == 0:
        return l.sum(), l, l.sum(), state
    finite = torch.isfinite(l).all()
    safe = torch.where(finite, l, 0)  # solve something harmless where the answer is NaN anyway
    empty = masked.all()
    safe_p = torch.where(empty | p.isnan(), 1.0 / l.numel(), p)
    if kind == "group":
        if trim > 0:
            safe_p = safe_p * (
                1 - _upper_tail(torch.where(masked, safe.amin(), safe), safe_p, trim)[0]
            )
            safe_p = safe_p / safe_p.sum()
        value, q, stepped = _group_step(safe, safe_p, ids, group_weights, parameter, update)  # type: ignore[arg-type]
        state = torch.where(finite & legal & ~empty, stepped, state)
        dual = torch.zeros_like(value)
    else:
        value, q, dual = worst_case(safe, safe_p, kind, parameter, temperature, trim)
    # A non-finite loss must be seen: the plain mean carries it, and so do all the weights.
    value = torch.where(finite, value, (p * l).sum())
    q = torch.where(finite & legal, q, math.nan)
    return (
        torch.where(legal, torch.where(empty, 0, value), math.nan),
        torch.where(masked, 0, q),
        torch.where(legal, torch.where(empty, 0, dual), math.nan),
        state,
    )


def robust_risk(
    losses: Tensor,
    nominal: Tensor | None,
    groups: Tensor | None,
    group_weights: Tensor | None,
    *ambiguity: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of an `ambiguity.Encoded`: value (), weights (n,), dual () in at least float32, and new group
    weights (G,) float64."""
    value, q, dual, state = solve(losses, nominal, groups, group_weights, Encoded(*ambiguity))
    dtype = statistics_dtype(losses)
    return value.to(dtype), q.to(dtype), dual.to(dtype), state
