"""`pair_losses`: the losses of preference pairs, one number each, not reduced."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import torch
from torch import Tensor

from drrlhf.checks import check_choice, check_floating, check_vector
from drrlhf.conventions import FUSED_PAIR_LOSS
from drrlhf.functional.label_probs import (
    LABEL_OPTIONS,
    LabelOptions,
    check_labels,
    over_outcomes,
)
from drrlhf.functional.options import take
from drrlhf.reference.pair_losses import (
    F_DIVERGENCES,
    PAIR_LOSSES,
    PairOptions,
    alpha_exponent_limit,
    names,
)
from drrlhf.reference.pair_losses import pair_losses as formula

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PairLossOptions(TypedDict, total=False):
    """The keyword arguments of `pair_losses` that say which loss it is.

    beta: inverse strength of the pull towards the reference; for ipo, its tau.
    loss_type: sigmoid, hinge, ipo, exo_pair, nca_pair, bco_pair, robust (rDPO, not the adversary
        here), sppo_hard, apo_zero, apo_down, discopop, sigmoid_norm, simpo.
    label_smoothing: flip probability, in [0, 0.5), for sigmoid and robust; (0, 1) for exo_pair.
    f_divergence: reverse_kl, forward_kl, js_divergence, alpha_divergence (arXiv 2309.16240);
        f_alpha_divergence_coef: alpha of the last.
    simpo_gamma: target margin of simpo: -log sigmoid(beta (mean difference) - gamma).
    discopop_tau: temperature of discopop's gate.
    """

    beta: float
    loss_type: str
    label_smoothing: float
    f_divergence: str
    f_alpha_divergence_coef: float
    simpo_gamma: float
    discopop_tau: float


class DoubtedPairLossOptions(PairLossOptions, LabelOptions, total=False):
    """The options of a pair loss, and of labels that are probabilities."""


PAIR_LOSS_OPTIONS = frozenset(PairLossOptions.__annotations__)


def read_options(
    dtype: torch.dtype, loss_type: str = FUSED_PAIR_LOSS, **options: Any
) -> tuple[str, PairOptions]:
    """The loss type and its `PairLossOptions`, for log-probs of a dtype; ValueError where they do
    not go together."""
    check_choice("loss_type", loss_type, tuple(PAIR_LOSSES))
    o = PairOptions(**options, exponent_limit=alpha_exponent_limit(dtype))
    check_choice("f_divergence", o.f_divergence, F_DIVERGENCES)
    loss = PAIR_LOSSES[loss_type]
    if o.f_divergence != "reverse_kl" and not loss.divergences:
        raise ValueError(
            f"f_divergence: {o.f_divergence} holds only for losses of the reward difference "
            f"({', '.join(names(divergences=True))}), got loss_type={loss_type!r}; use 'reverse_kl'"
        )
    if loss.smoothing is None:
        if o.label_smoothing != 0:
            raise ValueError(
                f"label_smoothing: {loss_type} takes none, got {o.label_smoothing!r}; leave it at "
                f"0 or use one of {', '.join(names(smoothing=True))}"
            )
    else:
        limit = float(loss.smoothing.rstrip(")").split(",")[1])
        zero = o.label_smoothing == 0 and loss.smoothing.startswith("(")
        if zero or not 0 <= o.label_smoothing < limit:
            raise ValueError(
                f"label_smoothing: {loss_type} expects {loss.smoothing}, got {o.label_smoothing!r}"
            )
    for name in ("beta", "discopop_tau", "f_alpha_divergence_coef"):
        if not getattr(o, name) > 0:
            raise ValueError(f"{name}: expected a number > 0, got {getattr(o, name)!r}")
    return loss_type, o


Optionals: TypeAlias = tuple[Tensor | None, Tensor | None]


class CheckedPairs:
    """Arguments of `pair_losses` that go together: (chosen, rejected) of each kind, (n,) each."""

    def __init__(
        self,
        policy: tuple[Tensor, Tensor],
        references: Optionals,
        lengths: Optionals,
        **options: Unpack[PairLossOptions],
    ) -> None:
        check_vector("chosen_logps", policy[0])
        for kind, values in (
            ("{}_logps", policy),
            ("ref_{}_logps", references),
            ("{}_lengths", lengths),
        ):
            for name, value in zip((kind.format("chosen"), kind.format("rejected")), values):
                if value is None and name != "rejected_logps":
                    continue
                check_vector(name, value, policy[0].numel(), "chosen_logps", policy[0])
                if kind.endswith("logps"):
                    check_floating(name, value)  # type: ignore[arg-type]
        self.policy, self.references, self.lengths = policy, references, lengths
        self.loss_type, self.options = read_options(policy[0].dtype, **options)
        self._check_references()
        if PAIR_LOSSES[self.loss_type].lengths and None in self.lengths:
            raise ValueError(
                f"chosen_lengths, rejected_lengths: {self.loss_type} divides by the number of "
                "completion tokens; expected two tensors of shape (n,)"
            )

    def _check_references(self) -> None:
        if not PAIR_LOSSES[self.loss_type].reference:
            if self.references != (None, None):
                raise ValueError(
                    f"ref_chosen_logps: {self.loss_type} has no reference model; pass None for both"
                )
        elif None in self.references:
            raise ValueError(
                f"ref_chosen_logps, ref_rejected_logps: {self.loss_type} needs both, got "
                f"{'None' if self.references == (None, None) else 'one'}; pass zeros for no "
                "reference"
            )

    def log_ratios(self, dtype: torch.dtype | None = None) -> tuple[Tensor, Tensor]:
        """log pi - log pi_ref (n,) of the chosen and the rejected, log pi without a reference;
        subtracted in `dtype`, or as they come."""
        (chosen, rejected), (ref_chosen, ref_rejected) = self.policy, self.references
        if dtype is not None:
            chosen, rejected = chosen.to(dtype), rejected.to(dtype)
        if ref_chosen is None or ref_rejected is None:
            return chosen, rejected
        return chosen - ref_chosen, rejected - ref_rejected

    def losses(
        self, chosen: Tensor, rejected: Tensor, labels: Mapping[str, Any] | None = None
    ) -> Tensor:
        """Losses (n,) of log-ratios (n,), over both outcomes where labels are probabilities."""
        found = formula(chosen, rejected, *self.lengths, self.loss_type, self.options)
        if labels is None or labels.get("label_probs") is None:
            return found
        swapped = formula(rejected, chosen, *self.lengths[::-1], self.loss_type, self.options)
        return over_outcomes(found, swapped, **labels)


def pair_losses(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    ref_chosen_logps: Tensor | None = None,
    ref_rejected_logps: Tensor | None = None,
    *,
    chosen_lengths: Tensor | None = None,
    rejected_lengths: Tensor | None = None,
    **options: Unpack[DoubtedPairLossOptions],
) -> Tensor:
    """Per-pair losses (n,), differentiable and not reduced; arguments as in `preference_loss`.

    For combining several loss types or weighing pairs before `robust_risk` reduces them.
    """
    about_loss, labels = take("pair_losses", options, PAIR_LOSS_OPTIONS, LABEL_OPTIONS)
    references = ref_chosen_logps, ref_rejected_logps
    lengths = chosen_lengths, rejected_lengths
    pairs = CheckedPairs((chosen_logps, rejected_logps), references, lengths, **about_loss)
    check_labels(labels, chosen_logps.numel(), "chosen_logps", chosen_logps)
    return pairs.losses(*pairs.log_ratios(), labels)
