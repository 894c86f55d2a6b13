"""`preference_loss`: log-probs to per-pair losses, worst-case weights and gradients.

One launch of one program up to `ONE_PROGRAM` pairs; above, many programs make the per-pair losses
first.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from drrlhf.kernels.dual_search import solve
from drrlhf.kernels.launch import DEBUG, numbers, on
from drrlhf.kernels.numerics import number, put
from drrlhf.kernels.pair_losses import pair_loss
from drrlhf.kernels.robust_risk import adversary, unchanged
from torch import Tensor

from drrlhf.reference import alpha_exponent_limit, statistics_dtype

ONE_PROGRAM = 8192  # pairs
SCRATCH = 6  # rows: the search's four, and the two derivatives of each loss


@triton.jit
def log_ratio(logps_ptr, ref_ptr, o, n, REFERENCE: tl.constexpr):
    """log pi - log pi_ref of some sequences in float64, or log pi where there is no reference."""
    u = tl.load(logps_ptr + o, mask=o < n, other=0.0).to(tl.float64)
    if REFERENCE:
        u -= tl.load(ref_ptr + o, mask=o < n, other=0.0).to(tl.float64)
    return u


@triton.jit
def pair_losses_block(
    chosen_ptr, rejected_ptr, ref_chosen_ptr, ref_rejected_ptr, chosen_lengths_ptr,
    rejected_lengths_ptr, scratch_ptr, losses_ptr, chosen_rewards_ptr, rejected_rewards_ptr,
    o, n, parameters,
    LOSS: tl.constexpr, DIVERGENCE: tl.constexpr, REFERENCE: tl.constexpr, LENGTHS: tl.constexpr,
):  # fmt: skip
    """Losses, rewards, and derivatives into the scratch, of the pairs o."""
    chosen = log_ratio(chosen_ptr, ref_chosen_ptr, o, n, REFERENCE)
    rejected = log_ratio(rejected_ptr, ref_rejected_ptr, o, n, REFERENCE)
    lc, lr = chosen, rejected  # not used where the loss has no lengths
    if LENGTHS:
        lc = tl.load(chosen_lengths_ptr + o, mask=o < n, other=1).to(tl.float64)
        lr = tl.load(rejected_lengths_ptr + o, mask=o < n, other=1).to(tl.float64)
    beta = number(parameters, 3)
    loss, d_chosen, d_rejected = pair_loss(
        chosen, rejected, lc, lr, beta, number(parameters, 4), number(parameters, 5),
        number(parameters, 6), number(parameters, 7), number(parameters, 8), LOSS, DIVERGENCE,
    )  # fmt: skip
    put(losses_ptr + o, loss, o < n)
    put(chosen_rewards_ptr + o, beta * chosen, o < n)
    put(rejected_rewards_ptr + o, beta * rejected, o < n)
    tl.store(scratch_ptr + o, loss, mask=o < n)
    tl.store(scratch_ptr + 4 * n + o, d_chosen, mask=o < n)
    tl.store(scratch_ptr + 5 * n + o, d_rejected, mask=o < n)


@triton.jit
def pair_losses_kernel(
    chosen_ptr, rejected_ptr, ref_chosen_ptr, ref_rejected_ptr, chosen_lengths_ptr,
    rejected_lengths_ptr, scratch_ptr, losses_ptr, chosen_rewards_ptr, rejected_rewards_ptr,
    n, parameters,
    LOSS: tl.constexpr, DIVERGENCE: tl.constexpr, REFERENCE: tl.constexpr, LENGTHS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """The first of two launches: one block of pairs for each program."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    pair_losses_block(
        chosen_ptr, rejected_ptr, ref_chosen_ptr, ref_rejected_ptr, chosen_lengths_ptr,
        rejected_lengths_ptr, scratch_ptr, losses_ptr, chosen_rewards_ptr, rejected_rewards_ptr,
        o, n, parameters, LOSS, DIVERGENCE, REFERENCE, LENGTHS,
    )  # fmt: skip


@triton.jit
def weigh(scratch_ptr, weights_ptr, d_chosen_ptr, d_rejected_ptr, n, BLOCK: tl.constexpr):
    """Weights and weighted derivatives, from the scratch to where they belong."""
    for first in range(0, n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        q = tl.load(scratch_ptr + 3 * n + o, mask=o < n, other=0.0)
        put(weights_ptr + o, q, o < n)
        # A masked pair gets none, whatever its derivative is.
        d_chosen = q * tl.load(scratch_ptr + 4 * n + o, mask=o < n, other=0.0)
        d_rejected = q * tl.load(scratch_ptr + 5 * n + o, mask=o < n, other=0.0)
        d_chosen, d_rejected = tl.where(q == 0, 0.0, d_chosen), tl.where(q == 0, 0.0, d_rejected)
        put(d_chosen_ptr + o, d_chosen, o < n)
        put(d_rejected_ptr + o, d_rejected, o < n)


@triton.jit(debug=DEBUG)
def preference_loss_kernel(
    chosen_ptr, rejected_ptr, ref_chosen_ptr, ref_rejected_ptr, chosen_lengths_ptr,
    rejected_lengths_ptr, nominal_ptr, groups_ptr, before_ptr, after_ptr, scratch_ptr, masses_ptr,
    value_ptr, weights_ptr, losses_ptr, chosen_rewards_ptr, rejected_rewards_ptr, dual_ptr,
    d_chosen_ptr, d_rejected_ptr, n, size, parameters,
    LOSS: tl.constexpr, DIVERGENCE: tl.constexpr, REFERENCE: tl.constexpr, LENGTHS: tl.constexpr,
    WITH_LOSSES: tl.constexpr, KIND: tl.constexpr, NOMINAL: tl.constexpr, TRIMS: tl.constexpr,
    WEIGHTED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    if WITH_LOSSES:
        for first in range(0, n, BLOCK):
            pair_losses_block(
                chosen_ptr, rejected_ptr, ref_chosen_ptr, ref_rejected_ptr, chosen_lengths_ptr,
                rejected_lengths_ptr, scratch_ptr, losses_ptr, chosen_rewards_ptr,
                rejected_rewards_ptr, first + tl.arange(0, BLOCK), n, parameters,
                LOSS, DIVERGENCE, REFERENCE, LENGTHS,
            )  # fmt: skip
        tl.debug_barrier()
    value, dual = solve(
        scratch_ptr, nominal_ptr, groups_ptr, before_ptr, after_ptr, masses_ptr, n, size,
        number(parameters, 0), number(parameters, 1), number(parameters, 2),
        KIND, NOMINAL, TRIMS, WEIGHTED, SIZE, BLOCK, DEBUG,
    )  # fmt: skip
    put(value_ptr, value)
    put(dual_ptr, dual)
    weigh(scratch_ptr, weights_ptr, d_chosen_ptr, d_rejected_ptr, n, BLOCK)


class PairOptions(NamedTuple):
    """The options of a per-pair loss, in the order of the op."""

    loss_type: str
    beta: float
    label_smoothing: float
    simpo_gamma: float
    discopop_tau: float
    f_divergence: str
    f_alpha: float

    def numbers(self, *adversary: float, limit: float) -> tuple[tuple[float, float], ...]:
        """The kernels' `parameters`: a, b and trim of the adversary, then those of the loss."""
        return numbers(
            *adversary, self.beta, self.label_smoothing, self.simpo_gamma, self.discopop_tau,
            self.f_alpha, limit,
        )  # fmt: skip

    def flags(self, reference: bool, lengths: bool) -> dict[str, Any]:
        return {
            "LOSS": self.loss_type, "DIVERGENCE": self.f_divergence, "REFERENCE": reference,
            "LENGTHS": lengths,
        }  # fmt: skip


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
    """As `drrlhf.reference.preference_loss`; what it refuses by value gives NaN."""
    n, dtype = chosen_logps.numel(), statistics_dtype(chosen_logps)
    make = chosen_logps.new_empty if n else chosen_logps.new_zeros
    value, dual = make((), dtype=dtype), make((), dtype=dtype)
    weights, losses, chosen_rewards, rejected_rewards = (
        chosen_logps.new_empty(n, dtype=dtype) for _ in range(4)
    )
    d_chosen, d_rejected = chosen_logps.new_empty(n), rejected_logps.new_empty(n)
    after = unchanged(chosen_logps, group_weights) if not n else None
    if n:
        options = PairOptions(
            loss_type, beta, label_smoothing, simpo_gamma, discopop_tau, f_divergence, f_alpha
        )
        foe = adversary(chosen_logps, n, SCRATCH, nominal, groups, group_weights, kind, a, b, trim)
        after = foe.after
        reference = ref_chosen_logps is not None and ref_rejected_logps is not None
        flags = options.flags(reference, chosen_lengths is not None)
        pairs = [
            None if x is None else x.contiguous()
            for x in (
                chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps,
                chosen_lengths, rejected_lengths,
            )
        ]  # fmt: skip
        limit = alpha_exponent_limit(chosen_logps.dtype)
        parameters = options.numbers(*foe.parameters, limit=limit)
        with on(chosen_logps):
            if n > ONE_PROGRAM:
                pair_losses_kernel[(triton.cdiv(n, 256),)](
                    *pairs, foe.scratch, losses, chosen_rewards, rejected_rewards, n, parameters,
                    **flags, BLOCK=256, num_warps=4,
                )  # fmt: skip
            preference_loss_kernel[(1,)](
                *pairs, *foe.pointers(), value, weights, losses, chosen_rewards, rejected_rewards,
                dual, d_chosen, d_rejected, n, foe.groups_count, parameters, **flags,
                WITH_LOSSES=n <= ONE_PROGRAM, **foe.flags, **foe.options,
            )  # fmt: skip
    assert after is not None
    return (
        value, weights, losses, chosen_rewards, rejected_rewards, dual, after, d_chosen, d_rejected
    )  # fmt: skip
