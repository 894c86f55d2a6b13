"""Every op in plain PyTorch, by subject: the definition, the oracle of the tests, the fallback."""

from drrlhf.reference.linear_token_logprobs import (
    linear_token_logprobs,
    linear_token_logprobs_backward,
)
from drrlhf.reference.policy_loss import policy_loss, policy_loss_backward
from drrlhf.reference.robust_risk import robust_risk
from drrlhf.reference.row_worst_case import row_worst_case
from drrlhf.reference.sequence_logprobs import sequence_logprobs, sequence_logprobs_backward
from drrlhf.reference.sequence_preference_loss import sequence_preference_loss
from drrlhf.reference.token_logprobs import (
    token_logprobs,
    token_logprobs_backward,
    token_logprobs_backward_,
)

__all__ = [
    "linear_token_logprobs",
    "linear_token_logprobs_backward",
    "policy_loss",
    "policy_loss_backward",
    "robust_risk",
    "row_worst_case",
    "sequence_logprobs",
    "sequence_logprobs_backward",
    "sequence_preference_loss",
    "token_logprobs",
    "token_logprobs_backward",
    "token_logprobs_backward_",
]
