"""`reward_loss`: rewards to per-pair losses, worst-case weights and gradients. Launches as in
`drrlhf.kernels.preference_loss`."""

from __future__ import annotations

import triton
import triton.language as tl
from drrlhf.kernels.dual_search import solve
from drrlhf.kernels.launch import DEBUG, numbers, on
from drrlhf.kernels.numerics import number, put
from drrlhf.kernels.pair_losses import reward_pair_loss
from drrlhf.kernels.preference_loss import ONE_PROGRAM, SCRATCH, weigh
from drrlhf.kernels.robust_risk import adversary, unchanged
from torch import Tensor

from drrlhf.reference import statistics_dtype


@triton.jit
def reward_losses_block(
    chosen_ptr, rejected_ptr, margin_ptr, scratch_ptr, losses_ptr, o, n, parameters,
    MARGIN: tl.constexpr,
):  # fmt: skip
    """Losses, and derivatives into the scratch, of the pairs o."""
    chosen = tl.load(chosen_ptr + o, mask=o < n, other=0.0).to(tl.float64)
    rejected = tl.load(rejected_ptr + o, mask=o < n, other=0.0).to(tl.float64)
    margin = chosen * 0
    if MARGIN:
        margin = tl.load(margin_ptr + o, mask=o < n, other=0.0).to(tl.float64)
    loss, d_chosen, d_rejected = reward_pair_loss(chosen, rejected, margin, number(parameters, 3))
    put(losses_ptr + o, loss, o < n)
    tl.store(scratch_ptr + o, loss, mask=o < n)
    tl.store(scratch_ptr + 4 * n + o, d_chosen, mask=o < n)
    tl.store(scratch_ptr + 5 * n + o, d_rejected, mask=o < n)


@triton.jit
def reward_losses_kernel(
    chosen_ptr, rejected_ptr, margin_ptr, scratch_ptr, losses_ptr, n, parameters,
    MARGIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The first of two launches: one block of pairs for each program."""
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    reward_losses_block(
        chosen_ptr, rejected_ptr, margin_ptr, scratch_ptr, losses_ptr, o, n, parameters, MARGIN
    )


@triton.jit(debug=DEBUG)
def reward_loss_kernel(
    chosen_ptr, rejected_ptr, margin_ptr, nominal_ptr, groups_ptr, before_ptr, after_ptr,
    scratch_ptr, masses_ptr, value_ptr, weights_ptr, losses_ptr, dual_ptr, d_chosen_ptr,
    d_rejected_ptr, n, size, parameters,
    MARGIN: tl.constexpr, WITH_LOSSES: tl.constexpr, KIND: tl.constexpr, NOMINAL: tl.constexpr,
    TRIMS: tl.constexpr, WEIGHTED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr,
    DEBUG: tl.constexpr,
):  # fmt: skip
    if WITH_LOSSES:
        for first in range(0, n, BLOCK):
            reward_losses_block(
                chosen_ptr, rejected_ptr, margin_ptr, scratch_ptr, losses_ptr,
                first + tl.arange(0, BLOCK), n, parameters, MARGIN,
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
    """As `drrlhf.reference.reward_loss`; what it refuses by value gives NaN."""
    n, dtype = chosen_rewards.numel(), statistics_dtype(chosen_rewards)
    make = chosen_rewards.new_empty if n else chosen_rewards.new_zeros
    value, dual = make((), dtype=dtype), make((), dtype=dtype)
    weights, losses = (chosen_rewards.new_empty(n, dtype=dtype) for _ in range(2))
    d_chosen, d_rejected = chosen_rewards.new_empty(n), rejected_rewards.new_empty(n)
    after = unchanged(chosen_rewards, group_weights) if not n else None
    if n:
        foe = adversary(
            chosen_rewards, n, SCRATCH, nominal, groups, group_weights, kind, a, b, trim
        )
        after = foe.after
        pairs = [
            None if x is None else x.contiguous()
            for x in (chosen_rewards, rejected_rewards, margin)
        ]
        parameters = numbers(*foe.parameters, center_coefficient)
        with on(chosen_rewards):
            if n > ONE_PROGRAM:
                reward_losses_kernel[(triton.cdiv(n, 256),)](
                    *pairs, foe.scratch, losses, n, parameters, MARGIN=margin is not None,
                    BLOCK=256, num_warps=4,
                )  # fmt: skip
            reward_loss_kernel[(1,)](
                *pairs, *foe.pointers(), value, weights, losses, dual, d_chosen, d_rejected, n,
                foe.groups_count, parameters, MARGIN=margin is not None,
                WITH_LOSSES=n <= ONE_PROGRAM, **foe.flags, **foe.options,
            )  # fmt: skip
    assert after is not None
    return value, weights, losses, dual, after, d_chosen, d_rejected
