"""`preference_loss`: a direct preference loss under a worst-case reweighting of its pairs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from drrlhf import distributed
from drrlhf.conventions import statistics_dtype
from drrlhf.functional.label_probs import LABEL_OPTIONS, LabelOptions, check_labels
from drrlhf.functional.options import take
from drrlhf.functional.pair_losses import PAIR_LOSS_OPTIONS, CheckedPairs, PairLossOptions
from drrlhf.functional.robust_risk import (
    RISK_OPTIONS,
    Options,
    RiskOptions,
    unmasked_gradient,
    worst_case,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


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


class PreferenceLossOptions(PairLossOptions, LabelOptions, RiskOptions, total=False):
    """The options of `pair_losses` and of `robust_risk`."""


def preference_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    **options: Unpack[PreferenceLossOptions],
) -> PreferenceLoss:
    """Worst case over `ambiguity` of a direct preference loss: `robust_risk` of `pair_losses`.

    With u = log pi(y|x) - log pi_ref(y|x) summed over the completion, the default is
    l_i = -log sigmoid(beta (u_chosen - u_rejected)) (DPO, arXiv 2305.18290) and
    loss = max over q of sum q_i l_i (robust DPO, arXiv 2503.00539). With ``ERM()`` every
    `loss_type` is TRL 1.16's number, save that ``"sigmoid"`` honours `label_smoothing` (cDPO).

    Args:
        chosen_logps, rejected_logps: (n,) sums of token log-probs under the policy.
        ref_chosen_logps, ref_rejected_logps: (n,) the same under the reference; None for simpo.
        chosen_lengths, rejected_lengths: (n,) completion tokens, for ipo, sigmoid_norm, simpo.
        beta=0.1, loss_type="sigmoid", label_smoothing=0.0, f_divergence="reverse_kl",
            f_alpha_divergence_coef=0.5, simpo_gamma=0.5, discopop_tau=0.05: which loss it is, see
            `PairLossOptions`.
        label_probs=None, label_ambiguity="erm": (n,) how probable the labels are, and the adversary
            over that, see `drrlhf.functional.label_probs`; the other outcome's loss is that of the
            pair the other way round.
        ambiguity, nominal, groups, group_state, normaliser_state, update, process_group,
            check_finite: as in `robust_risk`.

    Returns:
        `PreferenceLoss`, float32, or float64 for float64 log-probs. Gradients flow to the four
        log-prob tensors; those of a masked pair are 0. The rewards are beta u, as TRL logs them.

    Raises:
        ValueError: shapes, dtypes, unknown names, options that the loss type does not take.
    """
    kinds = PAIR_LOSS_OPTIONS, LABEL_OPTIONS, RISK_OPTIONS
    about_loss, labels, about_risk = take("preference_loss", options, *kinds)
    risk = Options(**about_risk)
    with distributed.agreement(risk.process_group, chosen_logps):
        references = ref_chosen_logps, ref_rejected_logps
        lengths = chosen_lengths, rejected_lengths
        pairs = CheckedPairs((chosen_logps, rejected_logps), references, lengths, **about_loss)
        check_labels(labels, chosen_logps.numel(), "chosen_logps", chosen_logps)
        log_ratios = pairs.log_ratios(statistics_dtype(chosen_logps))
    return reduced(pairs, *log_ratios, "chosen_logps", risk, labels)


def reduced(
    pairs: CheckedPairs,
    chosen: Tensor,
    rejected: Tensor,
    like: str,
    risk: Options,
    labels: Mapping[str, Any] | None = None,
) -> PreferenceLoss:
    """The worst case of pairs with log-ratios `chosen`, `rejected` (n,)."""
    beta = pairs.options.beta
    of_chosen, of_rejected = (unmasked_gradient(u, risk.nominal) for u in (chosen, rejected))
    losses = pairs.losses(of_chosen, of_rejected, labels)
    value, weights, dual = worst_case(losses, like, risk)
    rewards = (beta * chosen.detach(), beta * rejected.detach())
    return PreferenceLoss(value, weights, losses.detach(), *rewards, dual)
