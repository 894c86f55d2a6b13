"""Per-pair preference losses with their derivatives by the two log-ratios, in float64.

Formulas and sources: `drrlhf.reference.pair_losses`.
"""

from __future__ import annotations

import triton
import triton.language as tl
from drrlhf.kernels.numerics import expm1, log1p, sigmoid, softplus

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def divergence_score(u, alpha, limit, DIVERGENCE: tl.constexpr):
    """f'(exp(u)) up to a constant, and its derivative by u."""
    value, slope = u, u * 0 + 1
    if DIVERGENCE == "forward_kl":
        slope = tl.exp(-u)
        value = 1 - slope
    elif DIVERGENCE == "js_divergence":
        value, slope = LN2 - softplus(-u), sigmoid(-u)
    elif DIVERGENCE == "alpha_divergence":
        k = alpha - 1
        flat = tl.abs(k) < 1e-6
        x = k * u
        cut = x > limit
        curved = expm1(tl.where(cut, limit, x)) / tl.where(flat, 1.0, k)
        value = tl.where(flat, u, curved)
        slope = tl.where(flat, 1.0, tl.where(cut, 0.0, tl.exp(x)))
    return value, slope


@triton.jit
def pair_loss(
    chosen, rejected, chosen_length, rejected_length, beta, eps, gamma, tau, alpha, limit,
    LOSS: tl.constexpr, DIVERGENCE: tl.constexpr,
):  # fmt: skip
    """Loss, d loss / d chosen, d loss / d rejected of log-ratios (log-probs for simpo)."""
    if LOSS == "nca_pair":
        gc, gr = beta * chosen, beta * rejected
        loss = softplus(-gc) + 0.5 * softplus(gc) + 0.5 * softplus(gr)
        d_chosen = beta * (0.5 * sigmoid(gc) - sigmoid(-gc))
        d_rejected = beta * 0.5 * sigmoid(gr)
    elif LOSS == "bco_pair":
        gc, gr = beta * chosen, beta * rejected
        loss = softplus(-gc) + softplus(gr)
        d_chosen, d_rejected = -beta * sigmoid(-gc), beta * sigmoid(gr)
    elif LOSS == "sppo_hard":
        win, lose = chosen - 0.5 / beta, rejected + 0.5 / beta
        loss = win * win + lose * lose
        d_chosen, d_rejected = 2 * win, 2 * lose
    elif LOSS == "apo_zero":
        gc, gr = beta * chosen, beta * rejected
        pc, pr = sigmoid(-gc), sigmoid(gr)
        loss = pc + pr
        d_chosen, d_rejected = -beta * pc * sigmoid(gc), beta * pr * sigmoid(-gr)
    elif LOSS == "apo_down":
        gc, gd = beta * chosen, beta * (rejected - chosen)
        pc, pd = sigmoid(gc), sigmoid(gd)
        loss = pc + pd
        d_rejected = beta * pd * sigmoid(-gd)
        d_chosen = beta * pc * sigmoid(-gc) - d_rejected
    else:
        sc, slope_c = divergence_score(chosen, alpha, limit, DIVERGENCE)
        sr, slope_r = divergence_score(rejected, alpha, limit, DIVERGENCE)
        if LOSS == "ipo" or LOSS == "sigmoid_norm" or LOSS == "simpo":
            lc = tl.where(chosen_length < 1, 1.0, chosen_length)
            lr = tl.where(rejected_length < 1, 1.0, rejected_length)
            mean = sc / lc - sr / lr
            if LOSS == "ipo":
                miss = mean - 1 / (2 * beta)
                loss, slope = miss * miss, 2 * miss
            else:
                x = beta * mean
                if LOSS == "simpo":
                    x -= gamma
                loss, slope = softplus(-x), -beta * sigmoid(-x)
            d_chosen, d_rejected = slope * slope_c / lc, -slope * slope_r / lr
        else:
            h = beta * (sc - sr)
            if LOSS == "sigmoid":
                loss = (1 - eps) * softplus(-h) + eps * softplus(h)
                slope = eps * sigmoid(h) - (1 - eps) * sigmoid(-h)
            elif LOSS == "hinge":
                loss = tl.where(h < 1, 1 - h, tl.where(h == h, 0.0, h))
                slope = tl.where(h < 1, -1.0, 0.0)
            elif LOSS == "exo_pair":
                win, lose = -softplus(-h), -softplus(h)
                pw, pl = sigmoid(h), sigmoid(-h)
                over, under = win - log1p(-eps), lose - tl.log(eps)
                loss = pw * over + pl * under
                slope = pw * pl * (over - under)
            elif LOSS == "robust":
                loss = ((1 - eps) * softplus(-h) - eps * softplus(h)) / (1 - 2 * eps)
                slope = -((1 - eps) * sigmoid(-h) + eps * sigmoid(h)) / (1 - 2 * eps)
            else:
                tl.static_assert(LOSS == "discopop", "unknown loss_type")
                # exp(-h) gate as one exponential: apart, they overflow and underflow to inf * 0.
                x = h / tau
                gate, off = sigmoid(x), sigmoid(-x)
                gated = tl.exp(-h - softplus(-x))
                loss = softplus(-h) * off + gated
                slope = -sigmoid(-h) * off - gated + (gated - softplus(-h) * gate) * off / tau
            d_chosen, d_rejected = slope * beta * slope_c, -slope * beta * slope_r
    return loss, d_chosen, d_rejected


@triton.jit
def reward_pair_loss(chosen, rejected, margin, center):
    """-log sigmoid(r+ - r- - margin) + center (r+ + r-)^2, and its two derivatives."""
    x, total = chosen - rejected - margin, chosen + rejected
    slope, pull = -sigmoid(-x), 2 * center * total
    return softplus(-x) + center * total * total, slope + pull, -slope + pull
