"""The clipped policy surrogate of GRPO and PPO under the worst distribution of prompts."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drrlhf import distributed, ops, reference
from drrlhf.ambiguity import ERM, AmbiguitySet
from drrlhf.checks import (
    check_choice,
    check_device,
    check_floating,
    check_integer,
    check_value,
    check_vector,
)
from drrlhf.logprobs import check_boundaries
from drrlhf.reference import IMPORTANCE_LEVELS, POLICY_LOSS_TYPES
from drrlhf.robust import (
    NO_ADVERSARY,
    Adversary,
    Evaluation,
    GroupState,
    NormaliserState,
    Options,
    Reported,
    check_adversary,
    evaluate_worst_case,
    parse,
    solve_across_ranks,
)


class SequenceStatistics(NamedTuple):
    """Sums over the counted tokens of each sequence (S,), detached.

    tokens: how many count; surrogate: -min(r A, clip(r) A); kl: the (corrected) k3 estimate, 0
    without a reference; ratio: r; low_clipped, high_clipped: tokens whose clip took the gradient
    away, for A < 0 and A > 0; overflowed: tokens whose log-ratio, to the old or the reference
    policy, was clamped at 40; entropy: 0 where none was given.
    """

    tokens: Tensor
    surrogate: Tensor
    kl: Tensor
    ratio: Tensor
    low_clipped: Tensor
    high_clipped: Tensor
    overflowed: Tensor
    entropy: Tensor


class PolicyLoss(NamedTuple):
    """What `policy_loss` returns: loss () to backpropagate; the rest is detached.

    weights q, losses -V (m,), risk () = the worst-case -V, dual (), and `SequenceStatistics`. The
    properties are means () over the counted tokens of all sequences of this process.
    """

    loss: Tensor
    weights: Tensor
    losses: Tensor
    risk: Tensor
    dual: Tensor
    sequences: SequenceStatistics

    def _mean(self, sums: Tensor) -> Tensor:
        return sums.sum() / self.sequences.tokens.sum().clamp(min=1)

    @property
    def ratio(self) -> Tensor:
        """Mean importance ratio."""
        return self._mean(self.sequences.ratio)

    @property
    def clip_fraction(self) -> Tensor:
        """Share of tokens that the clip keeps from moving the policy."""
        return self._mean(self.sequences.low_clipped + self.sequences.high_clipped)

    @property
    def kl(self) -> Tensor:
        """Mean k3 estimate of KL(policy || reference)."""
        return self._mean(self.sequences.kl)

    @property
    def entropy(self) -> Tensor:
        """Mean of the entropies that were given."""
        return self._mean(self.sequences.entropy)

    @property
    def overflowed(self) -> Tensor:
        """How many tokens had a log-ratio beyond 40, clamped there."""
        return self.sequences.overflowed.sum()


def policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    rewards: Tensor,
    prompt_ids: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logps: Tensor | None = None,
    kl_beta: float = 0.0,
    correct_kl: bool = True,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_type: str = "dapo",
    importance_level: str = "token",
    max_completion_length: int | None = None,
    entropy: Tensor | None = None,
    sequence_weights: Tensor | None = None,
    num_prompts: int | None = None,
    ambiguity: str | AmbiguitySet = ERM(),  # noqa: B008 - frozen
    nominal: Tensor | None = None,
    groups: Tensor | None = None,
    group_state: GroupState | None = None,
    normaliser_state: NormaliserState | None = None,
    update: bool = True,
    process_group: Any = None,
    check_finite: bool = False,
) -> PolicyLoss:
    """Worst case over prompts of the clipped policy surrogate, in one op with its gradient.

    With the ratio r = exp(logps - old_logps) of a token (or the geometric mean of a sequence's, at
    ``importance_level="sequence"``), a sequence contributes the sum over its tokens of
    -min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl_beta r (exp(d) - d - 1), with
    d = ref_logps - logps, and prompt i contributes c_i, the sum over its sequences s of a_s times
    that: a_s = 1 / (S tokens of s) for grpo (arXiv 2402.03300), 1 / (all tokens) for bnpo and dapo
    (arXiv 2503.14476), 1 / (S max_completion_length) for dr_grpo (arXiv 2503.20783). With V_i the
    mean reward of prompt i and q the worst-case weights of the losses -V_i,

        loss = sum over the m prompts of m q_i c_i,    q a constant

    (robust policy optimisation, arXiv 2503.00539). With ``ERM()`` this is TRL 1.16's number.

    Args:
        logps: log-probs of the completions' tokens under the policy: padded (S, L), or packed (T,)
            with `cu_seqlens`.
        old_logps: the same under the policy that sampled; None where that is the policy itself, so
            that r = 1.
        advantages: (S,); rewards: (S,), which decide the weights and nothing else.
        prompt_ids: (S,) integers, the prompt of each sequence: every one of 0 ... m-1 occurs.
        mask: as logps, 0 where a token does not count; default: all count.
        cu_seqlens: (S+1,) boundaries of packed sequences, from 0 to T.
        ref_logps: as logps, under the reference; needed for kl_beta != 0.
        correct_kl: False leaves the ratio r in front of the divergence out; TRL's
            ``use_bias_correction_kl``.
        clip_low, clip_high: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        loss_type: grpo, bnpo, dr_grpo or dapo; bnpo and dapo are the same number here.
        max_completion_length: dr_grpo's constant.
        entropy: as logps, of each token's distribution; only averaged into the statistics.
        sequence_weights: (S,) constants >= 0 that multiply each sequence's contribution, for
            weights that were found elsewhere (over several batches, say). A prompt without tokens
            is no error then.
        num_prompts: m; None reads it from prompt_ids, which synchronises a GPU with the host.
        ambiguity, group_state, normaliser_state, update: as in `robust_risk`.
        nominal, groups: (m,), by prompt, as in `robust_risk`; a prompt with nominal 0 is absent.
        process_group: as in `robust_risk`; prompts are those of all ranks, one rank's sequences
            of a prompt being a prompt of their own, and the sequences and tokens that a_s divides
            by are those of all ranks.
        check_finite: on a GPU read the rewards and prompt ids, which synchronises, and refuse what
            is wrong in them, as a CPU always does; without it a wrong one gives NaN there.

    Returns:
        `PolicyLoss`. The gradient flows to logps, once (no double backward); it is exactly 0 where
        the weight is 0.

    Raises:
        ValueError: shapes, dtypes, unknown names, prompt ids with a gap, a prompt without a counted
            token, a reward that is not finite; kl_beta without ref_logps, dr_grpo without
            max_completion_length.
    """
    options = Options(
        ambiguity, nominal, groups, group_state, normaliser_state, update, process_group,
        check_finite,
    )  # fmt: skip

    def check() -> None:
        _check_tokens(logps, mask, cu_seqlens, old_logps, ref_logps, entropy, advantages)
        vectors = {"rewards": rewards, "prompt_ids": prompt_ids}
        if sequence_weights is not None:
            vectors["sequence_weights"] = sequence_weights
        for name, value in vectors.items():
            check_vector(name, value, advantages.numel(), "advantages")
            check_device(name, value, "logps", logps)
        check_floating("rewards", rewards)
        check_integer("prompt_ids", prompt_ids)
        _check_options(
            loss_type, importance_level, clip_low, clip_high, kl_beta, ref_logps,
            max_completion_length,
        )  # fmt: skip

    def count() -> int:
        n = prompt_ids.numel()
        if num_prompts is None:
            largest = int(prompt_ids.max()) if n else -1
            if largest >= n or (n and largest < 0):
                raise ValueError(
                    f"prompt_ids: expected ids in [0, {n}), as many prompts at most as there are "
                    f"sequences, got {largest}; number the prompts from 0 without gaps"
                )
            return largest + 1
        if not 0 <= num_prompts <= n:
            raise ValueError(
                f"num_prompts: expected 0 to {n}, as many sequences as there are, got "
                f"{num_prompts!r}; every prompt needs one"
            )
        return num_prompts

    def evaluate(adversary: Adversary, factor: Tensor | None = None) -> Evaluation:
        nominal, groups, state, encoded = adversary
        loss, weights, losses, risk, dual, stepped, _, _, table = ops.policy_loss(
            logps, old_logps, ref_logps, entropy, mask, cu_seqlens, advantages.detach(),
            rewards.detach(), prompt_ids, sequence_weights if factor is None else factor,
            nominal, groups, state, prompts, loss_type, importance_level, clip_low, clip_high,
            kl_beta, correct_kl, float(max_completion_length or 1), *encoded,
        )  # fmt: skip
        if sequence_weights is None:
            _check_prompts_have_tokens(table[reference.TOKENS], prompt_ids, prompts)
        return Evaluation(loss, weights, losses, dual, stepped, (table,), risk)

    if process_group is None:
        check()
        prompts = count()
        _check_rewards(rewards, prompt_ids, nominal, prompts, check_finite)
        like = rewards.new_empty(prompts)
        out = evaluate_worst_case(evaluate, like, "the prompts", options)
    else:
        with distributed.agreement(process_group, logps.device):
            check()
            prompts = count()
            _check_rewards(rewards, prompt_ids, nominal, prompts, check_finite)
            parsed = parse(ambiguity)
            like = rewards.new_empty(prompts)
            adversary = check_adversary(like, parsed, options, "the prompts")
            present = None if nominal is None else (nominal != 0).to(torch.float64)
            alone = Adversary(present, None, None, NO_ADVERSARY)
            with torch.no_grad():
                out = evaluate(alone)
        solved = solve_across_ranks(out.losses, parsed, adversary, options)
        by_tokens = loss_type in ("bnpo", "dapo")
        factor, ranks = _across_ranks(
            solved.mine, solved.pairs.nominal, len(solved.weights), prompt_ids, present,
            out.others[0][reference.TOKENS] if by_tokens else torch.ones_like(advantages),
            process_group,
        )  # fmt: skip
        factor = factor if sequence_weights is None else factor * sequence_weights
        local = evaluate(alone, factor)
        loss = distributed.total(local.value.reshape(1), process_group)[0] / ranks
        out = local._replace(
            value=Reported.apply(loss, local.value), weights=solved.mine, risk=solved.value,
            dual=solved.dual,
        )  # fmt: skip
    assert out.risk is not None
    statistics = SequenceStatistics(*out.others[0].unbind())
    return PolicyLoss(out.value, out.weights, out.losses, out.risk, out.dual, statistics)


def _across_ranks(
    weights: Tensor, nominal: Tensor | None, m: int, prompt_ids: Tensor, present: Tensor | None,
    sizes: Tensor, process_group: Any,
) -> tuple[Tensor, int]:  # fmt: skip
    """The factor (S,) from a sequence's share of its rank's objective to its weighted share of all
    ranks', times the number of ranks, over which gradients will be averaged; and that number."""
    m = m if nominal is None else int((nominal != 0).sum())
    prompts = reference.Prompts(prompt_ids, len(weights))
    held = sizes if present is None else sizes * (prompts.spread(present, 0) != 0)
    mine = held.sum().double()
    numbers = distributed.total(torch.stack([mine, torch.ones_like(mine)]), process_group)
    everyone, ranks = numbers.tolist()
    share = mine.clamp(min=1) / max(everyone, 1.0)
    return prompts.spread(weights.double() * (m * ranks) * share, math.nan), int(ranks)


def _check_tokens(
    logps: Tensor, mask: Tensor | None, cu_seqlens: Tensor | None, old_logps: Tensor | None,
    ref_logps: Tensor | None, entropy: Tensor | None, advantages: Tensor,
) -> None:  # fmt: skip
    """ValueError where the token tensors, or the number of sequences, do not go together."""
    if not isinstance(logps, Tensor):
        raise ValueError(f"logps: expected a torch.Tensor, got {type(logps).__name__}")
    check_floating("logps", logps)
    if cu_seqlens is None and logps.dim() != 2:
        raise ValueError(
            f"logps: expected padded (S, L), got {tuple(logps.shape)}; packed (T,) needs cu_seqlens"
        )
    if cu_seqlens is not None:
        if logps.dim() != 1:
            raise ValueError(
                f"logps: expected packed (T,) with cu_seqlens, got {tuple(logps.shape)}; flatten "
                "it, or leave cu_seqlens out"
            )
        check_device("cu_seqlens", cu_seqlens, "logps", logps)
        check_boundaries(cu_seqlens, logps.numel())
    tokens = {"old_logps": old_logps, "ref_logps": ref_logps, "entropy": entropy, "mask": mask}
    for name, value in tokens.items():
        if value is None:
            continue
        if value.shape != logps.shape:
            raise ValueError(
                f"{name}: expected shape {tuple(logps.shape)} as logps, got {tuple(value.shape)}"
            )
        check_device(name, value, "logps", logps)
        if name != "mask":
            check_floating(name, value)
    sequences = logps.shape[0] if cu_seqlens is None else cu_seqlens.numel() - 1
    check_vector("advantages", advantages)
    check_floating("advantages", advantages)
    check_device("advantages", advantages, "logps", logps)
    if advantages.numel() != sequences:
        raise ValueError(
            f"advantages: expected shape ({sequences},), one for each sequence of "
            f"{'logps' if cu_seqlens is None else 'cu_seqlens'}, got {tuple(advantages.shape)}"
        )


def _check_options(
    loss_type: str, importance_level: str, clip_low: float, clip_high: float, kl_beta: float,
    ref_logps: Tensor | None, max_completion_length: int | None,
) -> None:  # fmt: skip
    check_choice("loss_type", loss_type, POLICY_LOSS_TYPES)
    check_choice("importance_level", importance_level, IMPORTANCE_LEVELS)
    for name, number, limit in (("clip_low", clip_low, 1.0), ("clip_high", clip_high, None)):
        if not number >= 0 or (limit is not None and number > limit):
            expected = ">= 0" if limit is None else f"in [0, {limit:g}]"
            raise ValueError(f"{name}: expected a number {expected}, got {number!r}")
    if not kl_beta >= 0:
        raise ValueError(f"kl_beta: expected a number >= 0, got {kl_beta!r}")
    if kl_beta and ref_logps is None:
        raise ValueError(
            f"ref_logps: kl_beta={kl_beta!r} needs the reference's log-probs, shaped as logps; got "
            "None. Pass them, or kl_beta=0"
        )
    if loss_type == "dr_grpo" and not (max_completion_length or 0) > 0:
        raise ValueError(
            "max_completion_length: dr_grpo divides by it; expected an integer > 0, got "
            f"{max_completion_length!r}"
        )


def _check_rewards(
    rewards: Tensor, prompt_ids: Tensor, nominal: Tensor | None, prompts: int, wanted: bool
) -> None:
    """ValueError naming the first reward of a prompt that is not masked and that is not finite."""
    reference.check_prompt_ids(prompt_ids, prompts, wanted)

    def bad() -> Tensor:
        found = ~torch.isfinite(rewards.detach())
        if nominal is not None and nominal.shape == (prompts,) and nominal.device == rewards.device:
            found = found & (reference.Prompts(prompt_ids, prompts).spread(nominal, 0) != 0)
        return found

    check_value(
        lambda: ~bad().any(),
        lambda: (
            f"rewards: expected finite numbers, got {rewards[bad()][0].item()} at index "
            f"{int(bad().nonzero()[0])} (prompt {int(prompt_ids[bad()][0])}); drop that "
            "completion, or mask the prompt with nominal=0"
        ),
        rewards,
        wanted,
    )


def _check_prompts_have_tokens(tokens: Tensor, prompt_ids: Tensor, prompts: int) -> None:
    def total() -> Tensor:
        return reference.Prompts(prompt_ids, prompts).sums(tokens)

    check_value(
        lambda: (total() > 0).all(),
        lambda: (
            f"mask: expected a counted token for every prompt, got none for prompt "
            f"{int((total() == 0).nonzero()[0])}; drop the prompt, or check how its completions "
            "were masked"
        ),
        tokens,
    )
