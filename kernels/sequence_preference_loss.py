"""`sequence_preference_loss`: token log-probs to robust loss and gradients by sequence.

A program sums the two sequences of a pair and makes its loss; the one that arrives last finds the
worst case. That is one launch up to `ONE_LAUNCH` pairs. Above, where the last program would leave
a whole GPU idle in a wider shape than sums want, the worst case is a launch of its own.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from drrlhf.kernels.dual_search import solve
from drrlhf.kernels.launch import DEBUG, on
from drrlhf.kernels.numerics import number, put
from drrlhf.kernels.pair_losses import pair_loss
from drrlhf.kernels.preference_loss import SCRATCH, PairOptions, weigh
from drrlhf.kernels.robust_risk import adversary, unchanged
from drrlhf.kernels.sequence_logprobs import (
    TOKENS,
    WARPS,
    contiguous,
    count_of,
    limits,
    sequence_sum,
)
from torch import Tensor

from drrlhf.reference import alpha_exponent_limit, statistics_dtype

ONE_LAUNCH = 8192  # pairs


@triton.jit
def log_ratio_of(
    logps_ptr, labels_ptr, cu_ptr, ref_ptr, sums_ptr, i, sequences, tokens, length, ignore_index,
    REFERENCE: tl.constexpr, PACKED: tl.constexpr, TOKENS: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    """Log-ratio of sequence i and its counted tokens; its log-prob is stored."""
    begin, end, legal = limits(cu_ptr, i, sequences, tokens, length, PACKED, DEBUG)
    total, count = sequence_sum(logps_ptr, labels_ptr, begin, end, ignore_index, TOKENS)
    total = tl.where(legal, total, float("nan"))
    put(sums_ptr + i, total)
    if REFERENCE:
        total -= tl.load(ref_ptr + i).to(tl.float64)
    return total, count


@triton.jit(debug=DEBUG)
def sequence_preference_loss_kernel(
    logps_ptr, labels_ptr, cu_ptr, ref_ptr, nominal_ptr, groups_ptr, before_ptr, after_ptr,
    scratch_ptr, masses_ptr, arrived_ptr, value_ptr, weights_ptr, losses_ptr, chosen_rewards_ptr,
    rejected_rewards_ptr, dual_ptr, sums_ptr, d_sums_ptr,
    n, tokens, length, size, ignore_index, parameters,
    SUMS: tl.constexpr, SOLVES: tl.constexpr, PACKED: tl.constexpr, TOKENS: tl.constexpr,
    LOSS: tl.constexpr, DIVERGENCE: tl.constexpr, REFERENCE: tl.constexpr, KIND: tl.constexpr,
    NOMINAL: tl.constexpr, TRIMS: tl.constexpr, WEIGHTED: tl.constexpr, SIZE: tl.constexpr,
    BLOCK: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    if SUMS:
        i = tl.program_id(0)
        chosen, lc = log_ratio_of(
            logps_ptr, labels_ptr, cu_ptr, ref_ptr, sums_ptr, i, 2 * n, tokens, length,
            ignore_index, REFERENCE, PACKED, TOKENS, DEBUG,
        )  # fmt: skip
        rejected, lr = log_ratio_of(
            logps_ptr, labels_ptr, cu_ptr, ref_ptr, sums_ptr, n + i, 2 * n, tokens, length,
            ignore_index, REFERENCE, PACKED, TOKENS, DEBUG,
        )  # fmt: skip
        beta = number(parameters, 3)
        loss, d_chosen, d_rejected = pair_loss(
            chosen, rejected, lc, lr, beta, number(parameters, 4), number(parameters, 5),
            number(parameters, 6), number(parameters, 7), number(parameters, 8),
            LOSS, DIVERGENCE,
        )  # fmt: skip
        put(losses_ptr + i, loss)
        put(chosen_rewards_ptr + i, beta * chosen)
        put(rejected_rewards_ptr + i, beta * rejected)
        tl.store(scratch_ptr + i, loss)
        tl.store(scratch_ptr + 4 * n + i, d_chosen)
        tl.store(scratch_ptr + 5 * n + i, d_rejected)
    last = True
    if SUMS and SOLVES:
        # Releases what this program wrote, and acquires what the others did.
        tl.debug_barrier()
        last = tl.atomic_add(arrived_ptr, 1, sem="acq_rel") == n - 1
    if SOLVES:
        if last:
            value, dual = solve(
                scratch_ptr, nominal_ptr, groups_ptr, before_ptr, after_ptr, masses_ptr, n, size,
                number(parameters, 0), number(parameters, 1), number(parameters, 2),
                KIND, NOMINAL, TRIMS, WEIGHTED, SIZE, BLOCK, DEBUG,
            )  # fmt: skip
            put(value_ptr, value)
            put(dual_ptr, dual)
            weigh(scratch_ptr, weights_ptr, d_sums_ptr, d_sums_ptr + n, n, BLOCK)


def sequence_preference_loss(
    logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor | None,
    nominal: Tensor | None,
    groups: Tensor | None,
    group_weights: Tensor | None,
    ignore_index: int,
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
    """As `drrlhf.reference.sequence_preference_loss`; what it refuses by value gives NaN."""
    dtype, sequences = statistics_dtype(logps), count_of(labels, cu_seqlens)
    n = sequences // 2
    make = logps.new_empty if n else logps.new_zeros
    value, dual = make((), dtype=dtype), make((), dtype=dtype)
    weights, losses, chosen_rewards, rejected_rewards = (
        logps.new_empty(n, dtype=dtype) for _ in range(4)
    )
    sums, d_sums = (logps.new_empty(2 * n, dtype=dtype) for _ in range(2))
    if not n:
        after = unchanged(logps, group_weights)
        return (
            value, weights, losses, chosen_rewards, rejected_rewards, dual, after, sums, d_sums
        )  # fmt: skip
    options = PairOptions(
        loss_type, beta, label_smoothing, simpo_gamma, discopop_tau, f_divergence, f_alpha
    )
    foe = adversary(logps, n, SCRATCH, nominal, groups, group_weights, kind, a, b, trim)
    flags = options.flags(ref_logps is not None, False) | foe.flags
    del flags["LENGTHS"]  # which are counted here
    arguments = (
        logps.contiguous(), labels.contiguous(), contiguous(cu_seqlens), contiguous(ref_logps),
        *foe.pointers(), torch.zeros(1, dtype=torch.int32, device=logps.device), value, weights,
        losses, chosen_rewards, rejected_rewards, dual, sums, d_sums, n, labels.numel(),
        labels.shape[-1], foe.groups_count, ignore_index,
        options.numbers(*foe.parameters, limit=alpha_exponent_limit(torch.float64)),
    )  # fmt: skip
    flags |= {"PACKED": cu_seqlens is not None, "TOKENS": TOKENS}
    kernel = sequence_preference_loss_kernel
    with on(logps):
        if n <= ONE_LAUNCH:
            kernel[(n,)](*arguments, SUMS=True, SOLVES=True, **flags, **foe.options)
        else:
            kernel[(n,)](*arguments, SUMS=True, SOLVES=False, **flags, num_warps=WARPS)
            kernel[(1,)](*arguments, SUMS=False, SOLVES=True, **flags, **foe.options)
    return (
        value, weights, losses, chosen_rewards, rejected_rewards, dual, foe.after, sums, d_sums
    )  # fmt: skip
