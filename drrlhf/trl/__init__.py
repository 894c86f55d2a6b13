"""TRL's trainers with worst-case weights.

``DPOConfig``, ``DPOTrainer``, ``RewardConfig``, ``RewardTrainer``, ``GRPOConfig`` and
``GRPOTrainer`` take TRL's names and arguments plus ``ambiguity``: changing the import is the whole
migration. TRL keeps doing the data, the forward passes and the metrics; the reduction of the losses
is ours, and so is the output head (``head="trl"`` in a configuration keeps TRL's). ``patch_head``
gives that head to TRL's own trainers (SFT, DPO, KTO, GRPO, RLOO) in this process, ``unpatch_head``
takes it back.

Raises:
    ImportError: TRL is missing, is not ``>=1.16,<2``, or one of the places used here has moved.
"""

from __future__ import annotations

from drrlhf.trl import seam  # first: it checks what the other modules hold on to
from drrlhf.trl.config import DPOConfig, GRPOConfig, RewardConfig
from drrlhf.trl.dpo import DPOTrainer
from drrlhf.trl.grpo import GRPOTrainer
from drrlhf.trl.head import patch_head, unpatch_head
from drrlhf.trl.reward import RewardTrainer

SUPPORTED_TRL = seam.SUPPORTED

__all__ = [
    "SUPPORTED_TRL",
    "DPOConfig",
    "DPOTrainer",
    "GRPOConfig",
    "GRPOTrainer",
    "RewardConfig",
    "RewardTrainer",
    "patch_head",
    "unpatch_head",
]
