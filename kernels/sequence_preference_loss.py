"""`sequence_preference_loss`: token log-probs to robust loss and gradients by sequence.

A program sums the two sequences of a pair and makes its loss; the one that arrives last finds the
worst case. That is one launch up to `ONE_LAUNCH` pairs. Above, where the last program would leave
a whole GPU idle in a wider shape than sums want, the worst case is a launch of its own.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from drrlhf.kernels.launch import DEBUG, numbers, on
from drrlhf.kernels.numerics import number, put, sigmoid, softplus
from drrlhf.kernels.robust_risk import solver_arguments, unchanged
from drrlhf.kernels.sequence_logprobs import TOKENS, WARPS, contiguous, limits, sequence_sum
from drrlhf.kernels.worst_case import solve
from torch import Tensor

from drrlhf.ambiguity import Encoded
from drrlhf.conventions import count_of, statistics_dtype

ONE_LAUNCH = 8192  # pairs
SCRATCH = 5  # rows: the search's four, and the slope of each loss


@triton.jit
def log_ratio_of(
    logps_ptr, labels_ptr, cu_ptr, ref_ptr, sums_ptr, i, sequences, tokens, length, ignore_index,
    PACKED: tl.constexpr, TOKENS: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    """Log-ratio of sequence i; its log-prob is stored."""
    begin, end, legal = limits(cu_ptr, i, sequences, tokens, length, PACKED, DEBUG)
    total, count = sequence_sum(logps_ptr, labels_ptr, begin, end, ignore_index, TOKENS)
    total = tl.where(legal, total, float("nan"))
    put(sums_ptr + i, total)
    return total - tl.load(ref_ptr + i).to(tl.float64)


@triton.jit
def write_gradient(scratch_ptr, weights_ptr, d_sums_ptr, n, BLOCK: tl.constexpr):
    """Weights, and the gradient of the sums, from the scratch to where they belong."""
    for first in range(0, n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        q = tl.load(scratch_ptr + 3 * n + o, mask=o < n, other=0.0)
        put(weights_ptr + o, q, o < n)
        # A masked pair gets none, whatever its slope is.
        d = q * tl.load(scratch_ptr + 4 * n + o, mask=o < n, other=0.0)
        d = tl.where(q == 0, 0.0, d)
        put(d_sums_ptr + o, d, o < n)
        put(d_sums_ptr + n + o, -d, o < n)


@triton.jit(debug=DEBUG)
def sequence_preference_loss_kernel(
    logps_ptr, labels_ptr, cu_ptr, ref_ptr, nominal_ptr, groups_ptr, before_ptr, after_ptr,
    scratch_ptr, masses_ptr, arrived_ptr, value_ptr, weights_ptr, losses_ptr, chosen_rewards_ptr,
    rejected_rewards_ptr, dual_ptr, sums_ptr, d_sums_ptr,
    n, tokens, length, size, ignore_index, parameters,
    SUMS: tl.constexpr, SOLVES: tl.constexpr, PACKED: tl.constexpr, TOKENS: tl.constexpr,
    KIND: tl.constexpr, NOMINAL: tl.constexpr, TRIMS: tl.constexpr, UPDATE: tl.constexpr,
    WEIGHTED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    if SUMS:
        i = tl.program_id(0)
        beta, eps = number(parameters, 3), number(parameters, 4)
        chosen = beta * log_ratio_of(
            logps_ptr, labels_ptr, cu_ptr, ref_ptr, sums_ptr, i, 2 * n, tokens, length,
            ignore_index, PACKED, TOKENS, DEBUG,
        )  # fmt: skip
        rejected = beta * log_ratio_of(
            logps_ptr, labels_ptr, cu_ptr, ref_ptr, sums_ptr, n + i, 2 * n, tokens, length,
            ignore_index, PACKED, TOKENS, DEBUG,
        )  # fmt: skip
        h = chosen - rejected
        loss = (1 - eps) * softplus(-h) + eps * softplus(h)
        put(losses_ptr + i, loss)
        put(chosen_rewards_ptr + i, chosen)
        put(rejected_rewards_ptr + i, rejected)
        tl.store(scratch_ptr + i, loss)
        tl.store(scratch_ptr + 4 * n + i, beta * (eps * sigmoid(h) - (1 - eps) * sigmoid(-h)))
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
                KIND, NOMINAL, TRIMS, UPDATE, WEIGHTED, SIZE, BLOCK, DEBUG,
            )  # fmt: skip
            put(value_ptr, value)
            put(dual_ptr, dual)
            write_gradient(scratch_ptr, weights_ptr, d_sums_ptr, n, BLOCK)


def sequence_preference_loss(
    logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor,
    nominal: Tensor | None,
    groups: Tensor | None,
    group_weights: Tensor | None,
    ignore_index: int,
    beta: float,
    label_smoothing: float,
    *ambiguity: Any,
) -> tuple[Tensor, ...]:
    """As `drrlhf.reference.sequence_preference_loss`; what it refuses by value gives NaN."""
    dtype, sequences = statistics_dtype(logps), count_of(labels, cu_seqlens)
    n = sequences // 2
    make = logps.new_empty if n else logps.new_zeros
    value, dual = make((), dtype=dtype), make((), dtype=dtype)
    weights, losses, *rewards = (logps.new_empty(n, dtype=dtype) for _ in range(4))
    sums, d_sums = (logps.new_empty(2 * n, dtype=dtype) for _ in range(2))
    if not n:
        after = unchanged(logps, group_weights)
        return value, weights, losses, *rewards, dual, after, sums, d_sums
    solver = solver_arguments(
        logps, n, SCRATCH, nominal, groups, group_weights, Encoded(*ambiguity)
    )
    arguments = (
        logps.contiguous(), labels.contiguous(), contiguous(cu_seqlens), ref_logps.contiguous(),
        *solver.pointers(), torch.zeros(1, dtype=torch.int32, device=logps.device), value, weights,
        losses, *rewards, dual, sums, d_sums, n, labels.numel(), labels.shape[-1],
        solver.groups_count, ignore_index, numbers(*solver.parameters, beta, label_smoothing),
    )  # fmt: skip
    flags = solver.flags | {"PACKED": cu_seqlens is not None, "TOKENS": TOKENS}
    kernel = sequence_preference_loss_kernel
    with on(logps):
        if n <= ONE_LAUNCH:
            kernel[(n,)](*arguments, SUMS=True, SOLVES=True, **flags, **solver.options)
        else:
            kernel[(n,)](*arguments, SUMS=True, SOLVES=False, **flags, num_warps=WARPS)
            kernel[(1,)](*arguments, SUMS=False, SOLVES=True, **flags, **solver.options)
    return value, weights, losses, *rewards, dual, solver.after, sums, d_sums
