"""What `reward_ambiguity` means to GRPO: how the rewards of several functions become one."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from drrlhf.functional.robust_reward import WORST, robust_reward, uncertainty
from drrlhf.functional.row_sets import MEAN, solvable


class WorstReward:
    """Stands for TRL's ``reward_weights`` (K,), where TRL multiplies the rewards (n, K) of its
    functions by them and sums over functions: the product has one column, the worst case."""

    def __init__(self, weights: Tensor, ambiguity: str) -> None:
        self.weights, self.ambiguity = weights, ambiguity

    def to(self, device: object) -> WorstReward:
        return WorstReward(self.weights.to(device), self.ambiguity)  # type: ignore[call-overload]

    def unsqueeze(self, dim: int) -> WorstReward:
        """As TRL makes a row of weights: here it is known what is weighed."""
        return self

    def __rmul__(self, rewards: Tensor) -> Tensor:
        return robust_reward(rewards, self.ambiguity, self.weights).unsqueeze(1)


def check_ambiguity(ambiguity: str, weights: Sequence[float] | None) -> None:
    """Refuse what ``reward_ambiguity`` cannot be, by itself or with TRL's ``reward_weights``.

    Raises:
        ValueError: `robust_reward` knows no such set, or has no worst case around the weights.
    """
    if uncertainty("reward_ambiguity", ambiguity) is None:
        solvable("reward_ambiguity", ambiguity, WORST)
    if ambiguity == MEAN or weights is None or all(0 <= w < math.inf for w in weights):
        return
    raise ValueError(
        f"reward_weights: expected finite numbers >= 0 with reward_ambiguity={ambiguity!r}, got "
        f"{list(weights)}; for a reward that is to be small, negate what its function returns and "
        f"its weight, or take reward_ambiguity={MEAN!r}"
    )
