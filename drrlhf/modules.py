"""`nn.Module` twins of the losses: options fixed once, states kept as buffers.

In eval mode a module leaves the weights of groups and the running normaliser as they are.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from drrlhf import functional
from drrlhf.ambiguity import ERM, AmbiguitySet, Group, parse_ambiguity
from drrlhf.functional import GroupState, NormaliserState
from drrlhf.functional.linear_preference_loss import LinearPreferenceLossOptions
from drrlhf.functional.policy_loss import PolicyLossOptions
from drrlhf.functional.preference_loss import PreferenceLossOptions
from drrlhf.functional.reward_loss import RewardLossOptions
from drrlhf.functional.robust_risk import RiskOptions

# What a module says to its function itself.
_OWN = ("ambiguity", "group_state", "normaliser_state", "update")


class _RobustModule(nn.Module):
    """``function`` with its options, which are its own keyword arguments and ``listed`` ones.

    Raises:
        TypeError: the function has no such option, or the module sets it itself.
    """

    function: ClassVar[Callable[..., Any]]
    listed: ClassVar[type]

    def __init__(self, ambiguity: str | AmbiguitySet = ERM(), **options: Any) -> None:  # noqa: B008
        super().__init__()
        known = {*inspect.signature(self.function).parameters, *self.listed.__annotations__}
        for name in options:
            if name in _OWN or name not in known:
                why = "it is the module's own" if name in _OWN else "there is no such option"
                raise TypeError(
                    f"{type(self).__name__}() got an unexpected keyword argument {name!r}: {why}"
                )
        self.ambiguity = parse_ambiguity(ambiguity)
        self.options = options
        grouped = isinstance(self.ambiguity, Group)
        self.group_state = GroupState(self.ambiguity.num_groups) if grouped else None  # type: ignore[attr-defined]
        streaming = getattr(self.ambiguity, "momentum", None) is not None
        self.normaliser_state = NormaliserState() if streaming else None

    def _call(self, *inputs: Tensor | None, **keywords: Any) -> Any:
        return self.function(
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

    function = staticmethod(functional.robust_risk)
    listed = RiskOptions

    def forward(self, losses: Tensor, **keywords: Any) -> functional.RobustRisk:
        return self._call(losses, **keywords)


class PreferenceLossModule(_RobustModule):
    """`drrlhf.preference_loss` as a module; options are its keyword arguments."""

    function = staticmethod(functional.preference_loss)
    listed = PreferenceLossOptions

    def forward(
        self,
        chosen_logps: Tensor,
        rejected_logps: Tensor,
        ref_chosen_logps: Tensor | None = None,
        ref_rejected_logps: Tensor | None = None,
        **keywords: Any,
    ) -> functional.PreferenceLoss:
        inputs = (chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps)
        return self._call(*inputs, **keywords)


class LinearPreferenceLossModule(_RobustModule):
    """`drrlhf.linear_preference_loss` as a module; options are its keyword arguments."""

    function = staticmethod(functional.linear_preference_loss)
    listed = LinearPreferenceLossOptions

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        labels: Tensor,
        ref_logps: Tensor | None = None,
        **keywords: Any,
    ) -> functional.LinearPreferenceLoss:
        inputs = (hidden, weight, labels, ref_logps)
        return self._call(*inputs, **keywords)


class RewardLossModule(_RobustModule):
    """`drrlhf.reward_loss` as a module; options are its keyword arguments."""

    function = staticmethod(functional.reward_loss)
    listed = RewardLossOptions

    def forward(
        self, chosen_rewards: Tensor, rejected_rewards: Tensor, **keywords: Any
    ) -> functional.RewardLoss:
        return self._call(chosen_rewards, rejected_rewards, **keywords)


class PolicyLossModule(_RobustModule):
    """`drrlhf.policy_loss` as a module; options are its keyword arguments."""

    function = staticmethod(functional.policy_loss)
    listed = PolicyLossOptions

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
        return self._call(*inputs, **keywords)
