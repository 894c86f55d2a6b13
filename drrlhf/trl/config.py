"""TRL's configurations plus ``ambiguity``."""

from __future__ import annotations

from dataclasses import dataclass, field

from trl import DPOConfig as _TRLDPOConfig
from trl import RewardConfig as _TRLRewardConfig

from drrlhf import parse_ambiguity

_HELP = (
    "The ambiguity set around each batch: erm (TRL's own objective), kl:RADIUS, "
    "kl:temperature=T, tv:RADIUS, chi2:RADIUS, chi2:penalty=C, cvar:ALPHA or "
    "group:NUM_GROUPS, each optionally with ,trim=E."
)


@dataclass
class _Ambiguous:
    """The field that both configurations get, last, and its check before theirs."""

    ambiguity: str = field(default="erm", metadata={"help": _HELP})

    def __post_init__(self) -> None:
        self.ambiguity = str(parse_ambiguity(self.ambiguity))
        super().__post_init__()  # type: ignore[misc]


@dataclass
class DPOConfig(_Ambiguous, _TRLDPOConfig):
    """TRL's ``DPOConfig`` plus the ambiguity set.

    ``ambiguity`` takes a string such as ``"tv:0.1"`` or an instance such as ``drrlhf.TV(0.1)``, and
    holds the canonical string afterwards, so that saving and parsing the configuration work as
    before. ``label_smoothing`` also applies to ``loss_type="sigmoid"`` (cDPO): TRL ignores it.

    Raises:
        ValueError: the ambiguity set is unknown or an argument of it is out of range.
    """


@dataclass
class RewardConfig(_Ambiguous, _TRLRewardConfig):
    """TRL's ``RewardConfig`` plus the ambiguity set, given and kept as in :class:`DPOConfig`.

    Raises:
        ValueError: the ambiguity set is unknown or an argument of it is out of range.
    """
