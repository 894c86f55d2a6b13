"""TRL's reward trainer with worst-case weights."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import trl
from torch import Tensor

from drrlhf import reward_inputs
from drrlhf.functional.reward_loss import reward_losses
from drrlhf.layouts.lengths import TwoParts
from drrlhf.trl import columns, rows
from drrlhf.trl.pairs import PairsMixin
from drrlhf.trl.seam import Recorder
from drrlhf.trl.view_texts import Tokenize


@dataclass
class CheckedPadding:
    """A data collator around another, whose padding the model must skip."""

    collator: Callable[[list[dict[str, Any]]], Any]
    pad_token_id: int | None

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.collator(examples)
        reward_inputs.check_padding(batch, self.pad_token_id)
        return batch


class RewardTrainer(PairsMixin, trl.RewardTrainer):
    """TRL's ``RewardTrainer``; the pair losses are weighed by ``args.ambiguity``.

    The centring term of ``center_rewards_coefficient`` is part of each pair's loss, so that the
    adversary weighs it too. With ``ambiguity="erm"`` the numbers are TRL's. Datasets may have the
    columns ``group`` (numbers from 0, codes or text), ``weight`` (>= 0) and ``p_chosen`` (in
    [0, 1], see ``args.label_ambiguity``) beside TRL's ``margin``.

    Raises:
        ValueError: a Group set without a ``group`` column or with another number of groups, a
            weight that is not finite and >= 0, a ``data_collator`` that pads with what the model
            does not skip, adapters with which a causal model cannot find the last token, Liger's
            fused linear cross-entropy, or what `PairsMixin` refuses.
    """

    __signature__ = inspect.signature(trl.RewardTrainer)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        pad = reward_inputs.pad_token_id(self.model)
        self.data_collator = CheckedPadding(self.data_collator, pad)

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

    def _check_setup(self) -> None:
        super()._check_setup()
        reward_inputs.check_adapters(self.model)

    @property
    def _loss_outside_the_set(self) -> bool:
        return bool(getattr(self.args, "batch_sum_coefficient", 0.0)) and self.model.training

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs, nominal, groups, p_chosen = columns.take(inputs)
        originals = [inputs.pop(name, None) for name in rows.ORIGINALS]
        recorder = Recorder(self._runner(model))
        # A margin is the loss's, and TRL would hand it to the model.
        asked = {name: value for name, value in inputs.items() if name != "margin"}
        result = super().compute_loss(recorder, asked, return_outputs, num_items_in_batch)
        chosen, rejected = recorder.output("logits").squeeze(-1).chunk(2)
        losses = self._losses(chosen, rejected, inputs, nominal, p_chosen)
        for reward, original in zip((chosen, rejected), originals, strict=True):
            if original is not None:
                change = reward - torch.where(original.isnan(), reward.detach(), original)
                losses = losses + self.args.view_consistency_coefficient * change.square()
        correct = chosen.detach() > rejected.detach()
        value = self._reduced(losses, correct, nominal, groups)
        if self._loss_outside_the_set:
            share = 1.0 if self._pass is None else self._pass.outside
            total = chosen.sum() + rejected.sum()
            value = value + share * self.args.batch_sum_coefficient * total.square()
        return (value, result[1]) if return_outputs else value

    def _for_padded(self, model: Any) -> Any:
        """In two parts, where calls are cheap: see FACTS.md. Several processes may have to call
        their models as often; and what a model draws is drawn for the batch as it is, the noise of
        NEFTune by its width."""
        alone = self.accelerator.num_processes == 1 and self.accelerator.device.type == "cpu"
        drawn = self.args.neftune_noise_alpha is not None or not self.args.disable_dropout
        whole = self.args.torch_compile or (drawn and self.model.training)
        return TwoParts(model) if alone and not whole else model

    def _losses(
        self,
        chosen: Tensor,
        rejected: Tensor,
        inputs: Mapping[str, Tensor],
        nominal: Tensor | None,
        p_chosen: Tensor | None,
    ) -> Tensor:
        """Of rewards (n,) of pairs, of whose batch ``inputs`` may have the margin: (n,)."""
        center = self.args.center_rewards_coefficient or 0.0
        labels = self._labels(p_chosen)
        return reward_losses(chosen, rejected, inputs.get("margin"), center, nominal, labels)

    # -- views ---------------------------------------------------------------------------------

    def _tokenize(self, dataset: Any, tokenizer: Any) -> Tokenize | None:
        """TRL takes ids as they are; those of changed texts are made as `reward_inputs` does.

        Raises:
            ValueError: it makes others of the texts than the dataset has.
        """
        if "chosen_ids" not in dataset.column_names:
            return None

        tokenize = partial(reward_inputs.pair_ids, tokenizer)
        first = dataset[0]
        if any(first[name] != ids for name, ids in tokenize(first).items()):
            raise ValueError(
                "views: the ids of train_dataset are not what drrlhf.reward_inputs makes of its "
                "texts, so those of changed texts cannot be made alike; give the texts alone"
            )
        return tokenize

    def _score_sequences(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        return self._runner(model)(**inputs, use_cache=False).logits.float()

    def _losses_of_scores(
        self, chosen: Tensor, rejected: Tensor, columns: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        rewards = chosen[:, 0], rejected[:, 0]
        losses = self._losses(*rewards, columns, None, columns.get("p_chosen"))
        return losses, rewards[0] - rewards[1]

    def _of_originals(self, chosen: Tensor, rejected: Tensor, scored: Tensor) -> dict[str, Tensor]:
        if not self.args.view_consistency_coefficient:
            return {}
        rewards = (torch.where(scored, side[:, 0], torch.nan) for side in (chosen, rejected))
        return dict(zip(rows.ORIGINALS, rewards, strict=True))
