"""drrlhf: distributionally robust RLHF.

Robust reward models, robust DPO and robust policy optimisation (arXiv 2503.00539): losses against
the worst distribution near the data, their worst-case weights, and the trainers that use them.

Names are imported when they are first used, so that `drrlhf --help` need not wait for torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import TYPE_CHECKING, Any

from drrlhf.version import __version__

if TYPE_CHECKING:
    from drrlhf import backends
    from drrlhf.ambiguity import ERM, KL, TV, AmbiguitySet, ChiSquare, CVaR, Group, parse_ambiguity
    from drrlhf.functional.linear_preference_loss import (
        LinearPreferenceLoss,
        linear_preference_loss,
    )
    from drrlhf.functional.pair_losses import pair_losses
    from drrlhf.functional.policy_loss import PolicyLoss, policy_loss
    from drrlhf.functional.preference_loss import PreferenceLoss, preference_loss
    from drrlhf.functional.reward_loss import RewardLoss, reward_loss
    from drrlhf.functional.robust_reward import robust_reward
    from drrlhf.functional.robust_risk import GroupState, NormaliserState, RobustRisk, robust_risk
    from drrlhf.functional.worst_view import worst_view
    from drrlhf.logprobs import (
        TokenLogprobs,
        linear_token_logprobs,
        sequence_logprobs,
        token_logprobs,
    )
    from drrlhf.modules import (
        LinearPreferenceLossModule,
        PolicyLossModule,
        PreferenceLossModule,
        RewardLossModule,
        RobustRiskModule,
    )

__all__ = [
    "ERM",
    "KL",
    "TV",
    "AmbiguitySet",
    "CVaR",
    "ChiSquare",
    "Group",
    "GroupState",
    "LinearPreferenceLoss",
    "LinearPreferenceLossModule",
    "NormaliserState",
    "PolicyLoss",
    "PolicyLossModule",
    "PreferenceLoss",
    "PreferenceLossModule",
    "RewardLoss",
    "RewardLossModule",
    "RobustRisk",
    "RobustRiskModule",
    "TokenLogprobs",
    "__version__",
    "backends",
    "linear_preference_loss",
    "linear_token_logprobs",
    "pair_losses",
    "parse_ambiguity",
    "policy_loss",
    "preference_loss",
    "reward_loss",
    "robust_reward",
    "robust_risk",
    "sequence_logprobs",
    "token_logprobs",
    "worst_view",
]

# Where the names are, the least to import first.
_HOMES = ("ambiguity", "logprobs", "functional", "modules")


def _find_kernels() -> None:
    """In a checkout that nobody has installed the kernels lie beside the package, not in it."""
    root = Path(__file__).parent.parent
    if not (root / "csrc").is_dir() or find_spec("drrlhf.kernels") is not None:
        return
    folder = root / "kernels"
    found = spec_from_file_location(
        "drrlhf.kernels", folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    assert found is not None and found.loader is not None
    sys.modules["drrlhf.kernels"] = kernels = module_from_spec(found)
    found.loader.exec_module(kernels)


_find_kernels()


def __getattr__(name: str) -> Any:
    if name == "backends":
        return import_module("drrlhf.backends")
    for home in _HOMES if name in __all__ else ():
        module = import_module(f"drrlhf.{home}")
        if hasattr(module, name):
            globals()[name] = value = getattr(module, name)
            return value
    raise AttributeError(f"module 'drrlhf' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
