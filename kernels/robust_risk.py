"""`robust_risk`: losses in; worst-case value, weights and dual out. One launch of one program."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from drrlhf.kernels.launch import DEBUG, numbers, on, registers
from drrlhf.kernels.numerics import number, put
from drrlhf.kernels.worst_case import solve
from torch import Tensor

from drrlhf.ambiguity import Encoded
from drrlhf.conventions import statistics_dtype

SMALL, LARGE = (512, 4), (1024, 8)  # losses that a step looks at together, and warps
REGISTERS = 168


@triton.jit(debug=DEBUG)
def robust_risk_kernel(
    losses_ptr, nominal_ptr, groups_ptr, before_ptr, after_ptr, scratch_ptr, masses_ptr,
    value_ptr, weights_ptr, dual_ptr, n, size, parameters,
    KIND: tl.constexpr, NOMINAL: tl.constexpr, TRIMS: tl.constexpr, UPDATE: tl.constexpr,
    WEIGHTED: tl.constexpr, SIZE: tl.constexpr, BLOCK: tl.constexpr, DEBUG: tl.constexpr,
):  # fmt: skip
    for first in range(0, n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        l = tl.load(losses_ptr + o, mask=o < n, other=0.0)
        tl.store(scratch_ptr + o, l.to(tl.float64), mask=o < n)
    tl.debug_barrier()
    value, dual = solve(
        scratch_ptr, nominal_ptr, groups_ptr, before_ptr, after_ptr, masses_ptr, n, size,
        number(parameters, 0), number(parameters, 1), number(parameters, 2),
        KIND, NOMINAL, TRIMS, UPDATE, WEIGHTED, SIZE, BLOCK, DEBUG,
    )  # fmt: skip
    put(value_ptr, value)
    put(dual_ptr, dual)
    for first in range(0, n, BLOCK):
        o = first + tl.arange(0, BLOCK)
        q = tl.load(scratch_ptr + 3 * n + o, mask=o < n, other=0.0)
        put(weights_ptr + o, q, o < n)


class SolverArguments(NamedTuple):
    """The arguments of `dual_search.solve` besides the losses.

    nominal, groups (n,), group weights before and after (G,), scratch, and scratch of the groups;
    parameters: parameter, temperature and trim of the set.
    """

    nominal: Tensor | None
    groups: Tensor | None
    before: Tensor | None
    after: Tensor
    scratch: Tensor
    masses: Tensor
    parameters: tuple[float, float, float]
    flags: dict[str, Any]
    options: dict[str, int]

    def pointers(self) -> tuple[Tensor | None, ...]:
        """In the order of the kernels."""
        return self.nominal, self.groups, self.before, self.after, self.scratch, self.masses

    @property
    def groups_count(self) -> int:
        return self.after.numel()


def solver_arguments(
    like: Tensor,
    n: int,
    rows: int,
    nominal: Tensor | None,
    groups: Tensor | None,
    group_weights: Tensor | None,
    ambiguity: Encoded,
) -> SolverArguments:
    """Scratch with `rows` rows of n (the first four are the search's), and constants of a set."""
    size = 0
    if ambiguity.kind == "group":
        assert groups is not None and group_weights is not None, "Group needs groups and state"
        size, groups = group_weights.numel(), groups.contiguous()
        group_weights = group_weights.contiguous()
    block, warps = SMALL if n <= SMALL[0] else LARGE
    options = {"num_warps": warps} | registers(like, REGISTERS)
    # The parameter at which a set holds the nominal weights alone.
    smallest = {"kl_radius": 0, "chi2_radius": 0, "tv": 0, "cvar": 1, "cvar_temperature": 1}
    scratch = torch.empty(rows * n + 2 * size, dtype=torch.float64, device=like.device)
    flags = {
        "KIND": ambiguity.kind,
        "NOMINAL": smallest.get(ambiguity.kind) == ambiguity.parameter,
        "TRIMS": ambiguity.trim > 0,
        "UPDATE": ambiguity.update or ambiguity.kind != "group",
        "WEIGHTED": nominal is not None,
        "SIZE": triton.next_power_of_2(max(size, 1)),
        "BLOCK": block,
        "DEBUG": DEBUG,
    }
    return SolverArguments(
        None if nominal is None else nominal.contiguous(),
        groups,
        group_weights,
        torch.empty(size, dtype=torch.float64, device=like.device),
        scratch,
        scratch[rows * n :],
        (ambiguity.parameter, ambiguity.temperature, ambiguity.trim),
        flags,
        options,
    )


def robust_risk(
    losses: Tensor,
    nominal: Tensor | None,
    groups: Tensor | None,
    group_weights: Tensor | None,
    *ambiguity: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `drrlhf.reference.robust_risk`; what it refuses by value gives NaN."""
    n = losses.numel()
    dtype = statistics_dtype(losses)
    make = losses.new_empty if n else losses.new_zeros
    value, dual = make((), dtype=dtype), make((), dtype=dtype)
    weights = losses.new_empty(n, dtype=dtype)
    if not n:
        return value, weights, dual, unchanged(losses, group_weights)
    solver = solver_arguments(losses, n, 4, nominal, groups, group_weights, Encoded(*ambiguity))
    with on(losses):
        robust_risk_kernel[(1,)](
            losses.contiguous(), *solver.pointers(), value, weights, dual, n, solver.groups_count,
            numbers(*solver.parameters), **solver.flags, **solver.options,
        )  # fmt: skip
    return value, weights, dual, solver.after


def unchanged(like: Tensor, group_weights: Tensor | None) -> Tensor:
    """The group weights after a batch of none."""
    if group_weights is None:
        return like.new_empty(0, dtype=torch.float64)
    return group_weights.clone()
