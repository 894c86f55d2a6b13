"""`robust_risk`: reduce a vector of losses by its worst case instead of by its mean."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from drrlhf import ops
from drrlhf.ambiguity import ERM, AmbiguitySet, Group, parse_ambiguity
from drrlhf.checks import check_device, check_floating, check_integer, check_value, check_vector


class RobustRisk(NamedTuple):
    """What `robust_risk` returns: value (), weights (n,), dual ()."""

    value: Tensor
    weights: Tensor
    dual: Tensor


class GroupState(nn.Module):
    """The group weights that `Group` steps: `.weights`, a float64 buffer (G,), uniform at first.

    Saved with a module's or trainer's checkpoint; equal on all ranks; stepped only by training
    calls. Raises ValueError unless num_groups >= 1.
    """

    weights: Tensor

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        Group(num_groups)  # validates
        uniform = torch.full((num_groups,), 1.0 / num_groups, dtype=torch.float64)
        self.register_buffer("weights", uniform)

    def _apply(self, fn: Any, recurse: bool = True) -> GroupState:
        # model.half() and .to(bfloat16) must not round the state: follow the device alone.
        super()._apply(lambda t: fn(t).to(torch.float64) if t is self.weights else fn(t), recurse)
        return self


class Adversary(NamedTuple):
    """Checked arguments of the worst case, as the ops take them."""

    nominal: Tensor | None
    groups: Tensor | None
    group_weights: Tensor | None
    encoded: tuple[str, float, float, float]


def _parse(ambiguity: str) -> tuple[int, tuple[str, float, float, float]]:
    """Number of groups (0: not a group set) and the encoded set: what a graph needs of a string."""
    parsed = parse_ambiguity(ambiguity)
    return getattr(parsed, "num_groups", 0), parsed.encode()


# What torch.compiler.assume_constant_result does, without its second of import time.
_parse._dynamo_marked_constant = True  # type: ignore[attr-defined]


def adversary(
    first: Tensor,
    ambiguity: str | AmbiguitySet,
    nominal: Tensor | None,
    groups: Tensor | None,
    group_state: GroupState | None,
    update: bool,
    like: str,
) -> Adversary:
    """Check and encode what every robust loss takes besides its losses."""
    if isinstance(ambiguity, AmbiguitySet):
        num_groups, encoded = getattr(ambiguity, "num_groups", 0), ambiguity.encode()
    else:
        num_groups, encoded = _parse(ambiguity)
    n = first.numel()
    if nominal is not None:
        check_vector("nominal", nominal, n, like)
        check_device("nominal", nominal, like, first)
    if not num_groups:
        return Adversary(nominal, None, None, encoded)
    if groups is None:
        raise ValueError(
            f"groups: {ambiguity} needs the group id of every pair, expected an integer tensor "
            f"of shape ({n},), got None"
        )
    check_vector("groups", groups, n, like)
    check_device("groups", groups, like, first)
    check_integer("groups", groups)
    if group_state is None:
        weights = first.new_full((num_groups,), 1 / num_groups, dtype=torch.float64)
    else:
        weights = group_state.weights
        if weights.numel() != num_groups:
            raise ValueError(
                f"group_state: expected {num_groups} groups as {ambiguity}, "
                f"got {weights.numel()}; build it with GroupState({num_groups})"
            )
        if weights.device != first.device:
            raise ValueError(
                f"group_state: expected it on {first.device} as {like}, got {weights.device}; "
                "move it with group_state.to(...)"
            )
    kind, step_size, _, trim = encoded
    return Adversary(nominal, groups, weights, (kind, step_size, float(update), trim))


def store(group_state: GroupState | None, stepped: Tensor) -> None:
    """Keep the group weights that an op hands back: stepped, or as they were without update."""
    if group_state is not None and stepped.numel():
        with torch.no_grad():
            group_state.weights.copy_(stepped)


def require_finite(name: str, values: Tensor, nominal: Tensor | None) -> None:
    """ValueError that names the first unmasked non-finite entry of `values` (n,)."""
    bad = ~torch.isfinite(values.detach())
    if nominal is not None:
        bad = bad & (nominal != 0)
    check_value(
        lambda: ~bad.any(),
        lambda: (
            f"{name}: expected finite numbers (check_finite=True), got "
            f"{values[bad][0].item()} at index {int(bad.nonzero()[0])}; mask the pair with "
            "nominal=0 or find where it overflowed"
        ),
        values,
        wanted=True,
    )


def robust_risk(
    losses: Tensor,
    ambiguity: str | AmbiguitySet = ERM(),  # noqa: B008 - frozen
    *,
    nominal: Tensor | None = None,
    groups: Tensor | None = None,
    group_state: GroupState | None = None,
    update: bool = True,
    check_finite: bool = False,
) -> RobustRisk:
    """Worst-case expectation of `losses` over an ambiguity set around the nominal weights.

    value = max over q in the set of sum_i q_i l_i (minus the set's penalty, if it has one), with
    d value / d l_i = q_i (Danskin); q is never differentiated through and sums to 1. Solved in
    float64 whatever the dtype. See `drrlhf.ambiguity` for the sets.

    Args:
        losses: (n,), any floating dtype, any sign. A non-finite unmasked loss makes the value
            non-finite and all weights NaN.
        ambiguity: a set, or a string such as ``"tv:0.1"``.
        nominal: (n,) weights >= 0, normalised to sum 1; default uniform. 0 masks an entry: its
            weight is 0 and its loss, even NaN, never matters.
        groups: (n,) integer ids in [0, G), needed by `Group` and unused by the other sets.
        group_state: the weights that `Group` steps; without it one step is taken from uniform
            weights and forgotten.
        update: False leaves `group_state` alone and weighs groups by it as it is.
        check_finite: raise ValueError naming the first non-finite unmasked loss.

    Returns:
        `RobustRisk`: value () and dual () and weights (n,), float32, or float64 for float64
        losses. n = 0, or everything masked: value 0, weights 0, connected to the graph.

    Raises:
        ValueError: shapes, dtypes, negative or non-finite nominal weights, group ids out of range.
    """
    check_vector("losses", losses)
    check_floating("losses", losses)
    nominal, groups, state, encoded = adversary(
        losses, ambiguity, nominal, groups, group_state, update, "losses"
    )
    if check_finite:
        require_finite("losses", losses, nominal)
    value, weights, dual, stepped = ops.robust_risk(losses, nominal, groups, state, *encoded)
    store(group_state, stepped)
    return RobustRisk(value, weights.detach(), dual.detach())
