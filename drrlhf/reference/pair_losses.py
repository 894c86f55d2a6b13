"""Losses of preference pairs in plain PyTorch, differentiable by autograd: one function each.

A new loss is a function here and a line in `PAIR_LOSSES`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

F_DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")


class PairOptions(NamedTuple):
    """What a pair loss is told besides its tensors; names as in `drrlhf.preference_loss`."""

    beta: float = 0.1
    label_smoothing: float = 0.0
    simpo_gamma: float = 0.5
    discopop_tau: float = 0.05
    f_divergence: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    exponent_limit: float = 80.0


class Pairs(NamedTuple):
    """n pairs as a loss sees them, each (n,).

    chosen, rejected: log-ratios u = log pi(y|x) - log pi_ref(y|x), or log pi(y|x) itself for simpo;
    difference: of the two scores f'(exp(u)), for losses with an f-divergence u chosen minus u
    rejected in general; mean_difference: of the scores by completion token, None without lengths.
    """

    chosen: Tensor
    rejected: Tensor
    difference: Tensor
    mean_difference: Tensor | None


def alpha_exponent_limit(dtype: torch.dtype) -> float:
    """Largest exponent of the alpha-divergence score, as TRL 1.16 clamps it per input dtype."""
    return 11.0 if dtype == torch.float16 else 80.0


def divergence_score(u: Tensor, o: PairOptions) -> Tensor:
    """f'(exp(u)) up to a constant: the implicit reward of a log-ratio u (arXiv 2309.16240)."""
    if o.f_divergence == "forward_kl":
        # Where that is infinite no gradient flows: the loss is flat, and 0 times infinity NaN.
        beyond = torch.exp(-u.detach()).isinf()
        return 1 - torch.exp(-torch.where(beyond, u.detach(), u))
    if o.f_divergence == "js_divergence":
        return math.log(2) + F.logsigmoid(u)
    power = o.f_alpha_divergence_coef - 1
    if o.f_divergence == "alpha_divergence" and abs(power) >= 1e-6:
        return (torch.exp((power * u).clamp(max=o.exponent_limit)) - 1) / power
    return u


def sigmoid(p: Pairs, o: PairOptions) -> Tensor:
    """DPO, arXiv 2305.18290; with label smoothing cDPO."""
    h = o.beta * p.difference
    if not o.label_smoothing:
        return -F.logsigmoid(h)
    return -(1 - o.label_smoothing) * F.logsigmoid(h) - o.label_smoothing * F.logsigmoid(-h)


def hinge(p: Pairs, o: PairOptions) -> Tensor:
    """SLiC, arXiv 2305.10425."""
    return torch.relu(1 - o.beta * p.difference)


def ipo(p: Pairs, o: PairOptions) -> Tensor:
    """IPO, arXiv 2310.12036 eq. 17, per token."""
    return (_means(p) - 1 / (2 * o.beta)) ** 2


def exo_pair(p: Pairs, o: PairOptions) -> Tensor:
    """EXO, arXiv 2402.00856 eq. 16."""
    h, eps = o.beta * p.difference, o.label_smoothing
    win, lose = F.logsigmoid(h), F.logsigmoid(-h)
    return _divergence(win, math.log1p(-eps)) + _divergence(lose, math.log(eps))


def _divergence(log_p: Tensor, log_q: float) -> Tensor:
    """p (log p - log q), which is 0 where p is."""
    there = ~log_p.isneginf()
    known = torch.where(there, log_p, 0.0)
    return torch.where(there, known.exp() * (known - log_q), 0.0)


def robust(p: Pairs, o: PairOptions) -> Tensor:
    """rDPO, arXiv 2403.00409; may be negative."""
    h, eps = o.beta * p.difference, o.label_smoothing
    return (eps * F.logsigmoid(-h) - (1 - eps) * F.logsigmoid(h)) / (1 - 2 * eps)


def discopop(p: Pairs, o: PairOptions) -> Tensor:
    """DiscoPOP, arXiv 2406.08414 eq. 5."""
    h = o.beta * p.difference
    # exp(-h) gate as one exponential: apart, they overflow and underflow to inf * 0.
    gated = torch.exp(F.logsigmoid(h / o.discopop_tau) - h)
    return -F.logsigmoid(h) * torch.sigmoid(-h / o.discopop_tau) + gated


def sigmoid_norm(p: Pairs, o: PairOptions) -> Tensor:
    """DPO on per-token mean log-ratios."""
    return -F.logsigmoid(o.beta * _means(p))


def nca_pair(p: Pairs, o: PairOptions) -> Tensor:
    """NCA, arXiv 2402.05369."""
    chosen, rejected = o.beta * p.chosen, o.beta * p.rejected
    return -F.logsigmoid(chosen) - 0.5 * F.logsigmoid(-chosen) - 0.5 * F.logsigmoid(-rejected)


def bco_pair(p: Pairs, o: PairOptions) -> Tensor:
    """BCO, arXiv 2404.04656, without the running shift."""
    return -F.logsigmoid(o.beta * p.chosen) - F.logsigmoid(-o.beta * p.rejected)


def sppo_hard(p: Pairs, o: PairOptions) -> Tensor:
    """SPPO, arXiv 2405.00675 with hard probabilities."""
    return (p.chosen - 0.5 / o.beta) ** 2 + (p.rejected + 0.5 / o.beta) ** 2


def apo_zero(p: Pairs, o: PairOptions) -> Tensor:
    """APO-zero, arXiv 2408.06266 eq. 7."""
    return torch.sigmoid(-o.beta * p.chosen) + torch.sigmoid(o.beta * p.rejected)


def apo_down(p: Pairs, o: PairOptions) -> Tensor:
    """APO-down, arXiv 2408.06266 eq. 8."""
    return torch.sigmoid(o.beta * p.chosen) + torch.sigmoid(o.beta * (p.rejected - p.chosen))


def simpo(p: Pairs, o: PairOptions) -> Tensor:
    """SimPO, arXiv 2405.14734 eq. 6; without a reference."""
    return -F.logsigmoid(o.beta * _means(p) - o.simpo_gamma)


def bradley_terry(
    chosen_rewards: Tensor, rejected_rewards: Tensor, margin: Tensor | None, center: float
) -> Tensor:
    """-log sigmoid(r+ - r- - margin) + center (r+ + r-)^2 of rewards (n,); a reward model's loss,
    centred as arXiv 2312.09244 does."""
    difference = chosen_rewards - rejected_rewards
    if margin is not None:
        difference = difference - margin
    losses = -F.logsigmoid(difference)
    return losses + center * (chosen_rewards + rejected_rewards) ** 2 if center else losses


def _means(p: Pairs) -> Tensor:
    assert p.mean_difference is not None, "the loss divides by lengths"
    return p.mean_difference


class PairLoss(NamedTuple):
    """A loss and what it takes.

    divergences: it has an f-divergence form. The f-DPO reparameterisation leaves a term that
    cancels only in the difference of the two scores (arXiv 2309.16240), so losses that use either
    score alone have none. lengths: it divides by completion tokens. smoothing: the limits of
    label_smoothing, such as "[0, 0.5)"; None: it takes none. reference: it has a reference model.
    """

    function: Callable[[Pairs, PairOptions], Tensor]
    divergences: bool = False
    lengths: bool = False
    smoothing: str | None = None
    reference: bool = True


PAIR_LOSSES = {
    "sigmoid": PairLoss(sigmoid, divergences=True, smoothing="[0, 0.5)"),
    "hinge": PairLoss(hinge, divergences=True),
    "ipo": PairLoss(ipo, divergences=True, lengths=True),
    "exo_pair": PairLoss(exo_pair, divergences=True, smoothing="(0, 1)"),
    "robust": PairLoss(robust, divergences=True, smoothing="[0, 0.5)"),
    "discopop": PairLoss(discopop, divergences=True),
    "sigmoid_norm": PairLoss(sigmoid_norm, divergences=True, lengths=True),
    "nca_pair": PairLoss(nca_pair),
    "bco_pair": PairLoss(bco_pair),
    "sppo_hard": PairLoss(sppo_hard),
    "apo_zero": PairLoss(apo_zero),
    "apo_down": PairLoss(apo_down),
    "simpo": PairLoss(simpo, lengths=True, reference=False),
}


def names(**wanted: bool) -> tuple[str, ...]:
    """Losses with these properties: ``names(lengths=True)``."""
    return tuple(
        name
        for name, loss in PAIR_LOSSES.items()
        if all(bool(getattr(loss, key)) == value for key, value in wanted.items())
    )


def pair_losses(
    chosen: Tensor,
    rejected: Tensor,
    chosen_lengths: Tensor | None,
    rejected_lengths: Tensor | None,
    loss_type: str,
    options: PairOptions,
) -> Tensor:
    """Losses (n,) of log-ratios `chosen`, `rejected` (n,)."""
    s_chosen, s_rejected = divergence_score(chosen, options), divergence_score(rejected, options)
    means = None
    if PAIR_LOSSES[loss_type].lengths:
        assert chosen_lengths is not None and rejected_lengths is not None
        means = s_chosen / chosen_lengths.clamp(min=1) - s_rejected / rejected_lengths.clamp(min=1)
    pairs = Pairs(chosen, rejected, s_chosen - s_rejected, means)
    return PAIR_LOSSES[loss_type].function(pairs, options)
