"""Token log-probs to the clipped policy surrogate of each sequence, and its gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from drrlhf.conventions import EXPONENT_LIMIT, SequenceStatistics, statistics_dtype
from drrlhf.reference.sequence_logprobs import Segments


def _bounded_exponent(x: Tensor) -> tuple[Tensor, Tensor]:
    """x, at most EXPONENT_LIMIT, and where it was more."""
    return x.clamp(max=EXPONENT_LIMIT), x > EXPONENT_LIMIT


def clipped_surrogate(
    log_ratio: Tensor, advantages: Tensor, clip_low: float, clip_high: float
) -> tuple[Tensor, ...]:
    """-min(r A, clip(r) A), its derivative by log r, r, and where r was clipped low, clipped high,
    and clamped; r = exp(log_ratio), all of one shape."""
    low, high = 1 - clip_low, 1 + clip_high
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
    by_sequence: bool,
    clip_low: float,
    clip_high: float,
    kl_beta: float,
    correct_kl: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of S sequences: losses (S,) float64, slopes (as logps) and the table (8, S), whose rows are
    those of `SequenceStatistics`.

    loss_s sums -min(r A, clip(r) A) + kl_beta k3 (times r where correct_kl) over the counted tokens
    of s; r is the geometric mean of the sequence's ratios if by_sequence. At kl_beta 0 there is no
    k3 in it, infinite or not; the table has it.
    d loss_s / d logp = slope.
    """
    segments = Segments(logps, cu_seqlens)
    counted = torch.ones_like(logps, dtype=torch.bool) if mask is None else mask != 0

    def sums(x: Tensor) -> Tensor:
        return segments.sums(torch.where(counted, x, 0).double())

    tokens = sums(counted)
    x = logps.double()
    log_ratio = torch.zeros_like(x) if old_logps is None else x - old_logps.double()
    if by_sequence:
        log_ratio = segments.spread(sums(log_ratio) / tokens.clamp(min=1))
    surrogate, slopes, ratio, low_clipped, high_clipped, overflowed = clipped_surrogate(
        log_ratio, segments.spread(advantages.double()), clip_low, clip_high
    )
    divergence = torch.zeros_like(x)
    if ref_logps is not None:
        divergence, slope, beyond = k3(x, ref_logps.double())
        if correct_kl:
            divergence, slope = ratio * divergence, ratio * slope
            by_ratio = divergence
            if by_sequence:
                by_ratio = segments.spread(sums(divergence) / tokens.clamp(min=1))
            slope = slope + torch.where(overflowed, 0, by_ratio)
        overflowed = overflowed | beyond
        if kl_beta:  # not 0 times infinity where nobody asked for the divergence
            slopes = slopes + kl_beta * slope
    found = SequenceStatistics(
        tokens,
        sums(surrogate),
        sums(divergence),
        sums(ratio),
        sums(low_clipped),
        sums(high_clipped),
        sums(overflowed),
        torch.zeros_like(tokens) if entropy is None else sums(entropy),
    )
    dtype = statistics_dtype(logps)
    losses = found.surrogate + kl_beta * found.kl if kl_beta else found.surrogate
    return losses, torch.where(counted, slopes, 0).to(dtype), torch.stack(found).to(dtype)


def policy_loss_backward(grad: Tensor, slopes: Tensor, cu_seqlens: Tensor | None) -> Tensor:
    """grad (S,) times slope (as slopes): exactly 0 where a sequence's gradient is 0."""
    factor = Segments(slopes, cu_seqlens).spread(grad.to(slopes.dtype))
    return torch.where(factor == 0, 0, factor * slopes)
