"""Token log-probs to the worst case of DPO's loss and its gradient by sequence."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from drrlhf.ambiguity import Encoded
from drrlhf.conventions import statistics_dtype
from drrlhf.reference.robust_risk import solve
from drrlhf.reference.sequence_logprobs import sequence_logprobs


def sequence_preference_loss(
    logps: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor | None,
    ref_logps: Tensor,
    nominal: Tensor | None,
    groups: Tensor | None,
    group_weights: Tensor | None,
    ignore_index: int,
    beta: float,
    label_smoothing: float,
    *ambiguity: Any,
) -> tuple[Tensor, ...]:
    """`robust_risk` of -(1 - eps) log sigmoid(h) - eps log sigmoid(-h), eps = label_smoothing and
    h = beta (u chosen - u rejected), where u are the sums of token log-probs less `ref_logps` (2n,)
    of sequences stacked [chosen…, rejected…].

    Returns value (), weights, losses, chosen_rewards, rejected_rewards (n,), dual (), group weights
    (G,), sequence log-probs (2n,), and d value / d sequence log-probs (2n,).
    """
    sums = sequence_logprobs(logps.double(), labels, cu_seqlens, ignore_index, False)
    chosen, rejected = (sums - ref_logps.double()).chunk(2) if len(sums) else (sums, sums)
    h, eps = beta * (chosen - rejected), label_smoothing
    losses = -(1 - eps) * F.logsigmoid(h) - eps * F.logsigmoid(-h)
    slopes = beta * (eps * torch.sigmoid(h) - (1 - eps) * torch.sigmoid(-h))
    value, q, dual, state = solve(losses, nominal, groups, group_weights, Encoded(*ambiguity))
    # A masked pair gets none, whatever its derivative is.
    d = torch.where(q == 0, 0, q * slopes)
    results = (value, q, losses, beta * chosen, beta * rejected, dual)
    dtype = statistics_dtype(logps)
    gradient = torch.cat([d, -d])
    return (*(x.to(dtype) for x in results), state, sums.to(dtype), gradient.to(dtype))
