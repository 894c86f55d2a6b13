"""TRL's reward trainer with worst-case weights."""

from __future__ import annotations

import inspect
from typing import Any

import trl

from drrlhf import reward_inputs
from drrlhf.functional.reward_loss import reward_losses
from drrlhf.trl import columns
from drrlhf.trl.base import AmbiguityMixin
from drrlhf.trl.seam import Recorder


class RewardTrainer(AmbiguityMixin, trl.RewardTrainer):
    """TRL's ``RewardTrainer``; the pair losses are weighed by ``args.ambiguity``.

    The centring term of ``center_rewards_coefficient`` is part of each pair's loss, so that the
    adversary weighs it too. With ``ambiguity="erm"`` the numbers are TRL's. Datasets may have the
    columns ``group`` (numbers from 0, codes or text), ``weight`` (>= 0) and ``p_chosen`` (in
    [0, 1], see ``args.label_ambiguity``) beside TRL's ``margin``.

    Raises:
        ValueError: a Group set without a ``group`` column or with another number of groups, a
            weight that is not finite and >= 0, a ``data_collator`` that pads with what the model
            does not skip, Liger's fused linear cross-entropy, or what `AmbiguityMixin` refuses.
    """

    __signature__ = inspect.signature(trl.RewardTrainer)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        collator, pad = self.data_collator, reward_inputs.pad_token_id(self.model)

        def checked(examples: list[dict[str, Any]]) -> Any:
            batch = collator(examples)
            reward_inputs.check_padding(batch, pad)
            return batch

        self.data_collator = checked

    def _check_arguments(self, config: Any) -> None:
        super()._check_arguments(config)
        if not config.use_liger_kernel:
            return
        given = config.liger_kernel_config or {}
        if given.get("fused_linear_cross_entropy"):
            raise ValueError(
                "liger_kernel_config: fused_linear_cross_entropy=True puts a language model's "
                "forward in the place of the reward model's, which has no such head; leave it out, "
                "the layer kernels are applied without it"
            )
        # On by default, and Liger 0.8 does not ask whether the model has a language model's head.
        config.liger_kernel_config = given | {"fused_linear_cross_entropy": False}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs, nominal, groups, p_chosen = columns.take(inputs)
        recorder = Recorder(self._runner(model))
        result = super().compute_loss(recorder, inputs, return_outputs, num_items_in_batch)
        chosen, rejected = recorder.output("logits").squeeze(-1).chunk(2)
        center = self.args.center_rewards_coefficient or 0.0
        labels = self._labels(p_chosen)
        losses = reward_losses(chosen, rejected, inputs.get("margin"), center, nominal, labels)
        correct = chosen.detach() > rejected.detach()
        value = self._reduced(losses, correct, nominal, groups)
        return (value, result[1]) if return_outputs else value
