"""The ambiguity set of a trainer: its groups and states, what it can be asked for, checkpoints."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import DistributedType
from torch import Tensor
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from drrlhf import ERM, Group, GroupState, NormaliserState, parse_ambiguity, robust_risk
from drrlhf.functional import RobustRisk
from drrlhf.groups import Groups, from_data, with_count
from drrlhf.precision import emulates_bfloat16
from drrlhf.trl import columns, state, weighted
from drrlhf.trl.seam import overridden
from drrlhf.trl.weighted import Weighted

logger = get_logger(__name__)

GROUPS = "groups"  # a checkpoint's fact: what the data call the groups, in order
# Options of ours, beside the set over pairs and the views, that change what is trained.
OBJECTIVE = (
    "label_ambiguity",
    "view_consistency_coefficient",
    "batch_sum_coefficient",
    "reward_ambiguity",
)
GROUP_BY = "group_by"
OF_STATES = ("ambiguity", GROUP_BY)  # facts with which the kept states lose their meaning


def _later(folder: str) -> None:
    """Stands in for the push to a hub of a checkpoint that has no name yet."""


class SetMixin:
    """Reads ``args.ambiguity`` and keeps the set's states, in memory and in checkpoints."""

    args: Any
    accelerator: Any
    model: Any
    state: Any
    ambiguity: Any
    robust_scope: str
    group_state: GroupState | None
    normaliser_state: NormaliserState | None
    _groups: Groups | None  # of the column, where the set needs it or its values have names
    _weighted: bool
    _doubted: bool  # labels are probabilities
    _get_output_dir: Any
    _push_from_checkpoint: Any
    _train_batch_size: int
    _members = "pairs"  # what the adversary weighs, in messages
    _column_names: tuple[str, ...] = columns.PAIR_COLUMNS
    _evaluated: list[Tensor] | None = None
    _by_column = True  # whether the groups of a Group set are those of the column

    def _read_set(self, config: Any, given: Mapping[str, Any]) -> None:
        """The set of a configuration, and what the datasets among the arguments have for it."""
        asked = getattr(config, "ambiguity", "erm")
        counted = from_data(asked)
        if counted and not self._by_column:
            raise ValueError(
                f"ambiguity={asked!r} counts the groups of the column 'group', which "
                "group_by='pass_rate' does not use: write how many, as in 'group:4'."
            )
        self.ambiguity = None if counted else parse_ambiguity(asked)
        needed = 0 if counted else self._num_groups if self._by_column else None
        self._groups, present = columns.check_datasets(given, needed, self._column_names)
        if counted:
            assert self._groups is not None
            self.ambiguity = with_count(asked, self._groups.count)
        self._weighted, self._doubted = (c in present for c in (columns.WEIGHT, columns.LABEL))
        self.robust_scope = getattr(config, "robust_scope", "step")

    def _make_states(self) -> None:
        self.group_state, self.normaliser_state = None, None
        if self._num_groups is not None:
            self.group_state = GroupState(self._num_groups).to(self.accelerator.device)
        if self._streaming:
            self.normaliser_state = NormaliserState().to(self.accelerator.device)

    @property
    def _num_groups(self) -> int | None:
        return self.ambiguity.num_groups if isinstance(self.ambiguity, Group) else None

    @property
    def _adversarial(self) -> bool:
        return self.ambiguity != ERM()

    @property
    def _streaming(self) -> bool:
        return getattr(self.ambiguity, "momentum", None) is not None

    @property
    def _reweighing(self) -> bool:
        """Whether pairs of a step weigh differently at all; without, everything is TRL's own."""
        return self._adversarial or self._weighted

    @property
    def _process_group(self) -> Any:
        """The processes whose pairs the adversary sees; None for this one alone."""
        together = self._reweighing and (self.robust_scope == "step" or self._streaming)
        several = self.accelerator.num_processes > 1
        return torch.distributed.group.WORLD if together and several else None

    @property
    def _numbered(self) -> Groups | None:
        """The groups whose numbers the adversary needs; None where the column is only logged."""
        return self._groups if self._by_column and self._num_groups is not None else None

    def _label(self, group: int) -> str:
        """What the metrics call a group."""
        named = self._by_column and self._groups is not None
        return self._groups.label(group) if named else str(group)  # type: ignore[union-attr]

    # -- the worst case ------------------------------------------------------------------------

    def _solve(
        self,
        losses: Tensor,
        nominal: Tensor | None,
        groups: Tensor | None,
        update: bool,
        process_group: Any = None,
        evaluated: bool = False,
    ) -> RobustRisk:
        """The worst case of losses (n,), differentiable by them. One step of the adversary is for
        one of the optimizer; a stream takes every batch: ``update`` says whether this is it. Losses
        that are ``evaluated`` are all there are, and no part of the stream of training."""
        self._check_groups(groups)
        return robust_risk(
            losses,
            self.ambiguity,
            nominal=nominal,
            groups=None if self.group_state is None else groups,
            group_state=self.group_state,
            normaliser_state=None if evaluated else self.normaliser_state,
            update=update,
            process_group=process_group,
        )

    def _check_groups(self, groups: Tensor | None) -> None:
        if self.group_state is not None and groups is None:
            raise ValueError(
                f"ambiguity={str(self.ambiguity)!r} needs a column 'group', and the batch has "
                "none: add it to the dataset, and let a data_collator of your own keep it."
            )

    @contextlib.contextmanager
    def _evaluating(self) -> Iterator[list[Tensor]]:
        """Collects the tables of an evaluation's batches, which `_evaluated` gets meanwhile."""
        self._evaluated = []
        try:
            yield self._evaluated
        finally:
            self._evaluated = None

    def _log(self, metrics: dict[str, float], mode: str) -> None:
        for name, number in metrics.items():
            self._metrics[mode][name].append(number)  # type: ignore[attr-defined]

    def _by_group(self, rows: Weighted, kind: weighted.Kind) -> dict[str, float]:
        state = None if self.group_state is None else self.group_state.weights
        return weighted.by_group(rows, state, self._label, kind)

    # -- checks --------------------------------------------------------------------------------

    def _check_arguments(self, config: Any) -> None:
        """Refuse what cannot mean what it says, before the model is loaded."""
        if self.robust_scope != "microbatch":
            return
        for name, stateful in (
            ("group weights", isinstance(self.ambiguity, Group)),
            ("running normalisers", self._streaming),
        ):
            if stateful and config.world_size > 1:
                raise ValueError(
                    f"robust_scope='microbatch' on {config.world_size} processes: the {name} of "
                    f"ambiguity={str(self.ambiguity)!r} would drift apart between them. Use "
                    "robust_scope='step', train with one process, or take another set."
                )

    def _check_setup(self) -> None:
        """Refuse what is known only when accelerate is set up; and warn of a slow precision, which
        is TRL's default, and of an adversary that sees one batch alone."""
        for kind, size in (
            ("context", self.get_cp_size()),  # type: ignore[attr-defined]
            ("sequence", self.get_sp_size()),  # type: ignore[attr-defined]
        ):
            if size > 1:  # whatever the set: a classifier would score the end of each part
                raise ValueError(
                    f"{kind} parallelism of {size}: each process would have a part of every "
                    f"sequence, and the loss of {self._members} needs the whole of it, in TRL's "
                    "trainers as in these. Use data parallelism (DDP or FSDP), and a smaller "
                    "max_length where memory is short."
                )
        if self.accelerator.device.type == "cpu" and self.args.bf16 and emulates_bfloat16():
            logger.warning(
                "bf16=True on a CPU without products in bfloat16, which PyTorch emulates there, up "
                "to eight times slower than float32; bf16=False is faster."
            )
        if not self._reweighing:
            return
        if self.robust_scope != "step":
            parts = self.args.gradient_accumulation_steps, self.args.world_size
            if max(parts) > 1:
                logger.warning(
                    "robust_scope='microbatch': the worst-case weights are computed over the batch "
                    f"of each device ({self.args.per_device_train_batch_size} {self._members}), "
                    f"not over the optimizer step's ({parts[0]} accumulation steps, {parts[1]} "
                    "processes). The objective depends on that number."
                )
            return
        deepspeed = self.accelerator.distributed_type == DistributedType.DEEPSPEED
        if deepspeed and self.args.gradient_accumulation_steps > 1 and not self._streaming:
            raise ValueError(
                "robust_scope='step' with gradient_accumulation_steps="
                f"{self.args.gradient_accumulation_steps} under DeepSpeed: its engine counts "
                "backward passes, and a step has fewer of them than batches. Use FSDP or DDP, "
                "gradient_accumulation_steps=1, or robust_scope='microbatch'."
            )
        if (size := self.get_tp_size()) > 1:  # type: ignore[attr-defined]
            raise ValueError(
                f"robust_scope='step' with tensor parallelism of {size}: several processes "
                f"would bring the same {self._members}. Use data parallelism alone, or "
                "robust_scope='microbatch'."
            )

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> Any:
        """TRL's; a dataset that numbers the groups otherwise than the training data is refused."""
        parts = eval_dataset.items() if hasattr(eval_dataset, "items") else [("", eval_dataset)]
        for _, part in parts:
            columns.check_names(part, self._groups)
        return super().evaluate(eval_dataset, *args, **kwargs)  # type: ignore[misc]

    # -- checkpoints ---------------------------------------------------------------------------

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """TRL's, into a hidden folder; it is called checkpoint-N when everything lies in it."""
        folder = Path(self._get_output_dir(trial))
        unfinished = folder / state.UNFINISHED
        if self.args.should_save and unfinished.exists():  # of a process that was killed
            shutil.rmtree(unfinished)
        self.accelerator.wait_for_everyone()
        with overridden(
            self, _get_output_dir=lambda trial: str(unfinished), _push_from_checkpoint=_later
        ):
            super()._save_checkpoint(model, trial)  # type: ignore[misc]
        self.accelerator.wait_for_everyone()
        told = self.state.best_model_checkpoint
        self._find_best(folder)
        checkpoint = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        if self.args.should_save:
            written, best = unfinished / checkpoint.name, self.state.best_model_checkpoint
            if best != told:
                self.state.save_to_json(str(written / TRAINER_STATE_NAME))
            state.put_in_place(written, checkpoint, self.args.save_total_limit, best)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(checkpoint))

    def _find_best(self, folder: Path) -> None:
        """Call the best checkpoint by the name that it has, or gets, in ``folder``. The loop looks
        for it in the hidden folder alone, and every process loads it at the end."""
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.best_global_step}"
        # In this order: the first process may be giving it its name.
        if any((place / name).is_dir() for place in (folder / state.UNFINISHED, folder)):
            self.state.best_model_checkpoint = str(folder / name)

    def _states(self) -> dict[str, torch.nn.Module]:
        states = {"group_state": self.group_state, "normaliser_state": self.normaliser_state}
        return {name: module for name, module in states.items() if module is not None}

    def _facts(self) -> dict[str, str]:
        # Of all devices of a process, and as auto_find_batch_size found it.
        per_rank = self._train_batch_size * self.args.gradient_accumulation_steps
        numbered = self._numbered
        facts = {} if numbered is None else {GROUPS: numbered.described()}
        facts |= {n: str(getattr(self.args, n)) for n in OBJECTIVE if hasattr(self.args, n)}
        if self._num_groups is not None and hasattr(self.args, GROUP_BY):
            threshold = "" if self._by_column else f" {self.args.pass_threshold}"
            facts[GROUP_BY] = f"{self.args.group_by}{threshold}"
        return facts | {
            "ambiguity": str(self.ambiguity),
            "robust_scope": self.robust_scope,
            "processes": str(self.args.world_size),
            f"{self._members} per step": str(per_rank * self.args.world_size),
        }

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        super()._save_optimizer_and_scheduler(output_dir)  # type: ignore[misc]
        if self.args.should_save:
            state.save(Path(output_dir), self._states(), self._facts())

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)  # type: ignore[misc]
        if checkpoint is not None and self.check_resume(Path(checkpoint)):
            state.load(Path(checkpoint), self._states())

    def check_resume(self, folder: Path) -> bool:
        """Whether the states of the checkpoint in ``folder`` are those of this run's set.

        Raises:
            ValueError: it had another objective and ``resume_with_changed_ambiguity`` is not set,
                or its steps were made of other batches: another ``robust_scope``, number of
                processes or size of a step.
        """
        now = self._facts()
        # TRL's own checkpoints say nothing, and are of its own objective.
        told = state.facts(folder)
        before = told or {"ambiguity": "erm"}
        # Older checkpoints do not know of all options.
        both = [name for name in (*OBJECTIVE, GROUP_BY) if name in before and name in now]
        changed = [
            name for name in ("ambiguity", "views", *both) if before.get(name) != now.get(name)
        ]
        if changed and not getattr(self.args, "resume_with_changed_ambiguity", False):
            name = changed[0]
            saved = f"saved with {name}={before.get(name)!r}"
            if not told:
                saved = "saved without a word of its set, by TRL or with save_only_model=True"
            then = (
                "begin the new set's state anew" if name in OF_STATES else "go on with the new one"
            )
            raise ValueError(
                f"{folder}: {saved}, resumed with {now.get(name)!r}: another objective from here "
                "on. Resume with the saved one, or say resume_with_changed_ambiguity=True to "
                f"{then}."
            )
        if set(changed) & set(OF_STATES):
            return False
        if before.get(GROUPS, now.get(GROUPS)) != now.get(GROUPS):
            raise ValueError(
                f"{folder}: its groups are {before[GROUPS]}, those of train_dataset "
                f"{now[GROUPS]}: the kept weights would be given to others. Resume with the data "
                "of the saved run, or start a new run from the checkpoint's model."
            )
        if self._reweighing:
            for name in ("robust_scope", "processes", f"{self._members} per step"):
                if before.get(name, now[name]) != now[name]:
                    raise ValueError(
                        f"{folder}: saved with {name}: {before[name]}, resumed with {now[name]}. "
                        "The adversary's batches would not be those of the saved run. Resume with "
                        "the saved setting, or start a new run from the checkpoint's model."
                    )
        return True
