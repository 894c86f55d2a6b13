"""drrlhf: distributionally robust RLHF.

Robust reward models, robust DPO and robust policy optimisation (arXiv 2503.00539): losses against
the worst distribution near the data, their worst-case weights, and the trainers that use them.
"""

from drrlhf import backends
from drrlhf.ambiguity import (
    ERM,
    KL,
    TV,
    AmbiguitySet,
    ChiSquare,
    CVaR,
    Group,
    parse_ambiguity,
)
from drrlhf.logprobs import linear_token_logprobs, sequence_logprobs, token_logprobs
from drrlhf.losses import (
    PreferenceLoss,
    RewardLoss,
    pair_losses,
    preference_loss,
    reward_loss,
)
from drrlhf.modules import PreferenceLossModule, RewardLossModule, RobustRiskModule
from drrlhf.robust import GroupState, RobustRisk, robust_risk
from drrlhf.version import __version__

__all__ = [
    "ERM", "KL", "TV", "AmbiguitySet", "CVaR", "ChiSquare", "Group", "GroupState",
    "PreferenceLoss", "PreferenceLossModule", "RewardLoss", "RewardLossModule", "RobustRisk",
    "RobustRiskModule", "__version__", "backends", "linear_token_logprobs", "pair_losses",
    "parse_ambiguity", "preference_loss", "reward_loss", "robust_risk", "sequence_logprobs",
    "token_logprobs",
]  # fmt: skip
