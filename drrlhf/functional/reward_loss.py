"""`reward_loss`: the Bradley-Terry loss of a reward model under a worst-case reweighting."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from drrlhf import distributed
from drrlhf.checks import check_floating, check_vector
from drrlhf.conventions import statistics_dtype
from drrlhf.functional.label_probs import (
    LABEL_OPTIONS,
    LabelOptions,
    check_labels,
    over_outcomes,
)
from drrlhf.functional.options import take
from drrlhf.functional.robust_risk import (
    RISK_OPTIONS,
    Options,
    RiskOptions,
    unmasked_gradient,
    worst_case,
)
from drrlhf.reference.pair_losses import bradley_terry

if TYPE_CHECKING:
    from typing_extensions import Unpack


class RewardLoss(NamedTuple):
    """What `reward_loss` returns: loss () to backpropagate; the rest is detached.

    weights, losses (n,), dual ().
    """

    loss: Tensor
    weights: Tensor
    losses: Tensor
    dual: Tensor


class RewardLossOptions(LabelOptions, RiskOptions, total=False):
    """The options of labels that are probabilities, and of `robust_risk`."""


def reward_losses(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    margin: Tensor | None,
    center_coefficient: float,
    nominal: Tensor | None,
    labels: Mapping[str, Any] | None = None,
) -> Tensor:
    """The losses (n,) of `reward_loss`, float32 at least; no gradient where nominal is 0."""
    dtype = statistics_dtype(chosen_rewards)
    chosen = unmasked_gradient(chosen_rewards.to(dtype), nominal)
    rejected = unmasked_gradient(rejected_rewards.to(dtype), nominal)
    shift = None if margin is None else margin.detach().to(dtype)
    found = bradley_terry(chosen, rejected, shift, center_coefficient)
    if labels is None or labels.get("label_probs") is None:
        return found
    # The margin belongs to the odds: the other outcome has what is left of the probability.
    other = None if shift is None else -shift
    swapped = bradley_terry(rejected, chosen, other, center_coefficient)
    return over_outcomes(found, swapped, **labels)


def reward_loss(
    chosen_rewards: Tensor,
    rejected_rewards: Tensor,
    *,
    margin: Tensor | None = None,
    center_coefficient: float = 0.0,
    **options: Unpack[RewardLossOptions],
) -> RewardLoss:
    """Worst case over `ambiguity` of the Bradley-Terry loss of a reward model.

    l_i = -log sigmoid(r+_i - r-_i - margin_i) + center (r+_i + r-_i)^2, and
    loss = max over q of sum q_i l_i (robust reward estimation, arXiv 2503.00539).

    Args:
        chosen_rewards, rejected_rewards: (n,) scalar rewards of the two completions.
        margin: (n,) how much the chosen should win by; a constant, no gradient flows to it.
        center_coefficient: pull of the rewards towards mean 0 (arXiv 2312.09244), >= 0.
        label_probs=None, label_ambiguity="erm": (n,) how probable the labels are, and the adversary
            over that, see `drrlhf.functional.label_probs`. The other outcome's loss is
            -log sigmoid(-(r+_i - r-_i - margin_i)), and the centring is the same.
        ambiguity, nominal, groups, group_state, normaliser_state, update, process_group,
            check_finite: as in `robust_risk`.

    Returns:
        `RewardLoss`, float32, or float64 for float64 rewards. Gradients flow to the rewards; those
        of a masked pair are 0.

    Raises:
        ValueError: shapes, dtypes, a negative center_coefficient.
    """
    labels, about_risk = take("reward_loss", options, LABEL_OPTIONS, RISK_OPTIONS)
    risk = Options(**about_risk)
    with distributed.agreement(risk.process_group, chosen_rewards):
        check_vector("chosen_rewards", chosen_rewards)
        check_floating("chosen_rewards", chosen_rewards)
        for name, value in (("rejected_rewards", rejected_rewards), ("margin", margin)):
            if value is not None:
                n = chosen_rewards.numel()
                check_vector(name, value, n, "chosen_rewards", chosen_rewards)
        check_floating("rejected_rewards", rejected_rewards)
        check_labels(labels, chosen_rewards.numel(), "chosen_rewards", chosen_rewards)
        if not center_coefficient >= 0:
            raise ValueError(f"center_coefficient: expected >= 0, got {center_coefficient!r}")
    losses = reward_losses(
        chosen_rewards, rejected_rewards, margin, center_coefficient, risk.nominal, labels
    )
    if risk.check_finite:  # an infinite reward has a loss of 0 if it is the chosen one's: show it
        losses = losses + 0 * (chosen_rewards + rejected_rewards).detach()
    value, weights, dual = worst_case(losses, "chosen_rewards", risk)
    return RewardLoss(value, weights, losses.detach(), dual)
