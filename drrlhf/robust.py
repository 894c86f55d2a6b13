"""`robust_risk`: reduce a vector of losses by its worst case instead of by its mean."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from drrlhf import checks, distributed, ops, reference
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
        super()._apply(lambda t: fn(t).to(torch.float64), recurse)
        return self


class NormaliserState(nn.Module):
    """The running normaliser of `KL` with momentum: `.log_normaliser`, a float64 buffer ().

    The logarithm of Z, the running sum p exp(l/t); NaN until the first batch. Saved with a module's
    or trainer's checkpoint; equal on all ranks; stepped only by training calls.
    """

    log_normaliser: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("log_normaliser", torch.full((), math.nan, dtype=torch.float64))

    def _apply(self, fn: Any, recurse: bool = True) -> NormaliserState:
        super()._apply(lambda t: fn(t).to(torch.float64), recurse)
        return self


class Adversary(NamedTuple):
    """Checked arguments of the worst case, as the ops take them."""

    nominal: Tensor | None
    groups: Tensor | None
    group_weights: Tensor | None
    encoded: tuple[str, float, float, float]


class Evaluation(NamedTuple):
    """What every loss op gives, in one order: value (), weights, losses (n,), dual (), the stepped
    group weights (G,), and whatever else that op has. `value` is differentiated; `risk` () is the
    worst case where that is another number."""

    value: Tensor
    weights: Tensor
    losses: Tensor
    dual: Tensor
    stepped: Tensor
    others: tuple[Tensor, ...] = ()
    risk: Tensor | None = None


class Options(NamedTuple):
    """The arguments that every robust loss shares, as the user gave them."""

    ambiguity: str | AmbiguitySet
    nominal: Tensor | None
    groups: Tensor | None
    group_state: GroupState | None
    normaliser_state: NormaliserState | None
    update: bool
    process_group: Any
    check_finite: bool


# No adversary: what an op is asked when the weights are already known, or not wanted.
NO_ADVERSARY = ERM().encode()


class Parsed(NamedTuple):
    """What a graph needs to know of an ambiguity set; num_groups 0: not a group set."""

    num_groups: int
    momentum: float | None
    encoded: tuple[str, float, float, float]


def _parsed(ambiguity: AmbiguitySet) -> Parsed:
    groups, momentum = getattr(ambiguity, "num_groups", 0), getattr(ambiguity, "momentum", None)
    return Parsed(groups, momentum, ambiguity.encode())


def _parse_text(ambiguity: str) -> Parsed:
    return _parsed(parse_ambiguity(ambiguity))


# What torch.compiler.assume_constant_result does, without its second of import time.
_parse_text._dynamo_marked_constant = True  # type: ignore[attr-defined]


def parse(ambiguity: str | AmbiguitySet) -> Parsed:
    """What the ops need of a set, or of a string that names one; ValueError as parse_ambiguity."""
    return _parsed(ambiguity) if isinstance(ambiguity, AmbiguitySet) else _parse_text(ambiguity)


def check_adversary(first: Tensor, parsed: Parsed, options: Options, like: str) -> Adversary:
    """Check and encode what every robust loss takes besides its losses."""
    n, num_groups, encoded = first.numel(), parsed.num_groups, parsed.encoded
    nominal, groups, group_state = options.nominal, options.groups, options.group_state
    if nominal is not None:
        check_vector("nominal", nominal, n, like)
        check_device("nominal", nominal, like, first)
        if checks.DEBUG:  # not every kernel asserts; the CPU's raise by themselves
            reference.normalised(nominal, n, first)
    if parsed.momentum is not None and options.normaliser_state is not None:
        _check_state_device(
            "normaliser_state", options.normaliser_state.log_normaliser, like, first
        )
    if not num_groups:
        return Adversary(nominal, None, None, encoded)
    if groups is None:
        raise ValueError(
            f"groups: {options.ambiguity} needs the group id of every pair, expected an integer "
            f"tensor of shape ({n},), got None"
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
                f"group_state: expected {num_groups} groups as {options.ambiguity}, "
                f"got {weights.numel()}; build it with GroupState({num_groups})"
            )
        _check_state_device("group_state", weights, like, first)
    if checks.DEBUG:
        reference.check_groups(groups, weights)
    kind, step_size, _, trim = encoded
    return Adversary(nominal, groups, weights, (kind, step_size, float(options.update), trim))


def summable(nominal: Tensor | None) -> Tensor | None:
    """Nominal weights (n,) whose sum is finite, in the same ratios: they come to 1 in any case."""
    if nominal is None or not nominal.numel() or not nominal.is_floating_point():
        return nominal
    p = nominal.double()
    return p * torch.where(p.amax() > 2.0**960, 2.0**-64, 1.0)  # exact


def _check_state_device(name: str, state: Tensor, like: str, first: Tensor) -> None:
    if state.device != first.device:
        raise ValueError(
            f"{name}: expected it on {first.device} as {like}, got {state.device}; move it with "
            f"{name}.to(...)"
        )


def evaluate_worst_case(
    evaluate: Callable[[Adversary], Evaluation],
    first: Tensor,
    like: str,
    options: Options,
    check: Callable[[], None] = lambda: None,
) -> Evaluation:
    """The worst case of the losses that `evaluate` computes: what every robust loss comes down to.

    Args:
        evaluate: calls the loss's op; differentiable.
        first: a tensor (n,) on the losses' device; `like`: its name in messages.
        check: raises what is wrong with the loss's own arguments, before anything is gathered.

    Returns:
        Evaluation, its weights, losses and dual detached. With a process group value and dual are
        those of all ranks' pairs, weights and losses this rank's, and the gradient of value is
        scaled by the number of ranks.
    """
    if options.process_group is not None:
        return _across_ranks(evaluate, first, like, options, check)
    check()
    parsed = parse(options.ambiguity)
    adversary = check_adversary(first, parsed, options, like)
    out = evaluate(adversary._replace(nominal=summable(adversary.nominal)))
    if options.check_finite:
        _require_finite(out.losses, adversary.nominal)
    _store(options, out.stepped)
    value, risk, weights = out.value, out.risk, out.weights.detach()
    if parsed.momentum is not None:
        batch = (value if risk is None else risk).detach()
        running, scale = _stream(batch, weights, parsed, options)
        value, weights = value * scale, weights * scale
        if risk is None:
            value = Reported.apply(running, value)
        else:
            risk = running
    return out._replace(
        value=value, weights=weights, losses=out.losses.detach(), dual=out.dual.detach(), risk=risk
    )


@torch.compiler.disable
def _across_ranks(
    evaluate: Callable[[Adversary], Evaluation],
    first: Tensor,
    like: str,
    options: Options,
    check: Callable[[], None],
) -> Evaluation:
    """The same where the pairs lie on several ranks: gather, solve everywhere, take one's slice."""
    with distributed.agreement(options.process_group, first.device):
        check()
        parsed = parse(options.ambiguity)
        adversary = check_adversary(first, parsed, options, like)
        with torch.no_grad():
            out = evaluate(Adversary(None, None, None, NO_ADVERSARY))
    solved = solve_across_ranks(out.losses, parsed, adversary, options)
    weights = solved.mine
    # An op weighs by nominal / sum nominal; NaN (a loss is not finite) comes back with the factor.
    share = weights.sum() * len(solved.pairs.sizes)
    local = evaluate(Adversary(torch.nan_to_num(weights), None, None, NO_ADVERSARY))
    return local._replace(
        value=Reported.apply(solved.value, local.value * share),
        weights=weights,
        losses=out.losses,
        dual=solved.dual,
    )


class Solution(NamedTuple):
    """The worst case of the pairs of all ranks: value (), weights (N,), dual (), and the pairs."""

    value: Tensor
    weights: Tensor
    dual: Tensor
    pairs: distributed.Gathered

    @property
    def mine(self) -> Tensor:
        """The weights (n,) of this rank's pairs."""
        return self.pairs.mine(self.weights)


def solve_across_ranks(
    losses: Tensor, parsed: Parsed, adversary: Adversary, options: Options
) -> Solution:
    """Gather the losses (n,) of all ranks and solve: the same everywhere, as one process would."""
    state, normaliser = adversary.group_weights, options.normaliser_state
    facts = {
        "ambiguity set": str(parse_ambiguity(options.ambiguity)),
        "argument update": str(options.update),
    }
    if state is not None:
        facts["group weights"] = str(state.tolist())
    if parsed.momentum is not None and normaliser is not None:
        facts["running normaliser"] = str(normaliser.log_normaliser.item())
    pairs = distributed.gather(
        losses, adversary.nominal, adversary.groups, options.process_group, facts
    )
    if options.check_finite:
        _require_finite(pairs.losses, pairs.nominal, pairs.place)
    value, weights, dual, stepped = ops.robust_risk(
        pairs.losses, summable(pairs.nominal), pairs.groups, state, *adversary.encoded
    )
    _store(options, stepped)
    if parsed.momentum is not None:
        value, scale = _stream(value, weights, parsed, options)
        weights = weights * scale
    return Solution(value, weights, dual, pairs)


class Reported(torch.autograd.Function):
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


def _stream(
    value: Tensor, weights: Tensor, parsed: Parsed, options: Options
) -> tuple[Tensor, Tensor]:
    """The running value t log Z and the factor from the batch's weights to p exp(l/t) / Z.

    Z <- m Z + (1 - m) Z_batch in log space, where the batch's value is t log Z_batch. A batch
    without pairs, or with a loss that is not finite, leaves Z alone.
    """
    temperature, momentum = parsed.encoded[1], parsed.momentum
    assert momentum is not None
    batch = value.double() / temperature
    state = options.normaliser_state
    before = batch if state is None else state.log_normaliser
    before = torch.where(before.isnan(), batch, before)
    # log m rather than m: at m = 0 it is -inf, and the batch alone is left
    kept = math.log(momentum) if momentum else -math.inf
    after = torch.logaddexp(before + kept, batch + math.log1p(-momentum))
    usable = batch.isfinite() & (weights.sum() > 0)
    if state is not None and options.update:
        with torch.no_grad():
            state.log_normaliser.copy_(torch.where(usable, after, state.log_normaliser))
    scale = torch.where(usable, torch.exp(batch - after), 1.0)
    running = torch.where(usable, temperature * after, value.double())
    return running.to(value.dtype), scale.to(value.dtype)


def _store(options: Options, stepped: Tensor) -> None:
    """Keep the group weights that an op hands back: stepped, or as they were without update."""
    if options.group_state is not None and stepped.numel():
        with torch.no_grad():
            options.group_state.weights.copy_(stepped)


def _require_finite(
    losses: Tensor, nominal: Tensor | None, place: Callable[[int], str] = "index {}".format
) -> None:
    """ValueError that names the first unmasked non-finite entry of `losses` (n,)."""
    bad = ~torch.isfinite(losses.detach())
    if nominal is not None:
        bad = bad & (nominal != 0)
    check_value(
        lambda: ~bad.any(),
        lambda: (
            f"losses: expected finite numbers (check_finite=True), got "
            f"{losses[bad][0].item()} at {place(int(bad.nonzero()[0]))}; mask the pair with "
            "nominal=0 or find where it overflowed"
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

    def check() -> None:
        check_vector("losses", losses)
        check_floating("losses", losses)

    def evaluate(adversary: Adversary) -> Evaluation:
        nominal, groups, state, encoded = adversary
        value, weights, dual, stepped = ops.robust_risk(losses, nominal, groups, state, *encoded)
        return Evaluation(value, weights, losses, dual, stepped)

    options = Options(
        ambiguity, nominal, groups, group_state, normaliser_state, update, process_group,
        check_finite,
    )  # fmt: skip
    out = evaluate_worst_case(evaluate, losses, "losses", options, check)
    return RobustRisk(out.value, out.weights, out.dual)
