"""`linear_preference_loss`: the whole head of a direct preference method in one call."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from drrlhf import distributed, ops
from drrlhf.checks import check_floating, check_vector, integers
from drrlhf.conventions import FUSED_PAIR_LOSS
from drrlhf.functional.label_probs import LABEL_OPTIONS, check_labels
from drrlhf.functional.options import take
from drrlhf.functional.pair_losses import PAIR_LOSS_OPTIONS, CheckedPairs, read_options
from drrlhf.functional.preference_loss import PreferenceLossOptions, reduced
from drrlhf.functional.robust_risk import RISK_OPTIONS, Options, solver
from drrlhf.logprobs import HeadOptions, check_layout, linear_token_logprobs, sequence_logprobs
from drrlhf.reference.pair_losses import PAIR_LOSSES, PairOptions

if TYPE_CHECKING:
    from typing_extensions import Unpack


class LinearPreferenceLoss(NamedTuple):
    """What `linear_preference_loss` returns: loss () to backpropagate; the rest is detached.

    weights, losses, chosen_rewards, rejected_rewards (n,), dual (), and the sequences' log-probs
    logps (2n,) under the policy.
    """

    loss: Tensor
    weights: Tensor
    losses: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    dual: Tensor
    logps: Tensor


class LinearPreferenceLossOptions(HeadOptions, PreferenceLossOptions, total=False):
    """The options of `linear_token_logprobs` and `preference_loss`."""


HEAD_OPTIONS = frozenset(HeadOptions.__annotations__)


def linear_preference_loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    ref_logps: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    ref_hidden: Tensor | None = None,
    ref_weight: Tensor | None = None,
    ref_bias: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    **options: Unpack[LinearPreferenceLossOptions],
) -> LinearPreferenceLoss:
    """Worst case of a direct preference loss, from hidden states: `preference_loss` of the sums of
    `linear_token_logprobs` by sequence. For DPO's loss (sigmoid, without an f-divergence, certain
    labels, no process group) everything after the token log-probs is one op.

    Sequences are stacked [chosen…, rejected…]: of 2n, sequence i and sequence n + i are pair i.

    Args:
        hidden: (2n, L, D) padded, or (T, D) packed with `cu_seqlens`.
        weight, bias: output head (V, D), (V,).
        labels: (2n, L) or (T,), aligned with hidden (already shifted); `ignore_index` marks
            prompts and padding.
        ref_logps: (2n,) sums of the reference model's log-probs. Or give `ref_hidden`, shaped as
            hidden, to have them computed here without gradients, by `ref_weight` and `ref_bias`
            where the reference has a head of its own. Neither for simpo.
        cu_seqlens: (2n+1,) integer boundaries of packed sequences: 0, ..., T.
        ignore_index, temperature, softcap, logit_scale, memory_budget: `linear_token_logprobs`.
        beta, loss_type, label_smoothing, f_divergence, f_alpha_divergence_coef, simpo_gamma,
            discopop_tau, label_probs, label_ambiguity: `preference_loss`; the lengths that some
            loss types need are counted.
        ambiguity, nominal, groups, group_state, normaliser_state, update, process_group,
            check_finite: `robust_risk`.

    Returns:
        `LinearPreferenceLoss`. Gradients flow to hidden, weight and bias, once.

    Raises:
        ValueError: an odd number of sequences, a reference that is missing or that simpo has no use
            for, `ref_bias` without `ref_weight`, and whatever the functions named above refuse.
    """
    kinds = HEAD_OPTIONS, PAIR_LOSS_OPTIONS, LABEL_OPTIONS, RISK_OPTIONS
    about_head, about_loss, labelled, about_risk = take("linear_preference_loss", options, *kinds)
    ignore_index, risk = about_head.get("ignore_index", -100), Options(**about_risk)
    with distributed.agreement(risk.process_group, hidden):
        check_floating("hidden", hidden)
        labels = integers("labels", labels)
        sequences = Sequences(labels, cu_seqlens, ignore_index)
        count = check_layout("labels", labels, cu_seqlens, "(2n, L)")
        if count % 2:
            raise ValueError(
                "labels: expected an even number of sequences, stacked [chosen…, rejected…], got "
                f"{count}; drop the one without a partner"
            )
        if ref_hidden is not None:
            if ref_logps is not None:
                raise ValueError("ref_hidden: ref_logps is given too; pass one of them")
            with torch.no_grad():
                ref_logps = sequences.sums(
                    linear_token_logprobs(
                        ref_hidden,
                        weight if ref_weight is None else ref_weight,
                        labels,
                        bias=bias if ref_weight is None else ref_bias,
                        **about_head,
                    )
                )
        elif ref_weight is not None or ref_bias is not None:
            raise ValueError("ref_weight, ref_bias: they read ref_hidden, which is None")
        if ref_bias is not None and ref_weight is None:
            raise ValueError(
                "ref_bias: it is that of ref_weight, which is None; pass the reference's head too"
            )
        if ref_logps is not None:
            check_vector("ref_logps", ref_logps, count, "the stacked sequences", hidden)
        check_labels(labelled, count // 2, "the pairs", hidden)
        loss_type, loss = read_options(hidden.dtype, **about_loss)
        _check_reference(loss_type, ref_logps)
        logps = linear_token_logprobs(hidden, weight, labels, bias=bias, **about_head)
    plain = loss_type == FUSED_PAIR_LOSS and loss.f_divergence == "reverse_kl"
    if plain and risk.process_group is None and labelled.get("label_probs") is None:
        assert ref_logps is not None
        return _in_one_op(logps, sequences, ref_logps, loss, risk)
    return _composed(logps, sequences, ref_logps, about_loss, labelled, risk)


def _check_reference(loss_type: str, ref_logps: Tensor | None) -> None:
    needed = PAIR_LOSSES[loss_type].reference
    if needed and ref_logps is None:
        raise ValueError(
            f"ref_logps: {loss_type} needs the reference's log-probs, got None; pass them, or "
            "ref_hidden, or zeros for no reference"
        )
    if not needed and ref_logps is not None:
        raise ValueError(
            f"ref_logps: {loss_type} has no reference model; pass None, and no ref_hidden"
        )


class Sequences(NamedTuple):
    """Which tokens belong to which of the stacked sequences, and which of them are valid."""

    labels: Tensor
    cu_seqlens: Tensor | None
    ignore_index: int

    def sums(self, tokens: Tensor) -> Tensor:
        """Sums (2n,) of the valid tokens' log-probs."""
        return sequence_logprobs(
            tokens, self.labels, cu_seqlens=self.cu_seqlens, ignore_index=self.ignore_index
        )

    def lengths(self) -> Tensor:
        """Valid tokens (2n,) of each sequence, float64."""
        return self.sums(torch.ones_like(self.labels, dtype=torch.float64))


def _in_one_op(
    logps: Tensor, sequences: Sequences, ref_logps: Tensor, loss: PairOptions, risk: Options
) -> LinearPreferenceLoss:
    first = logps.new_empty(ref_logps.numel() // 2)
    problem = solver(first.numel(), first, "the pairs", risk)
    out = ops.sequence_preference_loss(
        logps,
        sequences.labels,
        sequences.cu_seqlens,
        ref_logps,
        *problem.given(),
        sequences.ignore_index,
        loss.beta,
        loss.label_smoothing,
        *problem.encoded,
    )
    value, weights = problem.settle(out, out.losses)
    rewards = (out.chosen_rewards, out.rejected_rewards)
    return LinearPreferenceLoss(value, weights.detach(), out.losses, *rewards, out.dual, out.sums)


def _composed(
    logps: Tensor,
    sequences: Sequences,
    ref_logps: Tensor | None,
    about_loss: dict[str, Any],
    labelled: dict[str, Any],
    risk: Options,
) -> LinearPreferenceLoss:
    """Sums of sequences, pair losses, worst case, one after another. In float64 up to the losses:
    a sum of many log-probs leaves float32 few digits for the difference of two of them."""
    sums = sequences.sums(logps.double())
    references = (None, None) if ref_logps is None else _halves(ref_logps)
    by_length = PAIR_LOSSES[about_loss.get("loss_type", FUSED_PAIR_LOSS)].lengths
    lengths = _halves(sequences.lengths()) if by_length else (None, None)
    pairs = CheckedPairs(_halves(sums), references, lengths, **about_loss)
    out = reduced(pairs, *pairs.log_ratios(), "the pairs", risk, labelled)
    found = LinearPreferenceLoss(*out, sums.detach())
    return LinearPreferenceLoss(*(x.to(logps.dtype) for x in found))


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    """Of stacked sequences (2n,), the chosen (n,) and the rejected (n,)."""
    n = x.numel() // 2
    return x[:n], x[n:]
