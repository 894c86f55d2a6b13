"""What the trainers of pairs share: columns, the reduction of a batch, metrics."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor

from drrlhf import robust_risk
from drrlhf.functional.label_probs import label_radius
from drrlhf.trl import columns, weighted
from drrlhf.trl.seam import overridden
from drrlhf.trl.step import Pass, TwoPasses
from drrlhf.trl.views import ViewsMixin
from drrlhf.trl.weighted import PAIRS, Weighted

logger = get_logger(__name__)


class PairsMixin(ViewsMixin, TwoPasses):
    """Put before a TRL trainer of pairs: reads ``args.ambiguity`` and keeps what the set needs.

    Metrics added to TRL's own, for every set but plain ``"erm"`` (there only with weights):
    ``robust/value`` the worst-case risk, ``robust/mean_loss`` what plain training would have seen
    (the nominal mean); ``robust/effective_sample_size`` 1 / sum q² as a share of the pairs that are
    not masked, in (0, 1]; ``robust/max_weight`` the largest weight as a multiple of the uniform
    one; ``robust/kept`` the share of pairs with any weight. With a ``group`` column also
    ``group/<g>/loss`` and ``/accuracy`` (plain means over the pairs of g that are not masked),
    ``/weight`` (its share of q) and, for a Group set, ``/state`` (the weight kept from step to
    step). In training they describe the batch of the adversary (see ``robust_scope``), in
    evaluation the whole evaluation set, there also ``robust/worst_group_loss`` and
    ``/worst_group_accuracy``; and ``eval_loss`` is then the worst case over that set.
    """

    args: Any
    accelerator: Any
    model: Any
    data_collator: Any
    _metrics: dict[str, Any]
    _signature_columns: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        config = given.get("args")
        self._read_set(config, given)
        self._views = getattr(config, "views", None) or ()  # TRL's own configuration has none
        self._pass: Pass | None = None
        if config is not None:
            self._check_arguments(config)
            if label_radius(getattr(config, "label_ambiguity", "erm")) and not self._doubted:
                raise ValueError(
                    f"label_ambiguity={config.label_ambiguity!r} needs a column 'p_chosen' in the "
                    "training data, the probability of every label; add it, or leave that option"
                )
        # TRL's DPO trainer would warn that it ignores the flag, and clear it.
        self._read_rows(config)
        hidden = {"padding_free": False} if self._padding_free else {}
        with overridden(config, **hidden):
            super().__init__(*args, **kwargs)
        self._prepare_rows(self.model, getattr(self, "ref_model", None))
        tokens = self.data_collator
        coded = self._numbered is not None or columns.may_be_coded(given.get("train_dataset"))
        unread = self._unread_entries
        self.data_collator = columns.PairColumns(tokens, self._numbered, coded, unread)
        self._collate_views(tokens)
        self._make_states()
        self._check_setup()
        two_passes = self._wants_whole_step(self.args.gradient_accumulation_steps)
        if self._adversarial and two_passes and self.args.optim in ("lomo", "adalomo"):
            raise ValueError(
                f"optim={str(self.args.optim.value)!r} steps inside of every backward, and the "
                "worst case of a step of several batches is that of one model: use another "
                "optimizer, gradient_accumulation_steps=1, or robust_scope='microbatch'."
            )
        self._warn()

    @property
    def _unread_entries(self) -> tuple[str, ...]:
        """What TRL's collator takes from a dataset and its loss, as configured, does not read."""
        return ()

    def _warn(self) -> None:
        if self._weighted:
            logger.warning("The column 'weight' is used as the nominal weight of every pair.")
        if self._doubted:
            logger.warning("The column 'p_chosen' is used as the probability of every label.")

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        """TRL's; a dataset of which ``max_length`` leaves nothing is refused."""
        prepared = super()._prepare_dataset(  # type: ignore[misc]
            dataset, processing_class, args, dataset_name
        )
        rows = len(dataset) if hasattr(dataset, "__len__") else 0
        if rows and not len(prepared):
            raise ValueError(
                f"the {dataset_name} dataset: no pair fits: all {rows} are longer than max_length="
                f"{args.max_length} tokens, or their prompts are; raise it, or give shorter texts."
            )
        return prepared

    def _set_signature_columns_if_needed(self) -> None:
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if fresh:
            self._signature_columns += columns.PAIR_COLUMNS

    # -- the reduction -------------------------------------------------------------------------

    def _labels(self, p_chosen: Tensor | None) -> dict[str, Any]:
        """What a loss is told of labels that are probabilities (n,)."""
        if p_chosen is None:
            return {}
        ambiguity = getattr(self.args, "label_ambiguity", "erm")
        return {"label_probs": p_chosen, "label_ambiguity": ambiguity}

    def _reduced(
        self,
        losses: Tensor,  # (n,), differentiable
        correct: Tensor,  # (n,)
        nominal: Tensor | None,  # (n,)
        groups: Tensor | None,  # (n,)
    ) -> Tensor:
        """The number () to backpropagate for a batch: in one pass, or in one of the step's two."""
        seen = Weighted(losses.detach(), nominal, groups, correct=correct)
        if self._pass is not None:
            self._pass.seen.append(seen)
            return self._pass.reduce(losses)
        if self._evaluated is not None and not self.model.training:
            self._check_groups(groups)
            self._evaluated.append(self.accelerator.gather_for_metrics(seen.table()).cpu())
            return robust_risk(losses, nominal=nominal).value
        update = self.model.training and (self._streaming or self.accelerator.sync_gradients)
        evaluated = not self.model.training
        risk = self._solve(losses, nominal, groups, update, self._process_group, evaluated)
        self._log_pairs(seen._replace(weights=risk.weights), risk.value.detach())
        return risk.value

    # -- metrics -------------------------------------------------------------------------------

    def _log_pairs(self, seen: Weighted, value: Tensor) -> None:
        """Metrics of the pairs of this rank, whose worst case has the value (), over all ranks."""
        if seen.groups is None and not (self._adversarial or seen.nominal is not None):
            return
        table = seen.table()
        if self.accelerator.num_processes > 1:
            if self._process_group is None:  # then every rank's weights sum to 1
                assert seen.weights is not None
                weights = seen.weights / self.accelerator.num_processes
                table = seen._replace(weights=weights).table()
            padded = self.accelerator.pad_across_processes(table, dim=0, pad_index=float("nan"))
            table = self.accelerator.gather(padded)
            table = table[~table[:, 1].isnan()]
            value = self.accelerator.gather(value.reshape(1)).mean()
        everyone = weighted.from_table(table.cpu())
        found: dict[str, float] = {}
        if self._adversarial or seen.nominal is not None:
            found |= weighted.summary(everyone, value.item(), PAIRS)
        found |= self._by_group(everyone, PAIRS)
        self._log(found, "train" if self.model.training else "eval")

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """TRL's loop; then the worst case over all of its pairs, which no batch sees alone."""
        with self._evaluating() as tables:
            output = super().evaluation_loop(  # type: ignore[misc]
                dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
            )
        if not tables:
            return output
        seen = weighted.from_table(torch.cat(tables))._replace(weights=None)
        assert seen.nominal is not None
        found = {}
        if self._adversarial or bool((seen.nominal != 1).any()):
            there = seen.on(self.accelerator.device)
            known = (there.losses, there.nominal, there.groups)
            risk = self._solve(*known, update=False, evaluated=True)
            seen = seen._replace(weights=risk.weights.cpu())
            found = weighted.summary(seen, risk.value.item(), PAIRS)
            if not self._loss_outside_the_set:
                output.metrics[f"{metric_key_prefix}_loss"] = risk.value.item()
        found |= weighted.worst_group(seen)
        found |= weighted.by_group(seen, None, self._label, PAIRS)
        for name, number in found.items():
            self._metrics["eval"][name] = [number]
        return output
