"""Ops registered with torch.library: one file each holds its schema, fake and autograd."""

from drrlhf.ops.library import SCHEMAS, transformed
from drrlhf.ops.linear_token_logprobs import linear_token_logprobs
from drrlhf.ops.policy_loss import policy_loss
from drrlhf.ops.robust_risk import robust_risk
from drrlhf.ops.row_worst_case import row_worst_case
from drrlhf.ops.sequence_logprobs import sequence_logprobs
from drrlhf.ops.sequence_preference_loss import sequence_preference_loss
from drrlhf.ops.token_logprobs import token_logprobs, token_logprobs_in_place

__all__ = [
    "SCHEMAS",
    "linear_token_logprobs",
    "policy_loss",
    "robust_risk",
    "row_worst_case",
    "sequence_logprobs",
    "sequence_preference_loss",
    "token_logprobs",
    "token_logprobs_in_place",
    "transformed",
]
