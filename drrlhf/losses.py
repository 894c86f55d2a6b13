"""Preference losses under a worst-case reweighting of their pairs."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from drrlhf import ops, reference
from drrlhf.ambiguity import ERM, AmbiguitySet
from drrlhf.checks import check_choice, check_device, check_floating, check_vector
from drrlhf.reference import (
    DIFFERENCE_LOSSES,
    F_DIVERGENCES,
    LENGTH_LOSSES,
    LOSS_TYPES,
    SMOOTHED_LOSSES,
)
from drrlhf.robust import (
    Adversary,
    Evaluation,
    GroupState,
    NormaliserState,
    Options,
    evaluate_worst_case,
)


class PreferenceLoss(NamedTuple):
    """What `preference_loss` returns: loss () to backpropagate; the rest is detached.

    weights, losses, chosen_rewards, rejected_rewards (n,), dual ().
    """

    loss: Tensor
    weights: Tensor
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    dual: Tensor


class RewardLoss(NamedTuple):
    """What `reward_loss` returns: loss () to backpropagate; the rest is detached.

    weights, losses (n,), dual ().
    """

    loss: Tensor
    weights: Tensor
    losses: Tensor
    dual: Tensor


def _check_pair_arguments(
    pairs: dict[str, Tensor | None], loss_type: str, label_smoothing: float, f_divergence: str,
    beta: float, discopop_tau: float, f_alpha: float,
) -> None:  # fmt: skip
    """Everything about the per-pair loss that can be wrong, in the caller's words."""
    chosen = pairs["chosen_logps"]
    check_vector("chosen_logps", chosen)  # type: ignore[arg-type]
    assert chosen is not None
    for name, value in pairs.items():
        if value is None:
            continue
        check_vector(name, value, chosen.numel(), "chosen_logps")
        check_device(name, value, "chosen_logps", chosen)
        if not name.endswith("lengths"):
            check_floating(name, value)
    references = (pairs["ref_chosen_logps"], pairs["ref_rejected_logps"])
    check_pair_options(
        loss_type, label_smoothing, f_divergence, beta, discopop_tau, f_alpha, references
    )
    if loss_type in LENGTH_LOSSES and None in (pairs["chosen_lengths"], pairs["rejected_lengths"]):
        raise ValueError(
            f"chosen_lengths, rejected_lengths: {loss_type} divides by the number of completion "
            "tokens; expected two tensors of shape (n,)"
        )


def check_pair_options(
    loss_type: str, label_smoothing: float, f_divergence: str, beta: float, discopop_tau: float,
    f_alpha: float, references: tuple[Tensor | None, Tensor | None],
) -> None:  # fmt: skip
    """ValueError where the options of a per-pair loss, or its references, do not go together."""
    check_choice("loss_type", loss_type, LOSS_TYPES)
    check_choice("f_divergence", f_divergence, F_DIVERGENCES)
    if loss_type == "simpo":
        if references != (None, None):
            raise ValueError("ref_chosen_logps: simpo has no reference model; pass None for both")
    elif None in references:
        raise ValueError(
            f"ref_chosen_logps, ref_rejected_logps: {loss_type} needs both, got "
            f"{'None' if references == (None, None) else 'one'}; pass zeros for no reference"
        )
    if f_divergence != "reverse_kl" and loss_type not in DIFFERENCE_LOSSES:
        raise ValueError(
            f"f_divergence: {f_divergence} holds only for losses of the reward difference "
            f"({', '.join(DIFFERENCE_LOSSES)}), got loss_type={loss_type!r}; use 'reverse_kl'"
        )
    limit = 1.0 if loss_type == "exo_pair" else 0.5
    low = "(0" if loss_type == "exo_pair" else "[0"
    if loss_type in SMOOTHED_LOSSES:
        if not (0 <= label_smoothing < limit) or (loss_type == "exo_pair" and not label_smoothing):
            raise ValueError(
                f"label_smoothing: {loss_type} expects {low}, {limit:g}), got {label_smoothing!r}"
            )
    elif label_smoothing != 0:
        raise ValueError(
            f"label_smoothing: {loss_type} takes none, got {label_smoothing!r}; leave it at 0 or "
            f"use one of {', '.join(SMOOTHED_LOSSES)}"
        )
    positive = {"beta": beta, "discopop_tau": discopop_tau}
    for name, number in positive.items():
        if not number > 0:
            raise ValueError(f"{name}: expected a number > 0, got {number!r}")
    if not f_alpha > 0:
        raise ValueError(f"f_alpha_divergence_coef: expected a number > 0, got {f_alpha!r}")


def pair_losses(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    simpo_gamma: float = 0.5,
    discopop_tau: float = 0.05,
) -> Tensor:
    """Per-pair losses (n,), differentiable and not reduced; arguments as in `preference_loss`.

    For combining several loss types or weighing pairs before `robust_risk` reduces them.
    """
    _check_pair_arguments(
        {
            "chosen_logps": chosen_logps, "rejected_logps": rejected_logps,
            "ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps,
            "chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths,
        },
        loss_type, label_smoothing, f_divergence, beta, discopop_tau, f_alpha_divergence_coef,
    )  # fmt: skip
    chosen, rejected = chosen_logps, rejected_logps
    if ref_chosen_logps is not None and ref_rejected_logps is not None:
        chosen, rejected = chosen - ref_chosen_logps, rejected - ref_rejected_logps
    options = reference.PairOptions(
        loss_type, beta, label_smoothing, simpo_gamma, discopop_tau, f_divergence,
        f_alpha_divergence_coef, reference.alpha_exponent_limit(chosen_logps.dtype),
    )  # fmt: skip
    return reference.pair_losses(chosen, rejected, chosen_lengths, rejected_lengths, options)


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    simpo_gamma: float = 0.5,
    discopop_tau: float = 0.05,
    ambiguity: str | AmbiguitySet = ERM(),  # noqa: B008 - frozen
    nominal: Tensor | None = None,
    groups: Tensor | None = None,
    group_state: GroupState | None = None,
    normaliser_state: NormaliserState | None = None,
    update: bool = True,
    process_group: Any = None,
    check_finite: bool = False,
) -> PreferenceLoss:
    """Worst case over `ambiguity` of a direct preference loss, in one op with its gradients.

    With u = log pi(y|x) - log pi_ref(y|x) summed over the completion, the default is
    l_i = -log sigmoid(beta (u_chosen - u_rejected)) (DPO, arXiv 2305.18290) and
    loss = max over q of sum q_i l_i (robust DPO, arXiv 2503.00539). With ``ERM()`` every
    `loss_type` is TRL 1.16's number, save that ``"sigmoid"`` honours `label_smoothing` (cDPO).

    Args:
        chosen_logps, rejected_logps: (n,) sums of token log-probs under the policy.
        ref_chosen_logps, ref_rejected_logps: (n,) the same under the reference; None for simpo.
        beta: inverse strength of the pull towards the reference; for ipo, its tau.
        loss_type: sigmoid, hinge, ipo, exo_pair, nca_pair, bco_pair, robust (rDPO, not the
            adversary here), sppo_hard, apo_zero, apo_down, discopop, sigmoid_norm, simpo.
        label_smoothing: flip probability, in [0, 0.5), for sigmoid and robust; (0, 1) for exo_pair.
        f_divergence: reverse_kl, forward_kl, js_divergence, alpha_divergence (arXiv 2309.16240).
        chosen_lengths, rejected_lengths: (n,) completion tokens, for ipo, sigmoid_norm, simpo.
        simpo_gamma: target margin of simpo: -log sigmoid(beta (mean difference) - gamma).
        ambiguity, nominal, groups, group_state, normaliser_state, update, process_group,
            check_finite: as in `robust_risk`.

    Returns:
        `PreferenceLoss`. Gradients flow to the four log-prob tensors, once (no double backward).
        The rewards are beta u, as TRL logs them.

    Raises:
        ValueError: shapes, dtypes, unknown names, options that the loss type does not take.
    """

    def check() -> None:
        _check_pair_arguments(
            {
                "chosen_logps": chosen_logps, "rejected_logps": rejected_logps,
                "ref_chosen_logps": ref_chosen_logps, "ref_rejected_logps": ref_rejected_logps,
                "chosen_lengths": chosen_lengths, "rejected_lengths": rejected_lengths,
            },
            loss_type, label_smoothing, f_divergence, beta, discopop_tau, f_alpha_divergence_coef,
        )  # fmt: skip

    def evaluate(adversary: Adversary) -> Evaluation:
        nominal, groups, state, encoded = adversary
        value, weights, losses, chosen_rewards, rejected_rewards, dual, stepped, _, _ = (
            ops.preference_loss(
                chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, chosen_lengths,
                rejected_lengths, nominal, groups, state, loss_type, beta, label_smoothing,
                simpo_gamma, discopop_tau, f_divergence, f_alpha_divergence_coef, *encoded,
            )
        )  # fmt: skip
        rewards = (chosen_rewards.detach(), rejected_rewards.detach())
        return Evaluation(value, weights, losses, dual, stepped, rewards)

    options = Options(
        ambiguity, nominal, groups, group_state, normaliser_state, update, process_group,
        check_finite,
    )  # fmt: skip
    out = evaluate_worst_case(evaluate, chosen_logps, "chosen_logps", options, check)
    rewards_chosen, rewards_rejected = out.others
    return PreferenceLoss(
        out.value, out.weights, out.losses, rewards_chosen, rewards_rejected, out.dual
    )


def reward_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | None = None,
    center_coefficient: float = 0.0,
    ambiguity: str | AmbiguitySet = ERM(),  # noqa: B008 - frozen
    nominal: Tensor | None = None,
    groups: Tensor | None = None,
    group_state: GroupState | None = None,
    normaliser_state: NormaliserState | None = None,
    update: bool = True,
    process_group: Any = None,
    check_finite: bool = False,
) -> RewardLoss:
    """Worst case over `ambiguity` of the Bradley-Terry loss of a reward model.

    l_i = -log sigmoid(r+_i - r-_i - margin_i) + center (r+_i + r-_i)^2, and
    loss = max over q of sum q_i l_i (robust reward estimation, arXiv 2503.00539).

    Args:
        chosen_rewards, rejected_rewards: (n,) scalar rewards of the two completions.
        margin: (n,) how much the chosen should win by; a constant, no gradient flows to it.
        center_coefficient: pull of the rewards towards mean 0 (arXiv 2312.09244), >= 0.
        ambiguity, nominal, groups, group_state, normaliser_state, update, process_group,
            check_finite: as in `robust_risk`.

    Raises:
        ValueError: shapes, dtypes, a negative center_coefficient.
    """

    def check() -> None:
        check_vector("chosen_rewards", chosen_rewards)
        check_floating("chosen_rewards", chosen_rewards)
        for name, value in (("rejected_rewards", rejected_rewards), ("margin", margin)):
            if value is not None:
                check_vector(name, value, chosen_rewards.numel(), "chosen_rewards")
                check_device(name, value, "chosen_rewards", chosen_rewards)
        check_floating("rejected_rewards", rejected_rewards)
        if not center_coefficient >= 0:
            raise ValueError(f"center_coefficient: expected >= 0, got {center_coefficient!r}")

    def evaluate(adversary: Adversary) -> Evaluation:
        nominal, groups, state, encoded = adversary
        value, weights, losses, dual, stepped, _, _ = ops.reward_loss(
            chosen_rewards, rejected_rewards, None if margin is None else margin.detach(),
            nominal, groups, state, center_coefficient, *encoded,
        )  # fmt: skip
        return Evaluation(value, weights, losses, dual, stepped)

    options = Options(
        ambiguity, nominal, groups, group_state, normaliser_state, update, process_group,
        check_finite,
    )  # fmt: skip
    out = evaluate_worst_case(evaluate, chosen_rewards, "chosen_rewards", options, check)
    return RewardLoss(out.value, out.weights, out.losses, out.dual)
