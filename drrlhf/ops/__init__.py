"""Ops registered with torch.library: one file each holds its schema, fake and autograd."""

from drrlhf.ops.preference_loss import preference_loss
from drrlhf.ops.reward_loss import reward_loss
from drrlhf.ops.robust_risk import robust_risk
from drrlhf.ops.token_logprobs import token_logprobs

__all__ = ["preference_loss", "reward_loss", "robust_risk", "token_logprobs"]
