"""`nn.Module` twins of the losses: options fixed once, states kept as buffers.

In eval mode a module leaves the weights of groups and the running normaliser as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from drrlhf import functional
from drrlhf.ambiguity import ERM, AmbiguitySet, Group, parse_ambiguity
from drrlhf.functional import GroupState, NormaliserState


class _RobustModule(nn.Module):
    """Called with the tensors of `function`, and with keyword arguments beside the options."""

    function: Callable[..., Any]

    def __init__(self, ambiguity: str | AmbiguitySet = ERM(), **options: Any) -> None:  # noqa: B008
        super().__init__()
        self.ambiguity = parse_ambiguity(ambiguity)
        self.options = options
        grouped = isinstance(self.ambiguity, Group)
        self.group_state = GroupState(self.ambiguity.num_groups) if grouped else None  # type: ignore[attr-defined]
        streaming = getattr(self.ambiguity, "momentum", None) is not None
        self.normaliser_state = NormaliserState() if streaming else None

    def forward(self, *inputs: Tensor | None, **keywords: Any) -> Any:
        """What `function` returns."""
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


class PreferenceLossModule(_RobustModule):
    """`drrlhf.preference_loss` as a module; options are its keyword arguments."""

    function = staticmethod(functional.preference_loss)


class LinearPreferenceLossModule(_RobustModule):
    """`drrlhf.linear_preference_loss` as a module; options are its keyword arguments."""

    function = staticmethod(functional.linear_preference_loss)


class RewardLossModule(_RobustModule):
    """`drrlhf.reward_loss` as a module; options are its keyword arguments."""

    function = staticmethod(functional.reward_loss)


class PolicyLossModule(_RobustModule):
    """`drrlhf.policy_loss` as a module; options are its keyword arguments."""

    function = staticmethod(functional.policy_loss)
