"""TRL's DPO trainer with worst-case weights."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
import trl

from drrlhf import pair_losses
from drrlhf.conventions import statistics_dtype
from drrlhf.functional.pair_losses import read_options
from drrlhf.functional.robust_risk import unmasked_gradient
from drrlhf.reference.pair_losses import PAIR_LOSSES as EVERY_PAIR_LOSS
from drrlhf.reference.pair_losses import names
from drrlhf.trl import columns, head
from drrlhf.trl.pairs import PairsMixin, logger
from drrlhf.trl.seam import Recorder, overridden

# Losses of one pair each: the adversary weighs these. simpo is not a DPO loss of TRL's.
PAIR_LOSSES = tuple(name for name in EVERY_PAIR_LOSS if name != "simpo")
SMOOTHED_LOSSES = names(smoothing=True)
# Losses that TRL sorts over the batch: no pair has a loss of its own to be weighed.
SORTED_LOSSES = ("aot", "aot_unpaired")
# Added to the worst-case risk as they are, by TRL, and never weighed.
OUTSIDE_LOSSES = ("sft", *SORTED_LOSSES)


class DPOTrainer(PairsMixin, trl.DPOTrainer):
    """TRL's ``DPOTrainer``; the pair losses are weighed by ``args.ambiguity``.

    With ``ambiguity="erm"`` the numbers are TRL's, with one exception: ``label_smoothing`` applies
    to ``loss_type="sigmoid"`` (cDPO), where TRL ignores it. Several ``loss_type`` are summed pair
    by pair with ``loss_weights`` (and WPO's ``use_weighting``), and the adversary weighs the sum;
    ``sft`` and a mixture-of-experts auxiliary loss are added outside the ambiguity set. Datasets
    may have the columns ``group`` (numbers from 0, codes or text), ``weight`` (>= 0) and
    ``p_chosen`` (in [0, 1], see ``args.label_ambiguity``). The log-probs come from the head that
    ``args.head`` names, in training, evaluation and precomputation; other trainers in the process
    keep theirs.

    Raises:
        ValueError: an unknown ``loss_type``, or a number that it does not take; ``aot`` or
            ``aot_unpaired`` with weights; an ambiguity set with no pair loss to act on; a Group
            set without a ``group`` column or with another number of groups, a weight that is not
            finite and >= 0, or what `PairsMixin` refuses.
        RuntimeError: with our head, something other than TRL or drrlhf stands in the
            place of TRL's head.
    """

    __signature__ = inspect.signature(trl.DPOTrainer)

    def _check_arguments(self, config: Any) -> None:
        super()._check_arguments(config)
        head.check(head.resolve(head.asked(config), config.device.type))
        unknown = set(config.loss_type) - {*PAIR_LOSSES, *OUTSIDE_LOSSES}
        if unknown:
            raise ValueError(
                f"loss_type: unknown {min(unknown)!r}; expected one of "
                f"{', '.join((*PAIR_LOSSES, *OUTSIDE_LOSSES))}"
            )
        for name in config.loss_type:
            if name in PAIR_LOSSES:
                read_options(torch.float32, **_loss_options(name, config, config.discopop_tau))
        if self._views:
            self._check_views(config)
        if not self._reweighing:
            return
        cause = f"ambiguity={str(self.ambiguity)!r}" if not self._weighted else "a column 'weight'"
        for name in SORTED_LOSSES:
            if name in config.loss_type:
                raise ValueError(
                    f"loss_type={name!r} sorts the batch, so no pair has a loss of its own, and "
                    f"cannot be combined with {cause}: take another loss_type, or "
                    "ambiguity='erm' without weights."
                )
        if not set(config.loss_type) & set(PAIR_LOSSES):
            raise ValueError(
                f"loss_type={config.loss_type} has no preference loss for {cause} to act on: add "
                "one such as 'sigmoid', or take ambiguity='erm' without weights."
            )

    def _check_setup(self) -> None:
        super()._check_setup()
        head.check_weights(*self._unwrapped(self.model, self.ref_model))

    def _check_views(self, config: Any) -> None:
        """Refuse what views make no sense with."""
        outside = sorted(set(config.loss_type) & set(OUTSIDE_LOSSES))
        refused = {
            f"loss_type={outside}, which is no loss of one pair": bool(outside),
            "precompute_ref_log_probs=True, which knows no reference of "
            "changed answers": config.precompute_ref_log_probs,
            "ld_alpha, which scores an answer by the length of the other": config.ld_alpha
            is not None,
            "use_weighting=True, whose weights are of both answers": config.use_weighting,
        }
        for option, given in refused.items():
            if given:
                raise ValueError(f"views: cannot be combined with {option}; leave one of them out")

    def _warn(self) -> None:
        super()._warn()
        if not self.args.label_smoothing:
            return
        smoothed = (*SMOOTHED_LOSSES, *SORTED_LOSSES)
        ignored = [name for name in self.loss_types if name not in smoothed]
        if "sigmoid" in self.loss_types:
            logger.warning(
                f"label_smoothing={self.args.label_smoothing} is applied to loss_type='sigmoid' "
                "(cDPO). TRL ignores it there; set it to 0 for TRL's numbers."
            )
        if ignored:
            logger.warning(
                f"label_smoothing={self.args.label_smoothing} has no effect on loss_type="
                f"{', '.join(ignored)}, as in TRL."
            )

    @property
    def _unread_entries(self) -> tuple[str, ...]:
        """Log-probs that a dataset brings along are those of a reference that nobody named."""
        return () if self.precompute_ref_logps else ("ref_chosen_logps", "ref_rejected_logps")

    @property
    def _loss_outside_the_set(self) -> bool:
        return self.aux_loss_enabled or bool(set(self.loss_types) & set(OUTSIDE_LOSSES))

    def _head(self) -> str:
        return head.resolve(head.asked(self.args), self.accelerator.device.type)

    # The columns must not reach the model here either: `evaluate` precomputes with our collator.
    def compute_ref_log_probs(self, model: Any, inputs: Any) -> Any:
        with head.using(self._head(), extras=False):
            return super().compute_ref_log_probs(self._runner(model), columns.take(inputs)[0])

    def _compute_loss(self, model: Any, inputs: Any, return_outputs: bool) -> Any:
        """TRL's forward passes and metrics, our reduction.

        The parent runs with the loss types outside the ambiguity set alone (often none: then what
        it returns is 0, or the auxiliary loss), and the reference enters one way, as if it had
        been precomputed. It runs after the policy, as in TRL, so that dropout draws the same.
        """
        inputs, nominal, groups, p_chosen = columns.take(inputs)
        terms = list(zip(self.loss_types, self.loss_weights, strict=True))
        outside = [term for term in terms if term[0] in OUTSIDE_LOSSES]
        inside = [term for term in terms if term[0] not in OUTSIDE_LOSSES]

        def add_reference() -> None:
            reference = self.model if self.ref_model is None else self.ref_model
            chosen, rejected = self.compute_ref_log_probs(reference, inputs)
            inputs.update(ref_chosen_logps=chosen, ref_rejected_logps=rejected)

        given = "ref_chosen_logps" in inputs  # precomputed, or kept from the step's first pass
        needed = not given and not self.precompute_ref_logps
        recorder = Recorder(self._runner(model), after=add_reference if needed else None)
        with (
            head.using(self._head()),
            overridden(
                self,
                precompute_ref_logps=True,
                loss_types=[name for name, _ in outside],
                loss_weights=[weight for _, weight in outside],
            ),
        ):
            result = super()._compute_loss(recorder, inputs, return_outputs)
        loss, outputs = result if return_outputs else (result, None)
        if self._pass is not None:
            loss = loss * self._pass.outside
            if needed:
                references = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
                self._pass.references.append(references)
        if inside:
            loss = loss + self._pair_risk(inside, recorder, inputs, nominal, groups, p_chosen)
        return (loss, outputs) if return_outputs else loss

    def _pair_risk(
        self,
        terms: list[tuple[str, float]],
        recorder: Recorder,
        inputs: dict[str, torch.Tensor],
        nominal: torch.Tensor | None,
        groups: torch.Tensor | None,
        p_chosen: torch.Tensor | None,
    ) -> torch.Tensor:
        """The number () to backpropagate for the pair losses."""
        mask = inputs["completion_mask"]
        policy = self._sequence_logps(self._tokens(recorder, "log_probs", mask), mask[:, 1:])
        chosen, rejected = policy.chunk(2)
        ref_chosen, ref_rejected = inputs["ref_chosen_logps"], inputs["ref_rejected_logps"]
        completions = mask.sum(1)
        chosen_lengths, rejected_lengths = completions.clamp(min=1).chunk(2)
        about = {
            "ref_chosen_logps": ref_chosen,
            "ref_rejected_logps": ref_rejected,
            "chosen_lengths": chosen_lengths,
            "rejected_lengths": rejected_lengths,
        }
        if self._adversarial:
            # Two completions that truncation has emptied have equal log-probs whatever the model:
            # a loss that nothing can lower must not attract the adversary.
            counted = torch.stack(completions.chunk(2)).any(0)
            nominal = counted.to(chosen) * (1 if nominal is None else nominal)

        dtype = statistics_dtype(chosen)
        both = [unmasked_gradient(logps.to(dtype), nominal) for logps in (chosen, rejected)]
        losses = self._losses(terms, both[0], both[1], about, p_chosen)
        if self.use_weighting:
            losses = losses * self._wpo_weights(recorder, mask)
        won = (chosen - ref_chosen > rejected - ref_rejected).detach()
        return self._reduced(losses, won, nominal, groups)

    def _losses(
        self,
        terms: list[tuple[str, float]],
        chosen: torch.Tensor,
        rejected: torch.Tensor,
        about: Mapping[str, torch.Tensor],
        p_chosen: torch.Tensor | None,
    ) -> torch.Tensor:
        """The sum (n,) of the loss types by weight; ``about``: references and lengths, (n,)."""
        losses = torch.zeros_like(chosen)
        for name, weight in terms:
            options: dict[str, Any] = {
                **about,
                **self._labels(p_chosen),
                **_loss_options(name, self, self.args.discopop_tau),
            }
            losses = losses + weight * pair_losses(chosen, rejected, **options)
        return losses

    def _sequence_logps(self, token_logps: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Log-probs (2n,) of the completions, given those of the tokens (2n, L), 0 elsewhere.

        LD-DPO (``ld_alpha``) counts tokens past the shorter completion of a pair by that share.
        """
        if self.ld_alpha is None:
            return token_logps.sum(1)
        shared = torch.stack(mask.sum(1).chunk(2)).amin(0).repeat(2)
        past = mask.cumsum(1) > shared.unsqueeze(1)
        return torch.where(past, self.ld_alpha * token_logps, token_logps).sum(1)

    def _wpo_weights(self, recorder: Recorder, mask: torch.Tensor) -> torch.Tensor:
        """WPO's weight (n,) of each pair (arXiv 2406.11827, eq. 2), detached."""
        log_sum_sq = self._tokens(recorder, "log_sum_sq_probs", mask).detach()
        aligned = (self._tokens(recorder, "log_probs", mask).detach() - log_sum_sq) * mask[:, 1:]
        weights = torch.exp(aligned.sum(1) / mask[:, 1:].sum(1).clamp(min=1))
        chosen, rejected = weights.chunk(2)
        return chosen * rejected

    @staticmethod
    def _tokens(recorder: Recorder, name: str, mask: torch.Tensor) -> torch.Tensor:
        """An output of each token (2n, L - 1); a prompt-tuning adapter's own tokens are dropped."""
        return recorder.output(name)[:, 1 - mask.size(1) :]

    # -- views ---------------------------------------------------------------------------------

    _views_need_prompt = True

    def _score_sequences(self, model: Any, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Tokens of the completion, and log-probs of the policy: (m, 2)."""
        mask = inputs["completion_mask"]
        labels = inputs["input_ids"].masked_fill(mask == 0, -100)
        asked = {name: tensor for name, tensor in inputs.items() if name != "completion_mask"}
        recorder = Recorder(self._runner(model))
        with head.using(self._head(), extras=False):
            recorder(**asked, labels=labels, fused_lm_head=True, use_cache=False)
        logps = self._tokens(recorder, "log_probs", mask).sum(1)
        logps = logps.to(statistics_dtype(logps))
        return torch.stack([mask.sum(1).clamp(min=1).to(logps), logps], 1)

    def _reference_scores(
        self, every: Mapping[str, torch.Tensor], views: Mapping[str, Any]
    ) -> torch.Tensor:
        reference = self.model if self.ref_model is None else self.ref_model
        return self._in_parts(
            every,
            views,
            torch.ones_like(views["scored"]),
            lambda inputs: torch.cat(self.compute_ref_log_probs(reference, inputs)),
        )

    def _losses_of_scores(
        self, chosen: torch.Tensor, rejected: torch.Tensor, columns: Mapping[str, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        about = {
            **self._known(chosen[:, 2], rejected[:, 2]),
            "chosen_lengths": chosen[:, 0],
            "rejected_lengths": rejected[:, 0],
        }
        terms = list(zip(self.loss_types, self.loss_weights, strict=True))
        losses = self._losses(terms, chosen[:, 1], rejected[:, 1], about, columns.get("p_chosen"))
        return losses, (chosen[:, 1] - chosen[:, 2]) - (rejected[:, 1] - rejected[:, 2])

    def _known(self, chosen: torch.Tensor, rejected: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}


def _loss_options(loss_type: str, given: Any, discopop_tau: float) -> dict[str, Any]:
    """What a pair loss is told, of the options that a configuration or a trainer has."""
    return {
        "loss_type": loss_type,
        "beta": given.beta,
        "label_smoothing": given.label_smoothing if loss_type in SMOOTHED_LOSSES else 0.0,
        "f_divergence": given.f_divergence_type,
        "f_alpha_divergence_coef": given.f_alpha_divergence_coef,
        "discopop_tau": discopop_tau,
    }
