"""The adversary's batch is the optimizer step's: two passes over its microbatches.

First the losses of every microbatch, without gradients, and one worst case over all of them and
all ranks. Then forward and backward with those weights fixed, over the pairs that kept any, packed
into as few microbatches as hold them. By Danskin's theorem that is the gradient of the one big
batch; what is held in between are scalars of the pairs. Where the model draws random numbers
(dropout), the second pass keeps the microbatches as they are and draws the same ones.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from drrlhf import ERM, reward_inputs, robust_risk
from drrlhf.functional.robust_risk import weighted_sum
from drrlhf.trl import rows, weighted
from drrlhf.trl.seam import overridden
from drrlhf.trl.sets import SetMixin
from drrlhf.trl.weighted import Weighted

_KNOWN = ("drrlhf", "trl", "transformers")  # whose losses two passes take apart


@dataclass
class Pass:
    """One of the two passes over the microbatches of a step.

    ``weights`` (n,) are those of the microbatch at hand, None in the first pass; ``scale`` is what
    the loop and the ranks, over which gradients will be averaged, divide by; ``outside`` is the
    factor of terms that the adversary does not weigh. ``seen`` collects the pairs, and
    ``references`` the reference's log-probs (chosen, rejected).
    """

    weights: Tensor | None = None
    scale: int = 1
    outside: float = 1.0
    seen: list[Weighted] = field(default_factory=list)
    references: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def reduce(self, losses: Tensor) -> Tensor:
        """The number () to backpropagate for losses (n,)."""
        if self.weights is None:
            return losses.new_zeros(())
        return weighted_sum(self.weights, losses) * self.scale


class Microbatch(NamedTuple):
    """A microbatch of the second pass: (batch, row) of its pairs, or the batch that it is; its
    fixed weights (n,); and the generators to start from. It is put together when its turn comes."""

    pairs: list[tuple[int, int]] | int
    weights: Tensor
    generators: Generators | None


class Generators(NamedTuple):
    """States of the random number generators that a model may draw from."""

    cpu: Tensor
    device: Tensor | None

    @staticmethod
    def now(device: torch.device) -> Generators:
        module = None if device.type == "cpu" else getattr(torch, device.type)
        return Generators(
            torch.get_rng_state(), None if module is None else module.get_rng_state(device)
        )

    def restore(self, device: torch.device) -> None:
        torch.set_rng_state(self.cpu)
        if self.device is not None:
            getattr(torch, device.type).set_rng_state(self.device, device)

    def equal(self, other: Generators) -> bool:
        if not torch.equal(self.cpu, other.cpu):
            return False
        return self.device is None or torch.equal(self.device, other.device)  # type: ignore[arg-type]


def _itself(tensor: Any) -> Any:
    return tensor


class StepMixin(SetMixin):
    """Takes a whole optimizer step at a time, in every trainer: collect, solve once, then run
    forward and backward with fixed weights.

    `Trainer` calls ``training_step`` once per microbatch. All calls but the last return 0; the last
    one runs the whole step. What a microbatch is collected as, and what the step consists of, is
    the trainer's (`_collect`, `_whole_step`).
    """

    optimizer: Any
    _held: list[Any]
    _takes_whole_step = False
    _calls_left = 0

    def _wants_whole_step(self, batches: int) -> bool:
        """Whether a step of so many microbatches is taken as one."""
        raise NotImplementedError

    def _collect(self, batch: Any) -> Any:
        """What is kept of a microbatch until the last one is there."""
        raise NotImplementedError

    def _whole_step(self, model: Any, batches: list[Any], items: Any) -> Tensor:
        """Forward and backward of all microbatches; the step's loss ()."""
        raise NotImplementedError

    def get_batch_samples(self, *args: Any, **kwargs: Any) -> Any:
        """The microbatches of one optimizer step, as the loop fetches them."""
        batches, items = super().get_batch_samples(*args, **kwargs)  # type: ignore[misc]
        self._takes_whole_step = self._wants_whole_step(len(batches))
        self._calls_left, self._held = len(batches), []
        return batches, items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """A microbatch's loss () after its backward, or the step's after the last one."""
        if not self._takes_whole_step:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[misc]
        model.train()
        if callable(to_training := getattr(self.optimizer, "train", None)):
            to_training()  # evaluation has put averaged weights into the model
        self._held.append(self._collect(inputs))
        self._calls_left -= 1
        if self._calls_left:
            return torch.zeros((), device=self.accelerator.device)
        batches, self._held = self._held, []
        self._takes_whole_step = False
        return self._whole_step(model, batches, num_items_in_batch)

    def _backward(self, model: Any, batch: Any, last: bool, items: Any = None) -> Tensor:
        """Forward and backward of a microbatch whose weights are fixed; its loss (). Gradients are
        shared between processes after the last one, or after each, as accelerate is told."""
        each = self.accelerator.gradient_state.plugin_kwargs.get("sync_each_batch", False)
        with contextlib.nullcontext() if last or each else self.accelerator.no_sync(model=model):
            return super().training_step(model, batch, items)  # type: ignore[misc]


class TwoPasses(StepMixin):
    """The step of a trainer of pairs."""

    _pass: Pass | None
    _metrics: dict[str, Any]
    _total_train_tokens: Any

    @property
    def _loss_outside_the_set(self) -> bool:
        """Whether a batch's loss has terms of ours that the adversary does not weigh."""
        return False

    @property
    def _keeps_batches(self) -> bool:
        """Whether the second pass needs all microbatches as they are."""
        return self._loss_outside_the_set or self._loss_is_changed

    @property
    def _loss_is_changed(self) -> bool:
        """Whether a subclass of somebody else's computes the loss, and may add terms to it."""
        for name in ("compute_loss", "_compute_loss"):
            owner = next((one for one in type(self).__mro__ if name in vars(one)), None)
            if owner is not None and owner.__module__.partition(".")[0] not in _KNOWN:
                return True
        return False

    def _wants_whole_step(self, batches: int) -> bool:
        step = self.robust_scope == "step" and not self._streaming
        return self._reweighing and step and batches > 1

    def _collect(self, batch: Any) -> Any:
        return batch

    def _whole_step(self, model: Any, batches: list[Any], items: Any) -> Tensor:
        batches = [self._prepare_inputs(batch) for batch in batches]  # type: ignore[attr-defined]
        if self.ambiguity == ERM():  # the weights are in the columns: no first pass
            return self._fixed_weight_step(model, batches)
        first = Pass()
        outside, starts, end = self._first_pass(model, batches, first)
        seen = weighted.concatenate(first.seen)
        risk = self._solve(seen.losses, seen.nominal, seen.groups, True, self._process_group)
        self._log_pairs(seen._replace(weights=risk.weights), risk.value)  # type: ignore[attr-defined]
        if first.references:
            batches = [
                dict(batch) | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}
                for batch, (chosen, rejected) in zip(batches, first.references, strict=True)
            ]
        plan = self._plan(batches, risk.weights, starts)
        with self._unlogged():
            self._second_pass(model, batches, plan)
        end.restore(self.accelerator.device)
        return risk.value + outside

    def _first_pass(
        self, model: Any, batches: list[Any], first: Pass
    ) -> tuple[Tensor, list[Generators] | None, Generators]:
        """Losses of all microbatches, into `first`; what lies outside the set, as a mean; and the
        generators before each microbatch, None if the model draws nothing, and after the last."""
        device, starts, outside = self.accelerator.device, [], []
        with torch.no_grad(), overridden(self, _pass=first):
            for batch in batches:
                starts.append(Generators.now(device))
                with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                    outside.append(self.compute_loss(model, batch))  # type: ignore[attr-defined]
        end = Generators.now(device)
        return torch.stack(outside).mean(), None if starts[0].equal(end) else starts, end

    def _plan(
        self, batches: Sequence[Mapping[str, Any]], weights: Tensor, starts: list[Generators] | None
    ) -> list[Microbatch]:
        """What the second pass goes through; with `starts`, the same draws in the same batches."""
        sizes = [rows.count(batch) for batch in batches]
        parts = weights.split(sizes)
        separable = all(rows.separable(batch) for batch in batches)
        plan = []
        if starts is None and separable and not self._keeps_batches:
            kept = [(b, i) for b, q in enumerate(parts) for i in q.nonzero().flatten().tolist()]
            lengths = [rows.lengths(batch).tolist() for batch in batches]
            for part in rows.arrange(kept, [lengths[b][i] for b, i in kept], max(sizes)):
                chosen = [kept[i] for i in part]
                q = torch.stack([parts[b][i] for b, i in chosen])
                plan.append(Microbatch(chosen, q, None))
        else:
            for b, q in enumerate(parts):
                if self._keeps_batches or q.any():
                    plan.append(Microbatch(b, q, starts[b] if starts else None))
        # Every rank runs as many: models and gradients that are shared meet in every pass.
        most = max(len(plan), 1)
        if self.accelerator.num_processes > 1:
            count = torch.tensor([most], device=self.accelerator.device)
            most = int(self.accelerator.gather(count).max())
        nothing = Microbatch(
            [(0, 0)] if separable else 0, weights.new_zeros(1 if separable else sizes[0]), None
        )
        return [nothing] * (most - len(plan)) + plan

    @contextlib.contextmanager
    def _unlogged(self) -> Iterator[None]:
        """Keep TRL's metrics to themselves: ranks hold unequal microbatches here, which TRL must
        not gather, and the first pass has logged every pair already."""
        scratch = {mode: type(table)(list) for mode, table in self._metrics.items()}
        tokens = self._total_train_tokens
        with (
            overridden(self, _metrics=scratch, _total_train_tokens=tokens),
            overridden(self.accelerator, gather=_itself, gather_for_metrics=_itself),
        ):
            yield

    def _second_pass(self, model: Any, batches: list[Any], plan: list[Microbatch]) -> None:
        """Forward and backward of every microbatch; gradients are shared after the last one."""
        for i, (chosen, weights, generators) in enumerate(plan):
            if isinstance(chosen, int):
                batch = dict(batches[chosen])
            else:
                multiple = self.args.pad_to_multiple_of
                batch = rows.select(batches, chosen, self._pad_token_id, multiple)
            if generators is not None:
                generators.restore(self.accelerator.device)
            self._fixed_weights(model, batch, weights, len(batches), last=i == len(plan) - 1)

    @property
    def _pad_token_id(self) -> int:
        """What fills rows up; 0 where the model has no pad token, and so none that it looks for."""
        return reward_inputs.pad_token_id(self.model) or 0

    def _fixed_weights(
        self, model: Any, batch: Any, weights: Tensor, batches: int, last: bool
    ) -> tuple[Tensor, list[Weighted]]:
        """`_backward` of one of so many microbatches with fixed weights (n,): its part of the
        step's loss (), and its pairs. Where a subclass adds terms, which cannot know of the pass,
        the loop takes their mean over the microbatches, as it does without two passes."""
        divided = batches if self._loss_is_changed else 1
        known = Pass(weights, self._ranks * divided, divided / batches)
        with overridden(self, _pass=known, current_gradient_accumulation_steps=divided):
            return self._backward(model, batch, last), known.seen

    @property
    def _ranks(self) -> int:
        """Over how many processes gradients will be averaged."""
        return self.accelerator.num_processes if self._process_group is not None else 1

    def _fixed_weight_step(self, model: Any, batches: list[Any]) -> Tensor:
        """Nominal weights alone: those of a pair within the step are known before any loss is."""
        device = self.accelerator.device
        nominal = [batch.get("weight", torch.ones(rows.count(batch))) for batch in batches]
        every = torch.cat(nominal).to(device)
        weights = robust_risk(
            torch.zeros_like(every), nominal=every, process_group=self._process_group
        ).weights
        seen: list[Weighted] = []
        total = torch.zeros((), device=device)
        for i, (batch, q) in enumerate(
            zip(batches, weights.split([len(part) for part in nominal]), strict=True)
        ):
            last = i == len(batches) - 1
            loss, pairs = self._fixed_weights(model, batch, q, len(batches), last)
            total, seen = total + loss, seen + pairs
        found = weighted.concatenate(seen)
        value = (weights * torch.where(weights > 0, found.losses, 0)).sum() * self._ranks
        self._log_pairs(found._replace(weights=weights), value)  # type: ignore[attr-defined]
        return total
