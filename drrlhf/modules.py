"""`nn.Module` twins of the losses: options fixed once, states kept as buffers.

In eval mode a module leaves the weights of groups and the running normaliser as they are.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from drrlhf import functional
from drrlhf.ambiguity import ERM, AmbiguitySet, Group, parse_ambiguity
from drrlhf.functional import GroupState, NormaliserState


class _RobustModule(nn.Module):
    def __init__(self, ambiguity: str | AmbiguitySet = ERM(), **options: Any) -> None:  # noqa: B008
        super().__init__()
        self.ambiguity = parse_ambiguity(ambiguity)
        self.options = options
        grouped = isinstance(self.ambiguity, Group)
        self.group_state = GroupState(self.ambiguity.num_groups) if grouped else None  # type: ignore[attr-defined]
        streaming = getattr(self.ambiguity, "momentum", None) is not None
        self.normaliser_state = NormaliserState() if streaming else None

    def _call(self, function: Any, *inputs: Tensor | None, **keywords: Any) -> Any:
        return function(
            *inputs,
            ambiguity=self.ambiguity,
            group_state=self.group_state,
            normaliser_state=self.normaliser_state,
            update=self.training,
            **self.options,
            **keywords,
        )

    def extra_repr(self) -> str:
        return ", ".join([str(self.ambiguity), *(f"{k}={v!r}" for k, v in self.options.items())])


class RobustRiskModule(_RobustModule):
    """`drrlhf.robust_risk` as a module: ``RobustRiskModule("tv:0.1")(losses)``."""

    def forward(self, losses: Tensor, **keywords: Any) -> functional.RobustRisk:
        return self._call(functional.robust_risk, losses, **keywords)


class PreferenceLossModule(_RobustModule):
    """`drrlhf.preference_loss` as a module; options are its keyword arguments."""

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        **keywords: Any,
    ) -> functional.PreferenceLoss:
        inputs = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
        return self._call(functional.preference_loss, *inputs, **keywords)


class LinearPreferenceLossModule(_RobustModule):
    """`drrlhf.linear_preference_loss` as a module; options are its keyword arguments."""

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        **keywords: Any,
    ) -> functional.LinearPreferenceLoss:
        inputs = (hidden, weight, labels, ref_logps)
        return self._call(functional.linear_preference_loss, *inputs, **keywords)


class RewardLossModule(_RobustModule):
    """`drrlhf.reward_loss` as a module; options are its keyword arguments."""

    def forward(
        self, chosen_rewards: Tensor, rejected_rewards: Tensor, **keywords: Any
    ) -> functional.RewardLoss:
        return self._call(functional.reward_loss, chosen_rewards, rejected_rewards, **keywords)


class PolicyLossModule(_RobustModule):
    """`drrlhf.policy_loss` as a module; options are its keyword arguments."""

    def forward(
        self,
        logps: Tensor,
        old_logps: Tensor | None,
        advantages: Tensor,
        rewards: Tensor,
        prompt_ids: Tensor,
        **keywords: Any,
    ) -> functional.PolicyLoss:
        inputs = (logps, old_logps, advantages, rewards, prompt_ids)
        return self._call(functional.policy_loss, *inputs, **keywords)
