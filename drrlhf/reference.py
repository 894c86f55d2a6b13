"""Every op in plain PyTorch: the definition, the oracle of the tests, and the fallback.

Written to be checked by eye against the formulas of `drrlhf.ambiguity`: ordered sets are solved
by sorting and prefix sums, the two without a closed form by bisection. All of it is float64, free
of host synchronisation, and independent of the compiled backends, which search without sorting.

What callers give as ids (labels, groups, prompts, boundaries) may be anything at all. Where the
CPU does not refuse it first, a wrong one gives NaN, as it does in the kernels, and is never an
index: on a device an index that is out of range ends the process's context.

Notation: `l` losses (n,), `p` nominal weights (n,) with sum 1, `q` worst-case weights (n,).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from drrlhf.checks import check_value


def statistics_dtype(x: Tensor) -> torch.dtype:
    """The dtype of statistics about x: float64 for float64, float32 for everything narrower."""
    return torch.promote_types(x.dtype, torch.float32)


# --------------------------------------------------------------------------- the dual problem


_MASS_ROUNDING = 1e-14


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
    share = torch.where(mass_at - part < _MASS_ROUNDING, 1, part / mass_at)
    share = torch.where(part < _MASS_ROUNDING, 0, share)
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
    slack = (1 + 2 * r) * m0 - 1
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
    log_y = log_y[valid.to(torch.int8).argmax()]
    z = torch.minimum((l - anchor) / t + log_y, torch.full_like(l, -math.log(alpha)))
    q = p * torch.exp(z)
    return q / q.sum(), anchor - t * log_y, t * (q * z.clamp(min=-1e3)).sum()


def worst_case(
    l: Tensor, p: Tensor, kind: str, a: float, b: float, trim: float
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
        or (a == 0 and kind in ("kl_radius", "chi2_radius", "tv"))
        or (a == 1 and kind in ("cvar", "cvar_temperature"))
    ):  # the set holds p alone
        limits = {"erm": 0.0, "kl_radius": math.inf, "chi2_radius": -math.inf}
        q, dual = p, torch.full_like(top, limits[kind]) if kind in limits else bottom
    elif kind == "kl_radius":
        q, dual = _kl_radius(l, p, a, top, span)
        everything = a >= -torch.log(at_top.sum())
        q, dual = torch.where(everything, q_top, q), torch.where(everything, 0.0, dual)
    elif kind == "kl_temperature":
        anchor = top if a > 0 else bottom
        q, log_z = _exponential_weights((l - anchor) / a, p)
        return anchor + a * log_z, q, torch.full_like(top, a)
    elif kind == "tv":
        kept, dual = _upper_tail(l, p, 1 - a) if a < 1 else (torch.zeros_like(p), top)
        q = p * kept + a * q_top
    elif kind == "chi2_radius":
        q, dual = _chi_square_radius(l, p, a, top, span)
        everything = a >= (1 / at_top.sum() - 1) / 2
        q, dual = torch.where(everything, q_top, q), torch.where(everything, top, dual)
    elif kind == "chi2_penalty":
        q, dual, penalty = _chi_square_penalty(l, p, a, top, span)
    elif kind == "cvar":
        kept, dual = _upper_tail(l, p, a)
        q = p * kept / a
    elif kind == "cvar_temperature":
        q, log_z = _exponential_weights((l - top) / b, p)
        capped_q, capped_dual, capped_penalty = _cvar_temperature(l, p, a, b)
        capped_value = (capped_q * l).sum() - capped_penalty
        free = -log_z <= -math.log(a)  # the cap binds nowhere: KL(temperature=b)
        value = torch.where(free, top + b * log_z, capped_value)
        dual = torch.where(free, top + b * log_z, capped_dual)
        return value, torch.where(free, q, capped_q), dual
    else:
        raise AssertionError(f"unknown kind {kind!r}")
    # Equal losses leave every radius ball's adversary without a choice that pays: q = p.
    q = torch.where((top > bottom) | (p <= 0), q, p)
    penalty = torch.where(top > bottom, penalty, 0)
    return top + (q * (l - top)).sum() - penalty, q, dual


def _group_step(
    l: Tensor, p: Tensor, groups: Tensor, w: Tensor, step_size: float, update: float
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
    check_value(
        legal.all,
        lambda: (
            "nominal: expected finite weights >= 0 (0 masks a pair), got "
            f"{p[~legal][0].item()} at index {int((~legal).nonzero()[0])}; drop or clamp it"
        ),
        p,
    )
    p = torch.where(legal, p, math.nan)
    total = p.sum()
    return torch.where(total > 0, p / torch.where(total > 0, total, 1), 0 * total)


def check_groups(groups: Tensor | None, group_weights: Tensor | None) -> Tensor:
    """Which group ids are outside of [0, G); ValueError for the first of them on the CPU."""
    assert groups is not None and group_weights is not None, "Group needs groups and state"
    size = group_weights.numel()
    outside = (groups < 0) | (groups >= size)
    check_value(
        lambda: ~outside.any(),
        lambda: (
            f"groups: expected ids in [0, {size}) for Group(num_groups={size}), got "
            f"{int(groups[outside][0])} at index {int(outside.nonzero()[0])}; "
            f"raise num_groups or fix the column"
        ),
        groups,
    )
    return outside


def _solve(
    losses: Tensor,
    nominal: Tensor | None,
    groups: Tensor | None,
    group_weights: Tensor | None,
    kind: str,
    a: float,
    b: float,
    trim: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value (), weights (n,), dual () and new group weights (G,) of `losses` (n,), all float64."""
    p = normalised(nominal, losses.numel(), losses)
    masked = p == 0
    l = torch.where(masked, 0, losses.double())
    state = torch.zeros(0, dtype=torch.float64, device=l.device)
    legal = ~p.isnan().any()
    if kind == "group":
        outside = check_groups(groups, group_weights)
        legal = legal & ~outside.any()
        ids = torch.where(outside, 0, groups).long()  # type: ignore[arg-type]
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
        value, q, stepped = _group_step(safe, safe_p, ids, group_weights, a, b)  # type: ignore[arg-type]
        state = torch.where(finite & legal & ~empty, stepped, state)
        dual = torch.zeros_like(value)
    else:
        value, q, dual = worst_case(safe, safe_p, kind, a, b, trim)
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
    kind: str,
    a: float,
    b: float,
    trim: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Value (), weights (n,), dual () in at least float32, and new group weights (G,) float64."""
    value, q, dual, state = _solve(losses, nominal, groups, group_weights, kind, a, b, trim)
    dtype = statistics_dtype(losses)
    return value.to(dtype), q.to(dtype), dual.to(dtype), state


# --------------------------------------------------------------------------- per-pair losses

# The f-DPO reparameterisation leaves a term that cancels only in the difference of the two
# scores (arXiv 2309.16240), so losses that use either score alone have no f-divergence form.
DIFFERENCE_LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
LOSS_TYPES = (
    *DIFFERENCE_LOSSES,
    "nca_pair",
    "bco_pair",
    "sppo_hard",
    "apo_zero",
    "apo_down",
    "simpo",
)
LENGTH_LOSSES = ("ipo", "sigmoid_norm", "simpo")
SMOOTHED_LOSSES = ("sigmoid", "robust", "exo_pair")
F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


def alpha_exponent_limit(dtype: torch.dtype) -> float:
    """Largest exponent of the alpha-divergence score, as TRL 1.16 clamps it per input dtype."""
    return 11.0 if dtype == torch.float16 else 80.0


class PairOptions(NamedTuple):
    """What a per-pair loss is told besides its tensors; names as in `drrlhf.preference_loss`."""

    loss_type: str
    beta: float
    label_smoothing: float
    simpo_gamma: float
    discopop_tau: float
    f_divergence: str
    f_alpha: float
    exponent_limit: float


def divergence_score(u: Tensor, o: PairOptions) -> Tensor:
    """f'(exp(u)) up to a constant: the implicit reward of a log-ratio u (arXiv 2309.16240)."""
    if o.f_divergence == "forward_kl":
        return 1 - torch.exp(-u)
    if o.f_divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(u)
    if o.f_divergence == "alpha_divergence" and abs(o.f_alpha - 1) >= 1e-6:
        return (torch.exp(((o.f_alpha - 1) * u).clamp(max=o.exponent_limit)) - 1) / (o.f_alpha - 1)
    return u


def divergence_slope(u: Tensor, o: PairOptions) -> Tensor:
    """d divergence_score / d u."""
    if o.f_divergence == "forward_kl":
        return torch.exp(-u)
    if o.f_divergence == "js_divergence":
        return torch.sigmoid(-u)
    if o.f_divergence == "alpha_divergence" and abs(o.f_alpha - 1) >= 1e-6:
        x = (o.f_alpha - 1) * u
        return torch.where(x > o.exponent_limit, 0, torch.exp(x))
    return torch.ones_like(u)


def pair_losses(
    chosen: Tensor,
    rejected: Tensor,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    o: PairOptions,
) -> Tensor:
    """Per-pair losses (n,) of log-ratios `chosen`, `rejected` (n,); differentiable by autograd.

    A log-ratio is log pi(y|x) - log pi_ref(y|x), or log pi(y|x) itself for simpo.
    """
    loss_type, beta, eps = o.loss_type, o.beta, o.label_smoothing
    s_chosen = divergence_score(chosen, o)
    s_rejected = divergence_score(rejected, o)
    h = beta * (s_chosen - s_rejected)
    if loss_type in LENGTH_LOSSES:
        assert chosen_lengths is not None and rejected_lengths is not None
        n_chosen, n_rejected = chosen_lengths.clamp(min=1), rejected_lengths.clamp(min=1)
        mean_difference = s_chosen / n_chosen - s_rejected / n_rejected
    if loss_type == "sigmoid":  # DPO, arXiv 2305.18290; with eps > 0 cDPO
        return -(1 - eps) * F.logsigmoid(h) - eps * F.logsigmoid(-h)
    if loss_type == "hinge":  # SLiC, arXiv 2305.10425
        return torch.relu(1 - h)
    if loss_type == "ipo":  # arXiv 2310.12036 eq. 17, per token
        return (mean_difference - 1 / (2 * beta)) ** 2
    if loss_type == "exo_pair":  # arXiv 2402.00856 eq. 16
        win, lose = F.logsigmoid(h), F.logsigmoid(-h)
        return win.exp() * (win - math.log1p(-eps)) + lose.exp() * (lose - math.log(eps))
    if loss_type == "robust":  # rDPO, arXiv 2403.00409; may be negative
        return (eps * F.logsigmoid(-h) - (1 - eps) * F.logsigmoid(h)) / (1 - 2 * eps)
    if loss_type == "discopop":  # arXiv 2406.08414 eq. 5
        # exp(-h) gate as one exponential: apart, they overflow and underflow to inf * 0.
        gated = torch.exp(F.logsigmoid(h / o.discopop_tau) - h)
        return -F.logsigmoid(h) * torch.sigmoid(-h / o.discopop_tau) + gated
    if loss_type == "sigmoid_norm":  # DPO on per-token mean log-ratios
        return -F.logsigmoid(beta * mean_difference)
    if loss_type == "simpo":  # arXiv 2405.14734 eq. 6
        return -F.logsigmoid(beta * mean_difference - o.simpo_gamma)
    g_chosen, g_rejected = beta * chosen, beta * rejected
    if loss_type == "nca_pair":  # arXiv 2402.05369
        return (
            -F.logsigmoid(g_chosen)
            - 0.5 * F.logsigmoid(-g_chosen)
            - 0.5 * F.logsigmoid(-g_rejected)
        )
    if loss_type == "bco_pair":  # arXiv 2404.04656, without the running shift
        return -F.logsigmoid(g_chosen) - F.logsigmoid(-g_rejected)
    if loss_type == "sppo_hard":  # arXiv 2405.00675 with hard probabilities
        return (chosen - 0.5 / beta) ** 2 + (rejected + 0.5 / beta) ** 2
    if loss_type == "apo_zero":  # arXiv 2408.06266 eq. 7
        return torch.sigmoid(-g_chosen) + torch.sigmoid(g_rejected)
    if loss_type == "apo_down":  # arXiv 2408.06266 eq. 8
        return torch.sigmoid(g_chosen) + torch.sigmoid(g_rejected - g_chosen)
    raise AssertionError(f"unknown loss_type {loss_type!r}")


def pair_slopes(
    chosen: Tensor,
    rejected: Tensor,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    o: PairOptions,
) -> tuple[Tensor, Tensor]:
    """d pair_losses / d chosen and / d rejected (n,), in closed form.

    Ops run below autograd, so they need them spelled out; the tests hold them to autograd.
    """
    loss_type, beta, eps = o.loss_type, o.beta, o.label_smoothing
    sigmoid = torch.sigmoid
    g_chosen, g_rejected = beta * chosen, beta * rejected
    if loss_type == "nca_pair":
        return beta * (0.5 * sigmoid(g_chosen) - sigmoid(-g_chosen)), 0.5 * beta * sigmoid(
            g_rejected
        )
    if loss_type == "bco_pair":
        return -beta * sigmoid(-g_chosen), beta * sigmoid(g_rejected)
    if loss_type == "sppo_hard":
        return 2 * (chosen - 0.5 / beta), 2 * (rejected + 0.5 / beta)
    if loss_type == "apo_zero":
        fall = -beta * sigmoid(g_chosen) * sigmoid(-g_chosen)
        return fall, beta * sigmoid(g_rejected) * sigmoid(-g_rejected)
    if loss_type == "apo_down":
        d = g_rejected - g_chosen
        rise = beta * sigmoid(d) * sigmoid(-d)
        return beta * sigmoid(g_chosen) * sigmoid(-g_chosen) - rise, rise
    score = (
        divergence_score(chosen, o),
        divergence_score(rejected, o),
    )
    d_chosen = divergence_slope(chosen, o)
    d_rejected = divergence_slope(rejected, o)
    if loss_type in LENGTH_LOSSES:
        assert chosen_lengths is not None and rejected_lengths is not None
        n_chosen, n_rejected = chosen_lengths.clamp(min=1), rejected_lengths.clamp(min=1)
        mean_difference = score[0] / n_chosen - score[1] / n_rejected
        if loss_type == "ipo":
            slope = 2 * (mean_difference - 1 / (2 * beta))
        else:
            gamma = o.simpo_gamma if loss_type == "simpo" else 0.0
            slope = -beta * sigmoid(gamma - beta * mean_difference)
        return slope * d_chosen / n_chosen, -slope * d_rejected / n_rejected
    h = beta * (score[0] - score[1])
    if loss_type == "sigmoid":
        slope = eps * sigmoid(h) - (1 - eps) * sigmoid(-h)
    elif loss_type == "hinge":
        slope = -(h < 1).to(h.dtype)
    elif loss_type == "exo_pair":
        odds = (F.logsigmoid(h) - math.log1p(-eps)) - (F.logsigmoid(-h) - math.log(eps))
        slope = sigmoid(h) * sigmoid(-h) * odds
    elif loss_type == "robust":
        slope = -((1 - eps) * sigmoid(-h) + eps * sigmoid(h)) / (1 - 2 * eps)
    elif loss_type == "discopop":
        x = h / o.discopop_tau
        gated = torch.exp(F.logsigmoid(x) - h)
        gate_slope = sigmoid(-x) / o.discopop_tau
        slope = -sigmoid(-h) * sigmoid(-x) - gated
        slope = slope + (gated + F.logsigmoid(h) * sigmoid(x)) * gate_slope
    else:
        raise AssertionError(f"unknown loss_type {loss_type!r}")
    return beta * slope * d_chosen, -beta * slope * d_rejected


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None,
    ref_rejected_logps: Tensor | None,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    nominal: Tensor | None,
    groups: Tensor | None,
    group_weights: Tensor | None,
    loss_type: str,
    beta: float,
    label_smoothing: float,
    simpo_gamma: float,
    discopop_tau: float,
    f_divergence: str,
    f_alpha: float,
    kind: str,
    a: float,
    b: float,
    trim: float,
) -> tuple[Tensor, ...]:
    """value (), weights, losses, chosen_rewards, rejected_rewards (n,), dual (), group weights
    (G,), d value / d chosen_logps, d value / d rejected_logps (n,)."""
    chosen, rejected = chosen_logps.double(), rejected_logps.double()
    if ref_chosen_logps is not None and ref_rejected_logps is not None:
        chosen, rejected = (
            chosen - ref_chosen_logps.double(),
            rejected - ref_rejected_logps.double(),
        )
    options = PairOptions(
        loss_type, beta, label_smoothing, simpo_gamma, discopop_tau, f_divergence, f_alpha,
        alpha_exponent_limit(chosen_logps.dtype),
    )  # fmt: skip
    pairs = (chosen, rejected, chosen_lengths, rejected_lengths, options)
    losses = pair_losses(*pairs)
    d_chosen, d_rejected = pair_slopes(*pairs)
    value, q, dual, state = _solve(losses, nominal, groups, group_weights, kind, a, b, trim)
    dtype = statistics_dtype(chosen_logps)
    return (
        *(x.to(dtype) for x in (value, q, losses, beta * chosen, beta * rejected, dual)),
        state,
        torch.where(q == 0, 0, q * d_chosen).to(chosen_logps.dtype),
        torch.where(q == 0, 0, q * d_rejected).to(rejected_logps.dtype),
    )


def reward_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    margin: Tensor | None,
    nominal: Tensor | None,
    groups: Tensor | None,
    group_weights: Tensor | None,
    center_coefficient: float,
    kind: str,
    a: float,
    b: float,
    trim: float,
) -> tuple[Tensor, ...]:
    """Of losses -log sigmoid(r+ - r- - margin) + center (r+ + r-)^2: value (), weights, losses
    (n,), dual (), group weights (G,), d value / d chosen_rewards,
    d value / d rejected_rewards (n,)."""
    chosen, rejected = chosen_rewards.double(), rejected_rewards.double()
    difference = chosen - rejected if margin is None else chosen - rejected - margin.double()
    total = chosen + rejected
    losses = -F.logsigmoid(difference) + center_coefficient * total**2
    slope, pull = -torch.sigmoid(-difference), 2 * center_coefficient * total
    d_chosen, d_rejected = slope + pull, pull - slope
    value, q, dual, state = _solve(losses, nominal, groups, group_weights, kind, a, b, trim)
    dtype = statistics_dtype(chosen_rewards)
    return (
        *(x.to(dtype) for x in (value, q, losses, dual)),
        state,
        torch.where(q == 0, 0, q * d_chosen).to(chosen_rewards.dtype),
        torch.where(q == 0, 0, q * d_rejected).to(rejected_rewards.dtype),
    )


# --------------------------------------------------------------------------- token log-probs


def _scaled(logits: Tensor, temperature: float, softcap: float | None) -> Tensor:
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    return z if temperature == 1.0 else z / temperature


# Bits of `outputs`: which statistics of a token are wanted besides its log-prob.
ENTROPY, MEAN_LOGIT, IS_TOP1, LOG_SUM_SQ_PROBS = 1, 2, 4, 8


def _counted(labels: Tensor, ignore_index: int, vocabulary: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which labels count, and which of these are in [0, V) (...); and indices (..., 1) that are
    safe to gather at."""
    valid = labels != ignore_index
    known = valid & (labels >= 0) & (labels < vocabulary)
    return valid, known, torch.where(known, labels, 0).long().unsqueeze(-1)


def token_logprobs(
    logits: Tensor,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    outputs: int,
) -> tuple[Tensor, ...]:
    """Seven tensors (...) for logits (..., V): log softmax(z)[label] with
    z = softcap tanh(logits / softcap) / temperature; the log-sum-exp of z and what of it one number
    cannot hold (their sum is it, to the digits that the backward needs); and where `outputs` asks,
    else empty: entropy, mean of z, whether the label is the first maximum, log sum softmax(z)^2.

    Statistics in float32 (float64 for float64 logits), 0 where the label is ignored, NaN where it
    is outside of [0, V). Where the label has the largest logit the log-prob is
    -log1p(sum of the others), which keeps the digits of a confident model.
    """
    z = _scaled(logits.to(statistics_dtype(logits)), temperature, softcap)
    valid, known, index = _counted(labels, ignore_index, z.shape[-1])
    top = z.amax(-1, keepdim=True)
    true = z.gather(-1, index)
    e = torch.exp(z - top)
    others = e.scatter(-1, index, 0.0).sum(-1, keepdim=True)
    log_sum = torch.where(
        true == top, torch.log1p(others), torch.log(others + torch.exp(true - top))
    )
    logp = (true - top) - log_sum
    lse = top + log_sum
    found = [logp, lse, (top - lse) + log_sum]
    sums = [
        (
            ENTROPY,
            lambda: log_sum - torch.where(e > 0, e * (z - top), 0).sum(-1, True) / e.sum(-1, True),
        ),
        (MEAN_LOGIT, lambda: z.mean(-1, keepdim=True)),
        (IS_TOP1, lambda: z.argmax(-1, keepdim=True) == index),
        (
            LOG_SUM_SQ_PROBS,
            lambda: torch.log((e * e).sum(-1, True)) - 2 * torch.log(e.sum(-1, True)),
        ),
    ]
    blank = torch.where(valid, math.nan, 0).to(z.dtype)
    found = [torch.where(known, x.squeeze(-1), blank) for x in found]
    for bit, statistic in sums:
        flag = bit == IS_TOP1
        if outputs & bit:
            x = statistic().squeeze(-1)
            found.append(x & known if flag else torch.where(known, x, blank))
        else:
            found.append(z.new_empty(0, dtype=torch.bool if flag else z.dtype))
    return tuple(found)


def _logit_gradient(
    z: Tensor, labels: Tensor, grad: Tensor | None, grad_entropy: Tensor | None,
    logp: Tensor, lse: Tensor, lse_tail: Tensor, entropy: Tensor, ignore_index: int,
) -> Tensor:  # fmt: skip
    """d / dz of grad logp + grad_entropy entropy, (..., V)."""
    valid, _, index = _counted(labels, ignore_index, z.shape[-1])
    log_p = (z - lse.unsqueeze(-1)) - lse_tail.unsqueeze(-1)
    p = torch.exp(log_p)
    d = torch.zeros_like(z)
    if grad is not None:
        # The true class as -expm1(logp): 1 - p cancels exactly where tuned models live.
        d = (-p).scatter(-1, index, -torch.expm1(logp).unsqueeze(-1)) * grad.to(z.dtype).unsqueeze(
            -1
        )
    if grad_entropy is not None:
        # d entropy / dz_j = -p_j (log p_j + entropy)
        slope = torch.where(p > 0, p * (log_p + entropy.unsqueeze(-1)), 0)
        d = d - grad_entropy.to(z.dtype).unsqueeze(-1) * slope
    return torch.where(_asked_about(valid, grad, grad_entropy).unsqueeze(-1), d, 0)


def _asked_about(valid: Tensor, grad: Tensor | None, grad_entropy: Tensor | None) -> Tensor:
    """Counted tokens with an upstream gradient: nothing of the others matters, NaN or not."""
    asked = torch.zeros_like(valid)
    for g in (grad, grad_entropy):
        asked = asked if g is None else asked | (g != 0)
    return valid & asked


def token_logprobs_backward(
    logits: Tensor,
    labels: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    logp: Tensor,
    lse: Tensor,
    lse_tail: Tensor,
    entropy: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
) -> Tensor:
    """grad d logp / d logits + grad_entropy d entropy / d logits (..., V), in the logits' dtype."""
    x = logits.to(lse.dtype)
    z = _scaled(x, temperature, softcap)
    statistics = (logp, lse, lse_tail, entropy)
    d = _logit_gradient(z, labels, grad, grad_entropy, *statistics, ignore_index) / temperature
    if softcap is not None:
        d = d * (1 - torch.tanh(x / softcap) ** 2)
    return d.to(logits.dtype)


def token_logprobs_backward_(logits: Tensor, *rest) -> None:
    """`token_logprobs_backward` written over the logits."""
    logits.copy_(token_logprobs_backward(logits, *rest))


def linear_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, scale: float) -> Tensor:
    """(hidden weight^T + bias) scale, (..., V), accumulated and kept in float32: never rounded."""
    dtype = statistics_dtype(hidden)
    # An op's kernel is plain arithmetic: autocast around its call must not narrow the product.
    with torch.autocast(hidden.device.type, enabled=False):
        kind = None if bias is None else bias.to(dtype)
        logits = F.linear(hidden.to(dtype), weight.to(dtype), kind)
    return logits if scale == 1.0 else logits * scale


# What the forward of linear_token_logprobs keeps for its backward: nothing (it computes the logits
# again); d logp / d hidden (..., D); d logp / d logits of the counted tokens as (V, counted),
# packed at the front of (V, tokens); or that by rows, a row for each counted token at the front of
# (tokens, V rounded up to 16), where logp >= IMPROBABLE divided by
# -p[label] logit_scale / temperature, which can be written before the sum of the exponentials is
# known; or just that by rows, each in its token's place. The second is divided in bfloat16.
KEEP_NOTHING, KEEP_HIDDEN, KEEP_SLAB, KEEP_RATIOS, KEEP_ROWS = 0, 1, 2, 3, 4
IMPROBABLE = -31.0


def divides_by_label(logp: Tensor, dtype: torch.dtype) -> Tensor:
    """Which rows of KEEP_RATIOS are divided; float16 has no room for ratios of probabilities."""
    return (logp >= IMPROBABLE) & (dtype != torch.float16)


def _divisors(logp: Tensor, dtype: torch.dtype, temperature: float, logit_scale: float) -> Tensor:
    """What d logp / d logits (..., V) is divided by to become ratios, (..., 1)."""
    by = -torch.exp(logp) * (logit_scale / temperature)
    return torch.where(divides_by_label(logp, dtype), by, 1).unsqueeze(-1)


def ratios_width(vocabulary: int) -> int:
    """Columns of KEEP_RATIOS and KEEP_ROWS: rows begin on whole groups of 16 entries."""
    return (vocabulary + 15) // 16 * 16


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    outputs: int,
    keep: int,
    workspace: int,
) -> tuple[Tensor, ...]:
    """`token_logprobs` of `linear_logits` for hidden (..., D), and what `keep` asks to be kept."""
    logits = linear_logits(hidden, weight, bias, logit_scale)
    found = token_logprobs(logits, labels, ignore_index, temperature, softcap, outputs)
    kept = hidden.new_empty(0)
    if keep != KEEP_NOTHING:
        one = torch.ones_like(found[0])
        d = token_logprobs_backward(
            logits, labels, one, None, found[0], found[1], found[2], found[3], ignore_index,
            temperature, softcap,
        )  # fmt: skip
        d = d * logit_scale
        if keep == KEEP_HIDDEN:
            with torch.autocast(hidden.device.type, enabled=False):
                kept = (d @ weight.to(d.dtype)).to(hidden.dtype)
        elif keep == KEEP_SLAB:
            if hidden.dtype == torch.bfloat16:
                d = d / _divisors(found[0], hidden.dtype, temperature, logit_scale)
            rows = d[labels != ignore_index].T.reshape(-1).to(hidden.dtype)
            kept = hidden.new_zeros(weight.shape[0], labels.numel())
            kept.view(-1)[: rows.numel()] = rows
        elif keep == KEEP_ROWS:
            rows = torch.where((labels != ignore_index).unsqueeze(-1), d, 0).flatten(0, -2)
            kept = hidden.new_zeros(labels.numel(), ratios_width(weight.shape[0]))
            kept[:, : rows.shape[1]] = rows
        else:
            by = _divisors(found[0], hidden.dtype, temperature, logit_scale)
            rows = (d / by)[labels != ignore_index]
            kept = hidden.new_zeros(labels.numel(), ratios_width(weight.shape[0]))
            kept[: rows.shape[0], : rows.shape[1]] = rows
    return (*found, kept)


def linear_token_logprobs_backward(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor,
    grad: Tensor | None,
    grad_entropy: Tensor | None,
    logp: Tensor,
    lse: Tensor,
    lse_tail: Tensor,
    entropy: Tensor,
    kept: Tensor,
    ignore_index: int,
    temperature: float,
    softcap: float | None,
    logit_scale: float,
    keep: int,
    workspace: int,
    need_hidden: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of hidden (..., D), weight (V, D) and bias (V,), empty where not needed.

    Always from the logits, computed again: what was kept serves the fast backends alone.
    """
    logits = linear_logits(hidden, weight, bias, logit_scale)
    statistics = (logp, lse, lse_tail, entropy)
    d = token_logprobs_backward(
        logits, labels, grad, grad_entropy, *statistics, ignore_index, temperature, softcap
    )
    d = (d * logit_scale).reshape(-1, weight.shape[0])
    counted = _asked_about(labels != ignore_index, grad, grad_entropy).reshape(-1, 1)
    rows = torch.where(counted, hidden.reshape(-1, hidden.shape[-1]).to(d.dtype), 0)
    like_bias = weight if bias is None else bias
    with torch.autocast(hidden.device.type, enabled=False):
        return (
            (d @ weight.to(d.dtype)).view(hidden.shape).to(hidden.dtype)
            if need_hidden
            else hidden.new_empty(0),
            (d.T @ rows).to(weight.dtype) if need_weight else weight.new_empty(0),
            d.sum(0).to(like_bias.dtype) if need_bias else like_bias.new_empty(0),
        )


# --------------------------------------------------------------------------- sequences


class _Segments:
    """Which sequence each token belongs to: rows of padded tokens (B, L), or parts of packed (T,).

    Packed boundaries that do not run from 0 to T, or that decrease, are none: every sum is then
    NaN, and no token is looked for outside of the sequences.
    """

    def __init__(self, tokens: Tensor, cu_seqlens: Tensor | None) -> None:
        device = tokens.device
        self.legal: Tensor | None = None
        if cu_seqlens is None:
            self.count = tokens.shape[0]
            rows = torch.arange(self.count, device=device)
            self.of = rows.unsqueeze(1).expand(tokens.shape)
            return
        self.count = len(cu_seqlens) - 1
        place = torch.arange(tokens.numel(), device=device, dtype=cu_seqlens.dtype)
        # Tokens behind the last boundary get a sequence of their own, which nobody asks for.
        self.of = torch.searchsorted(cu_seqlens[1:].contiguous(), place, right=True)
        self.legal = (cu_seqlens[0] == 0) & (cu_seqlens[-1] == tokens.numel())
        self.legal = self.legal & (cu_seqlens[1:] >= cu_seqlens[:-1]).all()

    def sums(self, x: Tensor) -> Tensor:
        """Sums (S,) of a number by token."""
        found = x.new_zeros(self.count + 1).index_add(0, self.of.reshape(-1), x.reshape(-1))
        found = found[: self.count]
        return found if self.legal is None else torch.where(self.legal, found, math.nan)

    def spread(self, x: Tensor) -> Tensor:
        """To each token what x (S,) says of its sequence."""
        return torch.cat([x, x.new_zeros(1)])[self.of]


def _token_counts(labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int) -> Tensor:
    """Counted tokens by sequence (S,), in float64."""
    return _Segments(labels, cu_seqlens).sums((labels != ignore_index).double())


def sequence_logprobs(
    logps: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, mean: bool
) -> Tensor:
    """Sums or means (S,) over the counted tokens of padded (B, L) rows, or packed (T,) segments."""
    kept = torch.where(labels != ignore_index, logps, 0).double()
    total = _Segments(labels, cu_seqlens).sums(kept)
    if mean:
        total = total / _token_counts(labels, cu_seqlens, ignore_index).clamp(min=1)
    return total.to(statistics_dtype(logps))


def sequence_logprobs_backward(
    grad: Tensor, labels: Tensor, cu_seqlens: Tensor | None, ignore_index: int, mean: bool
) -> Tensor:
    """The gradient (S,) of every sequence at each of its counted tokens; 0 elsewhere."""
    if mean:
        counts = _token_counts(labels, cu_seqlens, ignore_index).clamp(min=1)
        grad = grad / counts.to(grad.dtype)
    return torch.where(labels != ignore_index, _Segments(labels, cu_seqlens).spread(grad), 0)


def sequence_preference_loss(
    logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    nominal: Tensor | None,
    groups: Tensor | None,
    group_weights: Tensor | None,
    ignore_index: int,
    *options,
) -> tuple[Tensor, ...]:
    """`preference_loss` of the sums of token log-probs, sequences stacked [chosen…, rejected…].

    Returns value (), weights, losses, chosen_rewards, rejected_rewards (n,), dual (), group weights
    (G,), sequence log-probs (2n,), and d value / d sequence log-probs (2n,).
    """
    sums = sequence_logprobs(logps.double(), labels, cu_seqlens, ignore_index, False)
    lengths = _token_counts(labels, cu_seqlens, ignore_index)
    n = sums.numel() // 2
    ref_chosen = ref_rejected = None
    if ref_logps is not None:
        ref_chosen, ref_rejected = ref_logps[:n].double(), ref_logps[n:].double()
    *found, d_chosen, d_rejected = preference_loss(
        sums[:n], sums[n:], ref_chosen, ref_rejected, lengths[:n], lengths[n:],
        nominal, groups, group_weights, *options,
    )  # fmt: skip
    dtype = statistics_dtype(logps)
    state = found.pop()
    d = torch.cat([d_chosen, d_rejected])
    return (*(x.to(dtype) for x in found), state, sums.to(dtype), d.to(dtype))


# --------------------------------------------------------------------------- policy optimisation

POLICY_LOSS_TYPES = ("grpo", "bnpo", "dr_grpo", "dapo")
IMPORTANCE_LEVELS = ("token", "sequence")
# exp of more is not a ratio to learn from: in float32 its square would overflow the optimizer's
# second moment. Larger exponents are clamped, without gradient, and counted.
EXPONENT_LIMIT = 40.0
# Rows of the per-sequence table that `policy_loss` returns: sums over the counted tokens.
TOKENS, SURROGATE, K3, RATIO, LOW_CLIPPED, HIGH_CLIPPED, OVERFLOWED, ENTROPY_SUM = range(8)


class PolicyOptions(NamedTuple):
    """What the clipped surrogate is told besides its tensors; names as in `drrlhf.policy_loss`."""

    loss_type: str
    importance_level: str
    clip_low: float
    clip_high: float
    kl_beta: float
    correct_kl: bool
    max_completion_length: float


def _bounded_exponent(x: Tensor) -> tuple[Tensor, Tensor]:
    """x, at most EXPONENT_LIMIT, and where it was more."""
    return x.clamp(max=EXPONENT_LIMIT), x > EXPONENT_LIMIT


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, o: PolicyOptions
) -> tuple[Tensor, ...]:
    """-min(r A, clip(r) A), its derivative by log r, r, and where r was clipped low, clipped high,
    and clamped; r = exp(log_ratio), all of one shape."""
    low, high = 1 - o.clip_low, 1 + o.clip_high
    exponent, overflowed = _bounded_exponent(log_ratio)
    ratio = torch.exp(exponent)
    loss = -torch.minimum(ratio * advantages, ratio.clamp(low, high) * advantages)
    low_clipped = (ratio < low) & (advantages < 0)
    high_clipped = (ratio > high) & (advantages > 0)
    slope = torch.where(low_clipped | high_clipped | overflowed, 0, -advantages * ratio)
    return loss, slope, ratio, low_clipped, high_clipped, overflowed


def k3(logps: Tensor, ref_logps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(d) - d - 1 with d = ref_logps - logps, its derivative by logps, and where d was clamped
    (http://joschu.net/blog/kl-approx.html)."""
    d, overflowed = _bounded_exponent(ref_logps - logps)
    return torch.expm1(d) - d, torch.where(overflowed, 0, -torch.expm1(d)), overflowed


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    entropy: Tensor | None,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    advantages: Tensor,
    rewards: Tensor,
    prompt_ids: Tensor,
    sequence_weights: Tensor | None,
    nominal: Tensor | None,
    groups: Tensor | None,
    group_weights: Tensor | None,
    num_prompts: int,
    loss_type: str,
    importance_level: str,
    clip_low: float,
    clip_high: float,
    kl_beta: float,
    correct_kl: bool,
    max_completion_length: float,
    kind: str,
    a: float,
    b: float,
    trim: float,
) -> tuple[Tensor, ...]:
    """Of S sequences of m prompts: loss (), weights q and losses -V (m,), risk (), dual (), group
    weights (G,), coefficients (S,), slopes (as logps) and the table of sequences (8, S).

    loss = sum_s coefficient_s L_s, where L_s sums -min(r A, clip(r) A) + kl_beta k3 (times r
    where correct_kl) over the counted tokens, and coefficient_s = m q_(prompt of s) a_s with
    a_s = 1 / (S tokens_s) for grpo, 1 / all tokens for bnpo and dapo, and
    1 / (S max_completion_length) for dr_grpo; times sequence_weights. d loss / d logp =
    coefficient_s slope. Masked prompts (nominal 0) do not count in m, S and the tokens.
    """
    o = PolicyOptions(
        loss_type, importance_level, clip_low, clip_high, kl_beta, correct_kl,
        max_completion_length,
    )  # fmt: skip
    segments = _Segments(logps, cu_seqlens)
    check_prompt_ids(prompt_ids, num_prompts)
    counted = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask != 0

    def sums(x: Tensor) -> Tensor:
        return segments.sums(torch.where(counted, x, 0).double())

    tokens = sums(counted)
    x = logps.double()
    log_ratio = torch.zeros_like(x) if old_logps is None else x - old_logps.double()
    if importance_level == "sequence":
        log_ratio = segments.spread(sums(log_ratio) / tokens.clamp(min=1))
    surrogate, slopes, ratio, low_clipped, high_clipped, overflowed = clipped_surrogate(
        log_ratio, segments.spread(advantages.double()), o
    )
    divergence = torch.zeros_like(x)
    if ref_logps is not None:
        divergence, slope, beyond = k3(x, ref_logps.double())
        if correct_kl:
            divergence, slope = ratio * divergence, ratio * slope
            by_ratio = divergence
            if importance_level == "sequence":
                by_ratio = segments.spread(sums(divergence) / tokens.clamp(min=1))
            slope = slope + torch.where(overflowed, 0, by_ratio)
        slopes, overflowed = slopes + kl_beta * slope, overflowed | beyond
    rows = [surrogate, divergence, ratio, low_clipped, high_clipped, overflowed]
    rows.append(torch.zeros_like(x) if entropy is None else entropy)
    table = torch.stack([tokens, *(sums(row) for row in rows)])

    prompts = Prompts(prompt_ids, num_prompts)
    losses = -prompts.sums(rewards.double()) / prompts.sums(torch.ones_like(tokens))
    risk, q, dual, state = _solve(losses, nominal, groups, group_weights, kind, a, b, trim)
    present = torch.ones_like(q, dtype=torch.bool) if nominal is None else nominal != 0
    held = prompts.spread(present, False)
    # A prompt that there is not has no weight to give.
    weight = prompts.spread(q * present.sum(), math.nan)
    if loss_type == "grpo":
        share = 1 / (tokens.clamp(min=1) * held.sum())
    elif loss_type == "dr_grpo":
        share = 1 / (max_completion_length * held.sum().double()).expand(tokens.shape)
    else:
        share = 1 / torch.where(held, tokens, 0).sum().clamp(min=1).expand(tokens.shape)
    if sequence_weights is not None:
        weight = weight * sequence_weights.double()
    coefficients = torch.where(weight == 0, 0, weight * share)
    total = table[SURROGATE] + kl_beta * table[K3]
    loss = torch.where(coefficients == 0, 0, coefficients * total).sum()
    dtype = statistics_dtype(logps)
    return (
        *(y.to(dtype) for y in (loss, q, losses, risk, dual)), state, coefficients.to(dtype),
        torch.where(counted, slopes, 0).to(dtype), table.to(dtype),
    )  # fmt: skip


def policy_loss_backward(
    grad: Tensor, slopes: Tensor, coefficients: Tensor, cu_seqlens: Tensor | None
) -> Tensor:
    """grad coefficient slope (as slopes): exactly 0 where the sequence's coefficient is 0."""
    factor = _Segments(slopes, cu_seqlens).spread(grad * coefficients)
    return torch.where(factor == 0, 0, factor * slopes)


class Prompts:
    """Which of m prompts each sequence belongs to; an id outside of [0, m) is of none."""

    def __init__(self, prompt_ids: Tensor, num_prompts: int) -> None:
        self.count = num_prompts
        outside = (prompt_ids < 0) | (prompt_ids >= num_prompts)
        self.of = torch.where(outside, num_prompts, prompt_ids.long())

    def sums(self, x: Tensor) -> Tensor:
        """Sums (m,) of a number by sequence."""
        return x.new_zeros(self.count + 1).index_add(0, self.of, x)[: self.count]

    def spread(self, x: Tensor, nobody: float) -> Tensor:
        """To each sequence what x (m,) says of its prompt, or `nobody`."""
        return torch.cat([x, x.new_full((1,), nobody)])[self.of]


def check_prompt_ids(prompt_ids: Tensor, num_prompts: int, wanted: bool = False) -> None:
    """ValueError unless every prompt of 0 ... num_prompts - 1 has a sequence, and no other has."""

    def outside() -> Tensor:
        return (prompt_ids < 0) | (prompt_ids >= num_prompts)

    def missing() -> Tensor:
        return Prompts(prompt_ids, num_prompts).sums(torch.ones_like(prompt_ids)) == 0

    check_value(
        lambda: ~outside().any(),
        lambda: (
            f"prompt_ids: expected ids in [0, {num_prompts}), got "
            f"{int(prompt_ids[outside()][0])} at index {int(outside().nonzero()[0])}; number the "
            "prompts from 0 or raise num_prompts"
        ),
        prompt_ids,
        wanted,
    )
    check_value(
        lambda: ~missing().any(),
        lambda: (
            f"prompt_ids: expected every prompt of 0 to {num_prompts - 1}, got none of prompt "
            f"{int(missing().nonzero()[0])}; number the prompts without gaps"
        ),
        prompt_ids,
        wanted,
    )
