"""`linear_preference_loss`: the whole head of a direct preference method in one call."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from drrlhf import distributed, ops
from drrlhf.ambiguity import ERM, AmbiguitySet
from drrlhf.checks import check_device, check_vector
from drrlhf.logprobs import check_boundaries, linear_token_logprobs, sequence_logprobs
from drrlhf.losses import check_pair_options
from drrlhf.robust import (
    Adversary,
    Evaluation,
    GroupState,
    NormaliserState,
    Options,
    evaluate_worst_case,
)


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
    ignore_index: int = -100,
    temperature: float = 1.0,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    memory_budget: int | None = None,
    beta: float = 0.1,
    loss_type: str = "sigmoid",
    label_smoothing: float = 0.0,
    f_divergence: str = "reverse_kl",
    f_alpha_divergence_coef: float = 0.5,
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
) -> LinearPreferenceLoss:
    """Worst case of a direct preference loss, from hidden states: `preference_loss` of the sums of
    `linear_token_logprobs` by sequence, with everything after the token log-probs in one op.

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
            discopop_tau: `preference_loss`; the lengths that some loss types need are counted.
        ambiguity, nominal, groups, group_state, normaliser_state, update, process_group,
            check_finite: `robust_risk`.

    Returns:
        `LinearPreferenceLoss`. Gradients flow to hidden, weight and bias, once.

    Raises:
        ValueError: an odd number of sequences, and whatever the functions named above refuse.
    """
    token_options: dict[str, Any] = {
        "ignore_index": ignore_index, "temperature": temperature, "softcap": softcap,
        "logit_scale": logit_scale, "memory_budget": memory_budget,
    }  # fmt: skip
    options = Options(
        ambiguity, nominal, groups, group_state, normaliser_state, update, process_group,
        check_finite,
    )  # fmt: skip
    with distributed.agreement(process_group, hidden.device):
        sequences = _check_sequences(hidden, labels, cu_seqlens)
        if ref_hidden is not None:
            if ref_logps is not None:
                raise ValueError("ref_hidden: ref_logps is given too; pass one of them")
            with torch.no_grad():
                ref_tokens = linear_token_logprobs(
                    ref_hidden,
                    weight if ref_weight is None else ref_weight,
                    labels,
                    bias=bias if ref_weight is None else ref_bias,
                    **token_options,
                )
                ref_logps = sequence_logprobs(
                    ref_tokens, labels, cu_seqlens=cu_seqlens, ignore_index=ignore_index
                )
        elif ref_weight is not None or ref_bias is not None:
            raise ValueError("ref_weight, ref_bias: they read ref_hidden, which is None")
        if ref_logps is not None:
            check_vector("ref_logps", ref_logps, sequences, "the stacked sequences")
            check_device("ref_logps", ref_logps, "hidden", hidden)
        check_pair_options(
            loss_type, label_smoothing, f_divergence, beta, discopop_tau, f_alpha_divergence_coef,
            references=(ref_logps, ref_logps),
        )  # fmt: skip
        logps = linear_token_logprobs(hidden, weight, labels, bias=bias, **token_options)

    def evaluate(adversary: Adversary) -> Evaluation:
        nominal, groups, state, encoded = adversary
        value, weights, losses, chosen, rejected, dual, stepped, sums, _ = (
            ops.sequence_preference_loss(
                logps, labels, cu_seqlens, ref_logps, nominal, groups, state, ignore_index,
                loss_type, beta, label_smoothing, simpo_gamma, discopop_tau, f_divergence,
                f_alpha_divergence_coef, *encoded,
            )
        )  # fmt: skip
        return Evaluation(value, weights, losses, dual, stepped, (chosen, rejected, sums))

    first = logps.new_empty(sequences // 2)
    out = evaluate_worst_case(evaluate, first, "the pairs", options)
    chosen, rejected, sums = out.others
    return LinearPreferenceLoss(
        out.value, out.weights, out.losses, chosen, rejected, out.dual, sums
    )


def _check_sequences(hidden: Tensor, labels: Tensor, cu_seqlens: Tensor | None) -> int:
    """The number of stacked sequences; ValueError where they are not stacked pairs."""
    if cu_seqlens is None:
        if labels.dim() != 2:
            raise ValueError(
                f"labels: expected padded (2n, L), got {tuple(labels.shape)}; packed (T,) needs "
                "cu_seqlens"
            )
        count = labels.shape[0]
    else:
        if labels.dim() != 1:
            raise ValueError(
                f"labels: expected packed (T,) with cu_seqlens, got {tuple(labels.shape)}"
            )
        check_device("cu_seqlens", cu_seqlens, "labels", labels)
        check_boundaries(cu_seqlens, labels.shape[0])
        count = cu_seqlens.shape[0] - 1
    if count % 2:
        raise ValueError(
            f"labels: expected an even number of sequences, stacked [chosen…, rejected…], got "
            f"{count}; drop the one without a partner"
        )
    return count
