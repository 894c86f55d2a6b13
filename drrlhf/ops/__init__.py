"""Ops registered with torch.library: one file each holds its schema, fake and autograd."""

from drrlhf.ops.library import transformed
from drrlhf.ops.linear_token_logprobs import linear_token_logprobs
from drrlhf.ops.policy_loss import policy_loss
from drrlhf.ops.preference_loss import preference_loss
from drrlhf.ops.reward_loss import reward_loss
from drrlhf.ops.robust_risk import robust_risk
from drrlhf.ops.sequence_logprobs import sequence_logprobs
from drrlhf.ops.sequence_preference_loss import sequence_preference_loss
from drrlhf.ops.token_logprobs import InPlace as InPlaceTokenLogprobs
from drrlhf.ops.token_logprobs import token_logprobs

__all__ = [
    "InPlaceTokenLogprobs", "linear_token_logprobs", "policy_loss", "preference_loss",
    "reward_loss", "robust_risk", "sequence_logprobs", "sequence_preference_loss", "token_logprobs",
    "transformed",
]  # fmt: skip
