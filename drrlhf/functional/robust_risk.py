"""`robust_risk`: reduce a vector of losses by its worst case instead of by its mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor, nn

from drrlhf import checks, distributed, ops
from drrlhf.ambiguity import ERM, AmbiguitySet, Encoded, Group, parse_ambiguity
from drrlhf.checks import (
    check_floating,
    check_none,
    check_vector,
    constant_in_graphs,
    integers,
)
from drrlhf.reference.robust_risk import check_groups, normalised

if TYPE_CHECKING:
    from typing_extensions import Self


class RobustRisk(NamedTuple):
    """What `robust_risk` returns: value (), weights (n,), dual ()."""

    value: Tensor
    weights: Tensor
    dual: Tensor


class _ExactState(nn.Module):
    """Float64 buffers that no cast of the module that holds them rounds: .half(), .to(bfloat16) and
    the like move them between devices, and nothing else."""

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        def follow(state: Tensor) -> Tensor:
            moved = fn(state)
            # Widened again it would keep the rounding: what was cast is taken from the original.
            return moved if moved.dtype == torch.float64 else state.to(moved.device, torch.float64)

        return super()._apply(follow, recurse)


class GroupState(_ExactState):
    """The group weights that `Group` steps: `.weights`, a float64 buffer (G,), uniform at first.

    Saved with a module's or trainer's checkpoint; equal on all ranks; stepped only by training
    calls. Raises ValueError unless num_groups >= 1.
    """

    weights: Tensor

    def __init__(self, num_groups: int) -> None:
        super().__init__()
        count = Group(num_groups).num_groups  # which validates
        uniform = torch.full((count,), 1.0 / count, dtype=torch.float64)
        self.register_buffer("weights", uniform)


class NormaliserState(_ExactState):
    """The running normaliser of `KL` with momentum: `.log_normaliser`, a float64 buffer ().

    The logarithm of Z, the running sum p exp(l/t); NaN until the first batch. Saved with a module's
    or trainer's checkpoint; equal on all ranks; stepped only by training calls.
    """

    log_normaliser: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_normaliser", torch.full((), math.nan, dtype=torch.float64))


class RiskOptions(TypedDict, total=False):
    """The keyword arguments of `robust_risk`, which every robust loss passes on to it."""

    ambiguity: str | AmbiguitySet
    nominal: Tensor | None
    groups: Tensor | None
    group_state: GroupState | None
    normaliser_state: NormaliserState | None
    update: bool
    process_group: Any
    check_finite: bool


RISK_OPTIONS = frozenset(RiskOptions.__annotations__)


class Options(NamedTuple):
    """`RiskOptions` with their defaults."""

    ambiguity: str | AmbiguitySet = ERM()
    nominal: Tensor | None = None
    groups: Tensor | None = None
    group_state: GroupState | None = None
    normaliser_state: NormaliserState | None = None
    update: bool = True
    process_group: Any = None
    check_finite: bool = False


class Parsed(NamedTuple):
    """What a graph needs to know of an ambiguity set; num_groups 0: not a group set."""

    num_groups: int
    momentum: float | None
    encoded: Encoded


def _parsed(ambiguity: AmbiguitySet) -> Parsed:
    groups, momentum = getattr(ambiguity, "num_groups", 0), getattr(ambiguity, "momentum", None)
    return Parsed(groups, momentum, ambiguity.encode())


@constant_in_graphs
def _parse_text(ambiguity: str) -> Parsed:
    return _parsed(parse_ambiguity(ambiguity))


def _parse(ambiguity: str | AmbiguitySet) -> Parsed:
    return _parsed(ambiguity) if isinstance(ambiguity, AmbiguitySet) else _parse_text(ambiguity)


class Solver(NamedTuple):
    """Checked arguments of the worst case of n losses.

    nominal, groups (n,), group_weights (G,) and encoded are those of the ops; momentum that of a
    running normaliser; options as the user gave them.
    """

    nominal: Tensor | None
    groups: Tensor | None
    group_weights: Tensor | None
    encoded: Encoded
    momentum: float | None
    options: Options

    def given(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """Nominal weights, groups and group weights as the ops take them."""
        return summable(self.nominal), self.groups, self.group_weights

    def settle(
        self, out: Any, losses: Tensor, place: Callable[[int], str] = "index {}".format
    ) -> tuple[Tensor, Tensor]:
        """Value () and weights (n,) of an op's results for these losses; with momentum those of the
        running normaliser. Group weights, stepped or as they were, are stored."""
        if self.options.check_finite:
            require_finite(losses, self.nominal, place)
        if self.options.group_state is not None and out.stepped.numel():
            with torch.no_grad():
                self.options.group_state.weights.copy_(out.stepped)
        if self.momentum is None:
            return out.value, out.weights
        running, scale = _stream(out.value.detach(), out.weights, self)
        return WithGradientOf.apply(running, out.value * scale), out.weights * scale


def solver(n: int, on: Tensor, like: str, options: Options) -> Solver:
    """Check and encode what the worst case of n losses takes besides them.

    `on` is a tensor on their device, `like` what messages call them.
    """
    parsed = _parse(options.ambiguity)
    nominal, groups, group_state = options.nominal, options.groups, options.group_state
    if nominal is not None:
        check_vector("nominal", nominal, n, like, on)
        if checks.DEBUG:  # not every kernel asserts; the CPU's raise by themselves
            normalised(nominal, n, on)
    if parsed.momentum is not None and options.normaliser_state is not None:
        _check_state_device("normaliser_state", options.normaliser_state.log_normaliser, like, on)
    # By name: torch.compile of PyTorch 2.11 cannot iterate over what it finds in an object.
    e = parsed.encoded
    encoded = Encoded(e.kind, e.parameter, e.temperature, e.trim, options.update)
    if not parsed.num_groups:
        return Solver(nominal, None, None, encoded, parsed.momentum, options)
    if groups is None:
        raise ValueError(
            f"groups: {options.ambiguity} needs the group id of every pair, expected an integer "
            f"tensor of shape ({n},), got None"
        )
    check_vector("groups", groups, n, like, on)
    groups = integers("groups", groups)
    if group_state is None:
        weights = on.new_full((parsed.num_groups,), 1 / parsed.num_groups, dtype=torch.float64)
    else:
        weights = group_state.weights
        if weights.numel() != parsed.num_groups:
            raise ValueError(
                f"group_state: expected {parsed.num_groups} groups as {options.ambiguity}, "
                f"got {weights.numel()}; build it with GroupState({parsed.num_groups})"
            )
        _check_state_device("group_state", weights, like, on)
    if checks.DEBUG:
        check_groups(groups, weights)
    return Solver(nominal, groups, weights, encoded, parsed.momentum, options)


def summable(nominal: Tensor | None) -> Tensor | None:
    """Nominal weights (n,) whose sum is finite, in the same ratios: they come to 1 in any case."""
    if nominal is None or not nominal.numel() or not nominal.is_floating_point():
        return nominal
    p = nominal.double()
    return p * torch.where(p.amax() > 2.0**960, 2.0**-64, 1.0)  # exact


def _check_state_device(name: str, state: Tensor, like: str, on: Tensor) -> None:
    if state.device != on.device:
        raise ValueError(
            f"{name}: expected it on {on.device} as {like}, got {state.device}; move it with "
            f"{name}.to(...)"
        )


def worst_case(losses: Tensor, like: str, options: Options) -> RobustRisk:
    """`robust_risk` of losses (n,) that messages call `like`."""
    if options.process_group is not None:
        return _across_ranks(losses, like, options)
    problem = solver(losses.numel(), losses, like, options)
    out = ops.robust_risk(losses, *problem.given(), *problem.encoded)
    value, weights = problem.settle(out, losses)
    return RobustRisk(value, weights.detach(), out.dual.detach())


@torch.compiler.disable
def _across_ranks(losses: Tensor, like: str, options: Options) -> RobustRisk:
    """The same where the pairs lie on several ranks: gather, solve everywhere, take one's slice."""
    with distributed.agreement(options.process_group, losses):
        problem = solver(losses.numel(), losses, like, options)
    state, normaliser = problem.group_weights, options.normaliser_state
    facts = {
        "ambiguity set": str(parse_ambiguity(options.ambiguity)),
        "argument update": str(options.update),
    }
    if state is not None:
        facts["group weights"] = str(state.tolist())
    if problem.momentum is not None and normaliser is not None:
        facts["running normaliser"] = str(normaliser.log_normaliser.item())
    pairs = distributed.gather(
        losses, problem.nominal, problem.groups, options.process_group, facts
    )
    whole = problem._replace(nominal=pairs.nominal, groups=pairs.groups)
    solved = ops.robust_risk(pairs.losses, *whole.given(), *whole.encoded)
    value, weights = whole.settle(solved, pairs.losses, pairs.place)
    mine = pairs.mine(weights)
    local = weighted_sum(mine, losses) * len(pairs.sizes)  # gradients will be averaged
    return RobustRisk(WithGradientOf.apply(value, local), mine, solved.dual)


def unmasked_gradient(x: Tensor, nominal: Tensor | None) -> Tensor:
    """x (n,), from which no gradient comes where nominal is 0: 0 times a derivative that is not
    finite would be NaN."""
    if nominal is None or nominal.shape != x.shape or nominal.device != x.device:
        return x
    return torch.where(nominal == 0, x.detach(), x)


def weighted_sum(weights: Tensor, losses: Tensor) -> Tensor:
    """sum_s weights_s losses_s (), of (S,) each; a weight of 0 takes no part, NaN or not."""
    return torch.where(weights == 0, 0, weights * losses).sum()


class WithGradientOf(torch.autograd.Function):
    """A number () to report, with the gradient of another one ()."""

    @staticmethod
    def forward(reported: Tensor, differentiated: Tensor) -> Tensor:
        return reported.to(differentiated.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # type: ignore[override]
        return None, grad


def _stream(value: Tensor, weights: Tensor, problem: Solver) -> tuple[Tensor, Tensor]:
    """The running value t log Z and the factor from the batch's weights to p exp(l/t) / Z.

    Z <- m Z + (1 - m) Z_batch in log space, where the batch's value is t log Z_batch. A batch
    without pairs, or with a loss that is not finite, leaves Z alone.
    """
    temperature, momentum = problem.encoded.parameter, problem.momentum
    assert momentum is not None
    batch = value.double() / temperature
    state = problem.options.normaliser_state
    before = batch if state is None else state.log_normaliser
    before = torch.where(before.isnan(), batch, before)
    # log m rather than m: at m = 0 it is -inf, and the batch alone is left
    kept = math.log(momentum) if momentum else -math.inf
    after = torch.logaddexp(before + kept, batch + math.log1p(-momentum))
    usable = batch.isfinite() & (weights.sum() > 0)
    if state is not None and problem.options.update:
        with torch.no_grad():
            state.log_normaliser.copy_(torch.where(usable, after, state.log_normaliser))
    scale = torch.where(usable, torch.exp(batch - after), 1.0)
    running = torch.where(usable, temperature * after, value.double())
    return running.to(value.dtype), scale.to(value.dtype)


def require_finite(losses: Tensor, nominal: Tensor | None, place: Callable[[int], str]) -> None:
    """ValueError that names the first unmasked non-finite entry of `losses` (n,)."""
    bad = ~torch.isfinite(losses.detach())
    if nominal is not None:
        bad = bad & (nominal != 0)
    check_none(
        lambda: bad,
        lambda read, i: (
            f"losses: expected finite numbers (check_finite=True), got {read(losses)[i].item()} at "
            f"{place(i)}; mask the pair with nominal=0 or find where it overflowed"
        ),
        losses,
        wanted=True,
    )


def robust_risk(
    losses: Tensor,
    ambiguity: str | AmbiguitySet = ERM(),  # noqa: B008 - frozen
    *,
    nominal: Tensor | None = None,
    groups: Tensor | None = None,
    group_state: GroupState | None = None,
    normaliser_state: NormaliserState | None = None,
    update: bool = True,
    process_group: Any = None,
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
        normaliser_state: the running normaliser of `KL` with momentum; without it the batch
            stands alone.
        update: False leaves both states alone: groups are weighed by theirs as it is.
        process_group: a `torch.distributed` group, such as ``torch.distributed.group.WORLD``: the
            adversary sees the pairs of all its ranks. n may differ between ranks, and be 0. value
            and dual are then those of all pairs, the same on every rank, weights (n,) those of
            this rank's; the gradient of value is scaled by the number of ranks, so that the
            average that DDP and FSDP take is that of one process with the whole batch. Every rank
            must call; it synchronises with the host, and breaks a compiled graph. None: this
            process alone.
        check_finite: raise ValueError naming the first non-finite unmasked loss; on a GPU that
            reads the losses, which synchronises, and in a compiled graph it is left out there.

    Returns:
        `RobustRisk`: value () and dual () and weights (n,), float32, or float64 for float64
        losses. n = 0, or everything masked: value 0, weights 0, connected to the graph.

    Raises:
        ValueError: shapes, dtypes, negative or non-finite nominal weights, group ids out of range.
        RuntimeError: with a process group, see `drrlhf.distributed.gather`: a rank that died, or
            refused its arguments, or was asked something else.
    """
    with distributed.agreement(process_group, losses):
        check_vector("losses", losses)
        check_floating("losses", losses)
    states = group_state, normaliser_state
    options = Options(ambiguity, nominal, groups, *states, update, process_group, check_finite)
    return worst_case(losses, "losses", options)
