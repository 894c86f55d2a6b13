"""The clipped policy surrogate of GRPO and PPO under the worst distribution of prompts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple, TypedDict

import torch
from torch import Tensor

from drrlhf import distributed, ops
from drrlhf.checks import (
    check_choice,
    check_device,
    check_floating,
    check_none,
    check_tensor,
    check_vector,
    integers,
)
from drrlhf.conventions import (
    IMPORTANCE_LEVELS,
    POLICY_LOSS_TYPES,
    SequenceStatistics,
    statistics_dtype,
)
from drrlhf.functional.options import take
from drrlhf.functional.robust_risk import (
    RISK_OPTIONS,
    Options,
    RiskOptions,
    WithGradientOf,
    weighted_sum,
    worst_case,
)
from drrlhf.logprobs import check_layout

if TYPE_CHECKING:
    from typing_extensions import Unpack


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


class SurrogateOptions(TypedDict, total=False):
    """The options of the surrogate of one sequence, see `policy_loss`."""

    kl_beta: float
    correct_kl: bool
    clip_low: float
    clip_high: float
    importance_level: str


class PolicyLossOptions(SurrogateOptions, RiskOptions, total=False):
    """The options of the surrogate and of `robust_risk`."""


SURROGATE_OPTIONS = frozenset(SurrogateOptions.__annotations__)


class Surrogate(NamedTuple):
    """The clipped surrogate of S sequences: losses (S,) float64, differentiable, and statistics."""

    losses: Tensor
    sequences: SequenceStatistics


def surrogate(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    *,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    ref_logps: Tensor | None = None,
    entropy: Tensor | None = None,
    kl_beta: float = 0.0,
    correct_kl: bool = True,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    importance_level: str = "token",
) -> Surrogate:
    """The sums over tokens that `policy_loss` weighs; arguments and errors as there."""
    _check_tokens(logps, mask, cu_seqlens, old_logps, ref_logps, entropy, advantages)
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
    found = ops.policy_loss(
        logps,
        old_logps,
        ref_logps,
        entropy,
        mask,
        cu_seqlens,
        advantages.detach(),
        importance_level == "sequence",
        float(clip_low),
        float(clip_high),
        float(kl_beta),
        correct_kl,
    )
    return Surrogate(found.losses, SequenceStatistics(*found.table.unbind()))


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
    entropy: Tensor | None = None,
    loss_type: str = "dapo",
    max_completion_length: int | None = None,
    sequence_weights: Tensor | None = None,
    num_prompts: int | None = None,
    **options: Unpack[PolicyLossOptions],
) -> PolicyLoss:
    """Worst case over prompts of the clipped policy surrogate.

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
        kl_beta=0.0: coefficient of that divergence.
        correct_kl=True: False leaves the ratio r in front of the divergence out; TRL's
            ``use_bias_correction_kl``.
        clip_low=0.2, clip_high=0.2: the ratio is clipped to [1 - clip_low, 1 + clip_high].
        loss_type="dapo": grpo, bnpo, dr_grpo or dapo; bnpo and dapo are the same number here.
        max_completion_length=None: dr_grpo's constant.
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
        check_finite: on a GPU read the rewards, the prompt ids and which prompts have tokens, which
            synchronises, and refuse what is wrong, as a CPU always does; without it a wrong reward
            or id gives NaN there, and a prompt without a counted token adds 0 to the loss.

    Returns:
        `PolicyLoss`. The gradient flows to logps, once (no double backward); it is exactly 0 where
        the weight is 0.

    Raises:
        ValueError: shapes, dtypes, unknown names, prompt ids with a gap, a prompt without a counted
            token, a reward that is not finite; kl_beta without ref_logps, dr_grpo without
            max_completion_length.
    """
    about_surrogate, about_risk = take("policy_loss", options, SURROGATE_OPTIONS, RISK_OPTIONS)
    risk = Options(**about_risk)
    by_token: dict[str, Any] = {"mask": mask, "ref_logps": ref_logps, "entropy": entropy}
    with distributed.agreement(risk.process_group, logps):
        found = surrogate(
            logps, old_logps, advantages, cu_seqlens=cu_seqlens, **by_token, **about_surrogate
        )
        _check_loss_type(loss_type, max_completion_length)
        _check_sequences(logps, advantages, rewards, prompt_ids, sequence_weights)
        prompt_ids = integers("prompt_ids", prompt_ids)
        prompts = Prompts(prompt_ids, _count(prompt_ids, num_prompts))
        tokens = found.sequences.tokens
        _check_rewards(rewards, prompts, risk.nominal, risk.check_finite)
        if sequence_weights is None:
            _check_prompts_have_tokens(tokens, prompts, risk.check_finite)
    losses = -prompts.means(rewards.detach().double())
    value, weights, dual = worst_case(losses, "the prompts", risk)
    shares, ranks = _shares(loss_type, tokens.double(), max_completion_length, prompts, risk)
    factors = prompts.spread(weights, math.nan) * shares
    if sequence_weights is not None:
        factors = factors * sequence_weights.detach().double()
    loss = weighted_sum(factors, found.losses)
    if risk.process_group is not None:
        everyone = distributed.total(loss.reshape(1), risk.process_group)[0] / ranks
        loss = WithGradientOf.apply(everyone, loss)
    numbers, dtype = (loss, weights, losses, value.detach(), dual), statistics_dtype(logps)
    loss, weights, losses, value, dual = (x.to(dtype) for x in numbers)
    return PolicyLoss(loss, weights, losses, value, dual, found.sequences)


def _shares(
    loss_type: str,
    tokens: Tensor,
    max_completion_length: int | None,
    prompts: Prompts,
    risk: Options,
) -> tuple[Tensor, int]:
    """m a_s (S,), of all ranks' prompts, sequences and tokens, times the number of ranks, over
    which gradients will be averaged; and that number. Masked prompts do not count."""
    if risk.nominal is None:
        held = torch.ones_like(tokens)
        m: Tensor = tokens.new_full((), prompts.count)
    else:
        present = (risk.nominal != 0).double()
        held, m = prompts.spread(present, 0.0), present.sum()
    sizes = torch.stack([m, held.sum(), torch.where(held != 0, tokens, 0).sum()])
    ranks = 1
    if risk.process_group is not None:
        every = distributed.total(torch.cat([sizes, sizes.new_ones(1)]), risk.process_group)
        sizes, ranks = every[:3], int(every[3])
    m, sequences, all_tokens = sizes.unbind()
    sequences, all_tokens = sequences.clamp(min=1), all_tokens.clamp(min=1)  # all masked: m is 0
    if loss_type == "grpo":
        by = tokens.clamp(min=1) * sequences
    elif loss_type == "dr_grpo":
        by = float(max_completion_length or 1) * sequences
    else:
        by = all_tokens
    return m * ranks / by, ranks


class Prompts:
    """Which of m prompts each sequence belongs to; an int64 id outside of [0, m) is of none."""

    def __init__(self, prompt_ids: Tensor, num_prompts: int) -> None:
        self.ids, self.count = prompt_ids, num_prompts
        outside = (prompt_ids < 0) | (prompt_ids >= num_prompts)
        self.of = torch.where(outside, num_prompts, prompt_ids)

    def sums(self, x: Tensor) -> Tensor:
        """Sums (m,) of a number by sequence."""
        return x.new_zeros(self.count + 1).index_add(0, self.of, x)[: self.count]

    def means(self, x: Tensor) -> Tensor:
        """Means (m,) of a number by sequence."""
        return self.sums(x) / self.sums(torch.ones_like(x))

    def spread(self, x: Tensor, nobody: float) -> Tensor:
        """To each sequence what x (m,) says of its prompt, or `nobody`."""
        return torch.cat([x, x.new_full((1,), nobody)])[self.of]

    def check(self, wanted: bool) -> None:
        """ValueError unless every prompt of 0 ... m - 1 has a sequence, and no other has."""
        ids, count = self.ids, self.count
        check_none(
            lambda: (ids < 0) | (ids >= count),
            lambda read, i: (
                f"prompt_ids: expected ids in [0, {count}), got {int(read(ids)[i])} at index {i}; "
                "number the prompts from 0 or raise num_prompts"
            ),
            ids,
            wanted,
        )
        check_none(
            lambda: self.sums(torch.ones_like(ids)) == 0,
            lambda _, prompt: (
                f"prompt_ids: expected every prompt of 0 to {count - 1}, got none of prompt "
                f"{prompt}; number the prompts without gaps"
            ),
            ids,
            wanted,
        )


def _count(prompt_ids: Tensor, num_prompts: int | None) -> int:
    """m: as told, or read from the ids."""
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


def _check_tokens(
    logps: Tensor,
    mask: Tensor | None,
    cu_seqlens: Tensor | None,
    old_logps: Tensor | None,
    ref_logps: Tensor | None,
    entropy: Tensor | None,
    advantages: Tensor,
) -> None:
    """ValueError where the token tensors, or the number of sequences, do not go together."""
    check_floating("logps", logps)
    hint = "; flatten it, or leave cu_seqlens out"
    sequences = check_layout("logps", logps, cu_seqlens, "(S, L)", hint)
    tokens = {"old_logps": old_logps, "ref_logps": ref_logps, "entropy": entropy, "mask": mask}
    for name, value in tokens.items():
        if value is None:
            continue
        check_tensor(name, value)
        if value.shape != logps.shape:
            raise ValueError(
                f"{name}: expected shape {tuple(logps.shape)} as logps, got {tuple(value.shape)}"
            )
        check_device(name, value, "logps", logps)
        if name != "mask":
            check_floating(name, value)
    check_vector("advantages", advantages)
    check_floating("advantages", advantages)
    check_device("advantages", advantages, "logps", logps)
    if advantages.numel() != sequences:
        raise ValueError(
            f"advantages: expected shape ({sequences},), one for each sequence of "
            f"{'logps' if cu_seqlens is None else 'cu_seqlens'}, got {tuple(advantages.shape)}"
        )


def _check_loss_type(loss_type: str, max_completion_length: int | None) -> None:
    check_choice("loss_type", loss_type, POLICY_LOSS_TYPES)
    if loss_type == "dr_grpo" and not (max_completion_length or 0) > 0:
        raise ValueError(
            "max_completion_length: dr_grpo divides by it; expected an integer > 0, got "
            f"{max_completion_length!r}"
        )


def _check_sequences(
    logps: Tensor,
    advantages: Tensor,
    rewards: Tensor,
    prompt_ids: Tensor,
    sequence_weights: Tensor | None,
) -> None:
    """ValueError where what is known of the sequences (S,) does not go together."""
    vectors = {"rewards": rewards, "prompt_ids": prompt_ids}
    if sequence_weights is not None:
        vectors["sequence_weights"] = sequence_weights
    for name, value in vectors.items():
        check_vector(name, value, advantages.numel(), "advantages")
        check_device(name, value, "logps", logps)
    check_floating("rewards", rewards)


def _check_rewards(rewards: Tensor, prompts: Prompts, nominal: Tensor | None, wanted: bool) -> None:
    """ValueError naming the first reward of a prompt that is not masked and that is not finite."""
    prompts.check(wanted)

    def bad() -> Tensor:
        found = ~torch.isfinite(rewards.detach())
        if (
            nominal is not None
            and nominal.shape == (prompts.count,)
            and nominal.device == rewards.device
        ):
            found = found & (prompts.spread(nominal, 0) != 0)
        return found

    check_none(
        bad,
        lambda read, i: (
            f"rewards: expected finite numbers, got {read(rewards)[i].item()} at index {i} (prompt "
            f"{int(read(prompts.ids)[i])}); drop that completion, or mask the prompt with nominal=0"
        ),
        rewards,
        wanted,
    )


def _check_prompts_have_tokens(tokens: Tensor, prompts: Prompts, wanted: bool) -> None:
    check_none(
        lambda: ~(prompts.sums(tokens) > 0),
        lambda _, prompt: (
            f"mask: expected a counted token for every prompt, got none for prompt {prompt}; drop "
            "the prompt, or check how its completions were masked"
        ),
        tokens,
        wanted,
    )
