"""TRL's configurations plus ``ambiguity``."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import cast

from trl import DPOConfig as _TRLDPOConfig
from trl import GRPOConfig as _TRLGRPOConfig
from trl import RewardConfig as _TRLRewardConfig

from drrlhf import parse_ambiguity
from drrlhf.checks import check_choice
from drrlhf.functional.label_probs import label_radius
from drrlhf.functional.row_sets import MEAN
from drrlhf.groups import from_data, with_count
from drrlhf.trl import views
from drrlhf.trl.head import HEADS
from drrlhf.trl.reward_ambiguity import check_ambiguity

SCOPES = ("step", "microbatch")
SHARING = {"auto": "auto", "true": True, "false": False}  # as a shell spells them
GROUPINGS = ("column", "pass_rate")
_HELP = (
    "The ambiguity set around the pairs, or prompts, of a step: erm (TRL's own objective), "
    "kl:RADIUS, kl:temperature=T (also with ,momentum=M), tv:RADIUS, chi2:RADIUS, chi2:penalty=C, "
    "cvar:ALPHA or group:NUM_GROUPS, each optionally with ,trim=E; group alone takes the number of "
    "groups from the training data."
)


@dataclass
class _Ambiguous:
    """What all three configurations get, and its checks before theirs."""

    ambiguity: str = field(default="erm", metadata={"help": _HELP})
    robust_scope: str = field(
        default="step",
        metadata={
            "help": "What the adversary sees: step, all pairs (in GRPO, prompts) of the optimizer "
            "step, over all processes and accumulated batches; or microbatch, those of one "
            "device's batch."
        },
    )
    resume_with_changed_ambiguity: bool = field(
        default=False,
        metadata={
            "help": "Resume from a checkpoint that was saved with another objective: ambiguity "
            "set, views, or an option of ours that changes the loss."
        },
    )
    # "auto", True or False; what parses command lines knows no such type.
    share_prompts: str = field(
        default="auto",
        metadata={
            "help": "Run the model on a prompt once for all of its answers: auto, where the model "
            "keeps its numbers and enough tokens are saved; True, or a clear error; or False."
        },
    )

    def __post_init__(self) -> None:
        spelled = str(self.share_prompts).lower()
        check_choice("share_prompts", spelled, tuple(SHARING))
        self.share_prompts = cast(str, SHARING[spelled])
        if from_data(self.ambiguity):
            with_count(self.ambiguity, 1)  # refuses what else is wrong
        else:
            self.ambiguity = str(parse_ambiguity(self.ambiguity))
        check_choice("robust_scope", self.robust_scope, SCOPES)
        super().__post_init__()  # type: ignore[misc]


@dataclass
class _Pairs(_Ambiguous):
    """What the configurations for pairs get besides."""

    label_ambiguity: str = field(
        default="erm",
        metadata={
            "help": "What is believed of the column p_chosen, the probability that the chosen "
            "answer is the better one: erm, all of it; or chi2:RADIUS, the worst near it."
        },
    )
    views: list[str] | None = field(
        default=None,
        metadata={
            "help": "Forms in which a pair must keep its order, such as typos, bullets or sentence "
            "(see drrlhf.transformations), or @NAME for the columns chosen@NAME and rejected@NAME: "
            "each pair is trained on in its worst one."
        },
    )
    views_per_pair: int = field(
        default=3, metadata={"help": "How many views of each answer are drawn in every epoch."}
    )
    views_scored: float = field(
        default=1.0,
        metadata={
            "help": "The share of pairs whose views are scored, drawn anew in every epoch; the "
            "others are trained on in any one of them."
        },
    )
    views_scored_from: float = field(
        default=0.0,
        metadata={
            "help": "The share of training, 0 <= s < 1, after which views are scored; before it "
            "pairs are trained on in any one of their views."
        },
    )
    view_ambiguity: str = field(
        default="max",
        metadata={
            "help": "Which of its views a pair is trained on: max, the worst; mean, any "
            "(augmentation); kl:temperature=T, cvar:ALPHA or tv:RADIUS in between."
        },
    )

    def __post_init__(self) -> None:
        label_radius(self.label_ambiguity)
        given = [self.views] if isinstance(self.views, str) else self.views or ()
        # Commas are how a shell spells a list.
        names = [name.strip() for one in given for name in one.split(",")]
        self.views = [name for name in names if name] or None
        views.check_options(self)
        super().__post_init__()


@dataclass
class DPOConfig(_Pairs, _TRLDPOConfig):
    """TRL's ``DPOConfig`` plus the ambiguity set and the output head.

    ``ambiguity`` takes a string such as ``"tv:0.1"`` or an instance such as ``drrlhf.TV(0.1)``, and
    holds the canonical string afterwards, so that saving and parsing the configuration work as
    before; ``"group"``, or ``"group:step_size=0.1"``, takes the number of groups from the column
    ``group`` of the training data. ``robust_scope`` is what the adversary sees: ``"step"``, the
    pairs of the whole optimizer step, over all processes and accumulated batches, as if they were
    one batch; ``"microbatch"``, those of one device's batch. A run resumes with its own set, views
    and options of its loss unless ``resume_with_changed_ambiguity``. ``label_smoothing`` also
    applies to ``loss_type="sigmoid"`` (cDPO): TRL ignores it.
    ``views`` are forms of a pair that must not change its order, names among
    `drrlhf.transformations.TRANSFORMATIONS` without its attacks, some with a rate as in
    ``"typos:0.2"``, or ``"@NAME"`` for the columns ``chosen@NAME`` and ``rejected@NAME`` and
    ``"prompt@NAME"``; a list, or a string with commas. In every epoch ``views_per_pair`` of them
    are drawn for each answer, the policy scores all of them as it is evaluated, and the pair is
    trained on in its worst form, the ambiguity set over pairs on top: ``view_ambiguity="max"``, or
    a set of `drrlhf.worst_view` by whose weights one is drawn; ``"mean"`` is augmentation, without
    scores. ``views_scored`` is the share of pairs that are scored, the others are trained on in any
    of their forms, as all are before the share ``views_scored_from`` of training.
    With a column ``p_chosen``, such as the chosen answer's share of votes, losses are over both
    outcomes; ``label_ambiguity="chi2:r"`` takes the worst probability near it (DPO-PRO).
    ``share_prompts`` runs the model on what two answers have in common, their prompt, once: all
    tokens of a batch then lie in one row, as with ``padding_free``, and the numbers are those that
    each answer has for itself, to rounding; dropout in the prompt is drawn once for its answers.
    ``"auto"`` does so where the model keeps its numbers (it is tried before the first step) and at
    least a twentieth of the tokens is saved; ``True`` does it wherever two answers begin alike, or
    raises a ValueError that says why it cannot; ``False`` never.
    ``padding_free``, which TRL 1.16 takes and ignores, runs the model on one packed row of tokens.
    ``head`` computes the log-probs of the policy and the reference: ``"drrlhf"`` is
    `drrlhf.linear_token_logprobs`, in place for this trainer's losses alone; ``"trl"`` is TRL's
    own; ``"auto"`` is ours where a compiled kernel serves it on the training device, else TRL's,
    which needs less memory than plain PyTorch. In float32 they agree to rounding; in bfloat16 ours
    does not round the logits.

    Raises:
        ValueError: the ambiguity set is unknown, an argument of it is out of range, or ``head`` or
            ``share_prompts`` is none of these.
    """

    head: str = field(
        default="auto",
        metadata={"help": f"What computes the log-probs of tokens: {', '.join(HEADS)}."},
    )

    def __post_init__(self) -> None:
        check_choice("head", self.head, HEADS)
        super().__post_init__()


@dataclass
class RewardConfig(_Pairs, _TRLRewardConfig):
    """TRL's ``RewardConfig`` plus the ambiguity set, given and kept as in :class:`DPOConfig`.

    ``padding_free`` runs the model on one packed row of all tokens (causal decoders), and
    ``share_prompts`` on each prompt once, ``views`` are other forms of a pair, and
    ``label_ambiguity`` is about the column ``p_chosen``, as in :class:`DPOConfig`.
    ``batch_sum_coefficient=c`` adds c (sum of all rewards)² of each device's batch to its loss in
    training, outside the ambiguity set: batch-wise sum-to-zero regularization (BSR, arXiv
    2505.07271), beside TRL's ``center_rewards_coefficient``, which is pair by pair.
    ``view_consistency_coefficient=c`` adds c (r - r₀)² for both answers to the loss of a pair that
    is trained on in another form, r its reward and r₀ that of the answer as it is, as it was scored
    (a constant); it needs views that are scored.

    Raises:
        ValueError: an ambiguity set is unknown, or an argument of it or a coefficient is out of
            range, or views that a coefficient needs are not scored.
    """

    padding_free: bool = field(
        default=False,
        metadata={"help": "Run the model on one packed row of tokens, without padding."},
    )
    batch_sum_coefficient: float = field(
        default=0.0,
        metadata={
            "help": "Pulls the sum of all rewards of a batch towards 0 (BSR): this times its "
            "square is added to the loss, outside the ambiguity set."
        },
    )
    view_consistency_coefficient: float = field(
        default=0.0,
        metadata={
            "help": "Pulls the reward of an answer in another form towards that of the answer as "
            "it is: this times the square of their difference is added to the pair's loss."
        },
    )

    def __post_init__(self) -> None:
        for name in ("batch_sum_coefficient", "view_consistency_coefficient"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(
                    f"{name}: expected a finite number >= 0, got {getattr(self, name)!r}"
                )
        super().__post_init__()
        scored = self.views and self.views_scored and views.are_scored(self)
        if self.view_consistency_coefficient and not scored:
            raise ValueError(
                "view_consistency_coefficient: expected views that are scored, got views="
                f"{self.views!r}, view_ambiguity={self.view_ambiguity!r}, views_scored="
                f"{self.views_scored}; give views and view_ambiguity='max'"
            )


@dataclass
class GRPOConfig(_Ambiguous, _TRLGRPOConfig):
    """TRL's ``GRPOConfig`` plus the ambiguity set around the prompts of a step, given and kept as
    in :class:`DPOConfig`, and the output head.

    ``share_prompts`` runs the model on a prompt once for all completions of it in a batch; those of
    an optimizer step that have one prompt are brought together in its batches, where nothing of the
    objective is by batch.

    ``group_by`` says what the groups of ``ambiguity="group:G"`` are: ``"column"``, the dataset's
    ``group``; or ``"pass_rate"``, the share of each prompt's completions so far that reached a
    reward of ``pass_threshold``, cut into G equal parts of [0, 1].

    ``reward_ambiguity`` says how the rewards of several functions become that of a completion:
    their worst case around ``reward_weights``, see :func:`drrlhf.robust_reward`, before advantages
    are made; ``"mean"`` is TRL's weighted sum. With ``multi_objective_aggregation=
    "normalize_then_sum"`` the functions are brought to one scale first, by TRL.

    A set other than ``"erm"`` cannot weigh TRL's reference term by prompt where an option of TRL's
    changes that: ``beta`` other than 0 is refused with such, also with ``use_vllm``, whose
    importance-sampling correction is on by default (``vllm_importance_sampling_correction=False``
    turns it off).

    Raises:
        ValueError: the ambiguity set, ``head``, ``group_by`` or ``reward_ambiguity`` is unknown, or
            an argument of a set is out of range; a negative one of ``reward_weights`` with a
            ``reward_ambiguity`` other than ``"mean"``.
    """

    head: str = field(
        default="auto",
        metadata={"help": f"What computes the log-probs of tokens: {', '.join(HEADS)}."},
    )
    group_by: str = field(
        default="column",
        metadata={"help": f"What the groups of a group set are: {', '.join(GROUPINGS)}."},
    )
    pass_threshold: float = field(
        default=0.5, metadata={"help": "The reward from which a completion counts as passed."}
    )
    reward_ambiguity: str = field(
        default=MEAN,
        metadata={
            "help": "How the rewards of several functions become one: mean, TRL's weighted sum; "
            "min, kl:temperature=T, tv:RADIUS, cvar:ALPHA or uwo:C."
        },
    )

    def __post_init__(self) -> None:
        check_choice("head", self.head, HEADS)
        check_choice("group_by", self.group_by, GROUPINGS)
        self.reward_ambiguity = str(self.reward_ambiguity)
        check_ambiguity(self.reward_ambiguity, self.reward_weights)
        super().__post_init__()
