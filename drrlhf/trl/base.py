"""What both trainers share: the columns, the group state, the worst-case metrics."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from safetensors.torch import load_file, save_file

from drrlhf import ERM, Group, GroupState, parse_ambiguity
from drrlhf.trl import columns

logger = get_logger(__name__)

GROUP_STATE_FILE = "drrlhf_group_state.safetensors"

# Metrics of one group each are logged for the ids below this: a column of user ids would
# otherwise fill the log.
LOGGED_GROUPS = 32


class AmbiguityMixin:
    """Put before a TRL trainer: reads ``args.ambiguity`` and keeps what the set needs.

    Metrics added to TRL's own, for every set but plain ``"erm"`` (there only with weights):
    ``robust/value`` the worst-case risk of the batch, ``robust/mean_loss`` what plain training
    would have seen there (the nominal mean); ``robust/effective_sample_size`` 1 / sum q²
    as a share of the pairs that are not masked, in (0, 1]; ``robust/max_weight`` the largest
    weight as a multiple of the uniform one. With a ``group`` column also ``group/<g>/loss`` and
    ``/accuracy`` (plain means over the pairs of g that are not masked), ``/weight`` (its share of
    q in the batch) and, for a Group set, ``/state`` (the weight kept from step to step).
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
        self.ambiguity = parse_ambiguity(getattr(config, "ambiguity", "erm"))
        num_groups = self.ambiguity.num_groups if isinstance(self.ambiguity, Group) else None
        present = columns.check_dataset(given.get("train_dataset"), "train_dataset", num_groups)
        columns.check_dataset(given.get("eval_dataset"), "eval_dataset", num_groups)
        if config is not None:
            self._check_arguments(config, columns.WEIGHT in present)
        super().__init__(*args, **kwargs)
        self.data_collator = columns.PairColumns(self.data_collator, num_groups)
        self.group_state: GroupState | None = None
        if num_groups is not None:
            self.group_state = GroupState(num_groups).to(self.accelerator.device)
        self._warn(columns.WEIGHT in present)

    def _check_arguments(self, config: Any, weighted: bool) -> None:
        """Refuse what cannot mean what it says, before the model is loaded."""
        if isinstance(self.ambiguity, Group) and config.world_size > 1:
            raise ValueError(
                f"ambiguity={str(self.ambiguity)!r} on {config.world_size} processes: the group "
                "weights would drift apart between them. Train with one process, or take another "
                "ambiguity set."
            )

    def _warn(self, weighted: bool) -> None:
        if weighted:
            logger.warning("The column 'weight' is used as the nominal weight of every pair.")
        parts = self.args.gradient_accumulation_steps, self.args.world_size
        if max(parts) > 1 and (weighted or self.ambiguity != ERM()):
            logger.warning(
                "The worst-case weights are computed over the batch of each device "
                f"({self.args.per_device_train_batch_size} pairs), not over the optimizer step's "
                f"({parts[0]} accumulation steps, {parts[1]} processes). The objective depends on "
                "that number: prefer a larger per_device_train_batch_size."
            )

    def _set_signature_columns_if_needed(self) -> None:
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if fresh:
            self._signature_columns += columns.COLUMNS

    # -- the reduction -------------------------------------------------------------------------

    def _risk_arguments(
        self, nominal: torch.Tensor | None, groups: torch.Tensor | None
    ) -> dict[str, Any]:
        """The keyword arguments that ``robust_risk`` and the losses share."""
        arguments: dict[str, Any] = {"ambiguity": self.ambiguity, "nominal": nominal}
        if self.group_state is not None:
            if groups is None:
                raise ValueError(
                    f"ambiguity={str(self.ambiguity)!r} needs a column 'group', and the batch has "
                    "none: add it to the dataset, and let a data_collator of your own keep it."
                )
            # one step of the adversary for one step of the optimizer
            update = self.model.training and self.accelerator.sync_gradients
            arguments |= {"groups": groups, "group_state": self.group_state, "update": update}
        return arguments

    # -- metrics -------------------------------------------------------------------------------

    def _log_pairs(
        self,
        value: torch.Tensor,  # ()
        weights: torch.Tensor,  # (n,)
        losses: torch.Tensor,  # (n,)
        correct: torch.Tensor,  # (n,)
        nominal: torch.Tensor | None,  # (n,)
        groups: torch.Tensor | None,  # (n,)
    ) -> None:
        metrics = self._metrics["train" if self.model.training else "eval"]
        kept = torch.ones_like(weights) if nominal is None else (nominal > 0).to(weights)
        if nominal is not None or self.ambiguity != ERM():
            count = kept.sum().clamp(min=1)
            spread = weights.square().sum().clamp_min(torch.finfo(weights.dtype).tiny)
            p = kept if nominal is None else nominal.to(weights)
            plain = torch.where(p > 0, p * losses, 0).sum() / p.sum().clamp_min(1e-30)
            row = [
                value.detach(), plain.to(weights),
                weights.sum().square() / (spread * count), weights.max() * count,
            ]  # fmt: skip
            mean = self.accelerator.gather(torch.stack(row).unsqueeze(0)).mean(0).tolist()
            for name, number in zip(
                ("value", "mean_loss", "effective_sample_size", "max_weight"), mean, strict=True
            ):
                metrics[f"robust/{name}"].append(number)
        if groups is not None:
            table = torch.stack([groups.to(weights), kept, losses, correct.to(weights), weights])
            self._log_groups(metrics, self.accelerator.gather(table.T.contiguous()).cpu())

    def _log_groups(self, metrics: dict[str, Any], table: torch.Tensor) -> None:
        ids, kept, losses, correct, weights = table.T
        for g in ids.unique().int().tolist():
            rows = (ids == g) & (kept > 0)
            if 0 <= g < LOGGED_GROUPS and rows.any():
                share = weights[rows].sum() / self.accelerator.num_processes
                metrics[f"group/{g}/loss"].append(losses[rows].mean().item())
                metrics[f"group/{g}/accuracy"].append(correct[rows].mean().item())
                metrics[f"group/{g}/weight"].append(share.item())
        if self.group_state is not None:
            for g, weight in enumerate(self.group_state.weights[:LOGGED_GROUPS].tolist()):
                metrics[f"group/{g}/state"].append(weight)

    # -- checkpoints ---------------------------------------------------------------------------

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.group_state is not None and self.args.should_save:
            state = {name: t.contiguous() for name, t in self.group_state.state_dict().items()}
            save_file(state, Path(output_dir) / GROUP_STATE_FILE)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if self.group_state is not None and checkpoint is not None:
            self._load_group_state(Path(checkpoint) / GROUP_STATE_FILE)

    def _load_group_state(self, path: Path) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} is missing: the checkpoint has no weights for "
                f"ambiguity={str(self.ambiguity)!r}, so resuming would start them anew. Resume "
                "from a checkpoint of a run with this set (save_only_model=False), or start a new "
                "run from the checkpoint's model."
            )
        assert self.group_state is not None
        state = load_file(path)
        found, expected = len(state["weights"]), len(self.group_state.weights)
        if found != expected:
            raise ValueError(
                f"{path} holds the weights of {found} groups, expected {expected} for "
                f"ambiguity={str(self.ambiguity)!r}: resume with the set of the saved run."
            )
        self.group_state.load_state_dict(state)
