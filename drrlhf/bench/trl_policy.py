"""TRL's own policy loss on log-probs that are given: the number to equal and the time to beat."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from drrlhf.bench import peers


class _Alone:
    """What TRL's loss asks of an accelerator, in one process."""

    num_processes = 1

    def gather(self, x: Tensor) -> Tensor:
        return x

    def reduce(self, x: Tensor, reduction: str = "sum") -> Tensor:
        return x


def trl_policy_loss(
    logps: Tensor,
    old_logps: Tensor | None,
    advantages: Tensor,
    mask: Tensor,
    *,
    ref_logps: Tensor | None = None,
    kl_beta: float = 0.0,
    correct_kl: bool = True,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    loss_type: str = "dapo",
    importance_level: str = "token",
    max_completion_length: int = 1,
    entropy: Tensor | None = None,
) -> tuple[Tensor, dict[str, float]]:
    """The loss () and metrics of ``trl.GRPOTrainer._compute_loss`` (TRL 1.16), which runs here
    without a model: log-probs (S, L) and mask (S, L) are given. Padded only, as TRL.

    Raises:
        Unavailable: TRL is not installed, or does not import.
    """
    trl_trainer = peers.load("trl.trainer.grpo_trainer", "trl").GRPOTrainer
    entropies = torch.zeros_like(logps) if entropy is None else entropy
    trainer: Any = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (logps, entropies, None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=importance_level,
        beta=kl_beta,
        loss_type=loss_type,
        epsilon_low=clip_low,
        epsilon_high=clip_high,
        use_vllm=False,
        args=SimpleNamespace(use_bias_correction_kl=correct_kl, delta=None, steps_per_generation=1),
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        max_completion_length=max_completion_length,
        accelerator=_Alone(),
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
    )
    prompts = torch.ones(len(logps), 1, dtype=torch.long, device=logps.device)
    inputs: dict[str, Any] = {
        "prompt_ids": prompts,
        "prompt_mask": prompts,
        "completion_mask": mask,
        "completion_ids": mask,
        "advantages": advantages,
        "num_items_in_batch": mask.sum(),
    }
    if old_logps is not None:
        inputs["old_per_token_logps"] = old_logps
    if ref_logps is not None:
        inputs["ref_per_token_logps"] = ref_logps
    loss = trl_trainer._compute_loss(trainer, None, inputs)
    return loss, {name: found[0] for name, found in trainer._metrics["train"].items()}
