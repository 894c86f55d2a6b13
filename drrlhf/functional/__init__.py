"""The public functions, one file each: checks, then ops and plain PyTorch."""

from drrlhf.functional.linear_preference_loss import LinearPreferenceLoss, linear_preference_loss
from drrlhf.functional.pair_losses import pair_losses
from drrlhf.functional.policy_loss import PolicyLoss, policy_loss
from drrlhf.functional.preference_loss import PreferenceLoss, preference_loss
from drrlhf.functional.reward_loss import RewardLoss, reward_loss
from drrlhf.functional.robust_reward import robust_reward
from drrlhf.functional.robust_risk import GroupState, NormaliserState, RobustRisk, robust_risk
from drrlhf.functional.worst_view import worst_view

__all__ = [
    "GroupState",
    "LinearPreferenceLoss",
    "NormaliserState",
    "PolicyLoss",
    "PreferenceLoss",
    "RewardLoss",
    "RobustRisk",
    "linear_preference_loss",
    "pair_losses",
    "policy_loss",
    "preference_loss",
    "reward_loss",
    "robust_reward",
    "robust_risk",
    "worst_view",
]
