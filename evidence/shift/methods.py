"""The methods of PROTOCOL.md with what each may tune, one training, and its marks on a test."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from drrlhf.demo import reward
from evidence.shift.shifts import Drawn

LEARNING_RATES = (1e-3, 3e-4)
BINS = 10


@dataclass(frozen=True)
class Config:
    """What a method may tune; ``G`` in ``ambiguity`` is the number of training domains."""

    ambiguity: str
    lr: float
    weight_decay: float = 0.01
    balanced: bool = False


def _strengths(*ambiguities: str) -> list[Config]:
    return [Config(ambiguity, lr) for ambiguity in ambiguities for lr in LEARNING_RATES]


def _decays(balanced: bool) -> list[Config]:
    return [
        Config("erm", lr, decay, balanced) for decay in (0.01, 0.1, 1.0) for lr in LEARNING_RATES
    ]


METHODS: dict[str, list[Config]] = {
    "erm": _decays(balanced=False),
    "balanced": _decays(balanced=True),
    "tv": _strengths("tv:0.02", "tv:0.05", "tv:0.1"),
    "kl": _strengths("kl:0.02", "kl:0.05", "kl:0.2"),
    "chi2": _strengths("chi2:0.02", "chi2:0.1", "chi2:0.5"),
    "cvar": _strengths("cvar:0.9", "cvar:0.7", "cvar:0.5"),
    "group": _strengths("group:G,step_size=0.01", "group:G,step_size=0.1", "group:G,step_size=1"),
    "tv-trim": _strengths("tv:0.05,trim=0.02", "tv:0.05,trim=0.05", "tv:0.05,trim=0.1"),
    "kl-trim": _strengths("kl:0.05,trim=0.02", "kl:0.05,trim=0.05", "kl:0.05,trim=0.1"),
    "cvar-trim": _strengths("cvar:0.7,trim=0.02", "cvar:0.7,trim=0.05", "cvar:0.7,trim=0.1"),
    "optimistic": _strengths("kl:temperature=-2", "kl:temperature=-1", "kl:temperature=-0.5"),
}


def train_head(
    vectors: Tensor, rows: Tensor, groups: Tensor, config: Config, seed: int
) -> nn.Module:
    """A reward head (d -> hidden -> 1) on pairs ``rows`` (n, 2) of ``vectors``; ``groups`` (n,).

    Equal seeds start from equal weights and see equal batches, whatever the configuration.
    """
    counts = torch.bincount(groups)
    ambiguity = config.ambiguity.replace("G", str(len(counts)))
    plain = reward.Config(ambiguity, config.lr, config.weight_decay)
    mass = (1 / counts.float())[groups] if config.balanced else None
    return reward.train_head(vectors, rows, groups, plain, seed, nominal=mass)


@torch.no_grad()
def marks(rewards: Tensor, drawn: Drawn) -> dict[str, float]:
    """Accuracy, NLL, calibration error and Brier score of ``rewards``, one for each text's row."""
    margin = (rewards[drawn.rows[:, 0]] - rewards[drawn.rows[:, 1]]).double()
    right = ((margin > 0).double() + (margin >= 0).double()) / 2
    return {
        "accuracy": right.mean().item(),
        "nll": F.softplus(-margin).mean().item(),
        "ece": calibration_error(torch.sigmoid(margin.abs()), right),
        "brier": (torch.sigmoid(margin) - drawn.human).square().mean().item(),
    }


def calibration_error(confidence: Tensor, right: Tensor) -> float:
    """Sum over equal bins of [1/2, 1] of their share times |mean confidence - mean right|."""
    bins = ((confidence - 0.5) * 2 * BINS).long().clamp(max=BINS - 1)
    gap = torch.zeros(BINS, dtype=torch.double).index_add_(0, bins, confidence - right)
    return gap.abs().sum().item() / len(bins)
