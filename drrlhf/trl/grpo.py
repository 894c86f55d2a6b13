"""TRL's GRPO trainer against the worst distribution of prompts."""

from __future__ import annotations

import inspect
import math
import time
from typing import Any

import torch
import trl
from accelerate.logging import get_logger
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from drrlhf import Group, models, reward_inputs
from drrlhf.conventions import POLICY_LOSS_TYPES, SequenceStatistics
from drrlhf.functional.policy_loss import surrogate
from drrlhf.functional.robust_risk import weighted_sum
from drrlhf.functional.row_sets import MEAN
from drrlhf.layouts import model as layouts
from drrlhf.trl import columns, head, prompts, weighted
from drrlhf.trl.one_row import OneRowMixin
from drrlhf.trl.prompts import FACTOR, PassRates, PromptSampler
from drrlhf.trl.reward_ambiguity import WorstReward, check_ambiguity
from drrlhf.trl.seam import overridden
from drrlhf.trl.step import StepMixin
from drrlhf.trl.weighted import PROMPTS, Weighted

logger = get_logger(__name__)

# Of ``model_init_kwargs``, what says which files of a model are read.
LOADING = ("revision", "code_revision", "trust_remote_code", "token", "cache_dir", "subfolder")
# What TRL's batches hold of images; completions of such a batch are not taken apart.
MULTIMODAL = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


def _multimodal(batch: dict[str, Any]) -> bool:
    return any(batch.get(name) is not None for name in MULTIMODAL)


def _prepared(batch: Any) -> Any:
    return batch


class GRPOTrainer(OneRowMixin, StepMixin, trl.GRPOTrainer):
    """TRL's ``GRPOTrainer``; each prompt's share of the objective is weighed by ``args.ambiguity``.

    With V the mean reward of a prompt's completions and q the worst-case weights of -V over the m
    prompts of the optimizer step (all processes and accumulated batches), the contribution of
    every completion to TRL's objective is multiplied by m q (`drrlhf.policy_loss`); advantages
    stay TRL's. Completions whose prompt has weight 0 are left out of the forward pass. With
    ``ambiguity="erm"`` and no ``weight`` column everything is TRL's own.

    Datasets may have the columns ``group`` (numbers from 0, codes or text) and ``weight`` (>= 0) of
    a prompt; with ``args.group_by="pass_rate"`` a Group set's groups are instead the prompts'
    running pass rates, cut into equal parts of [0, 1]. Log-probs come from the head that
    ``args.head`` names.

    Metrics added: ``robust/reward``, the plain mean of V, and ``robust/worst_case_reward``;
    ``robust/effective_sample_size``, ``/max_weight``, ``/kept`` as in the other trainers, over
    prompts; ``robust/overflowed``, tokens whose importance ratio was clamped; and for each group
    ``group/<g>/reward``, ``/weight`` and, for a Group set, ``/state``, under the group's name in
    the data (the reward with ``ambiguity="erm"`` too). TRL's token metrics are over
    the completions that kept weight. In evaluation the loss stays the plain one, and the
    ``robust/…`` metrics are over the whole evaluation set.

    Raises:
        ValueError: a Group set without groups or with another number of them, a weight that is not
            finite and >= 0; an infinite reward; options of TRL's whose reference term cannot be
            weighed (with ``beta`` != 0), DeepSpeed with accumulation, or tensor parallelism.
    """

    __signature__ = inspect.signature(trl.GRPOTrainer)
    _members = "completions"
    _column_names = columns.COLUMNS
    _pads_left = True
    _has_environment = False
    num_generations: Any
    max_completion_length: Any
    reward_func_names: Any
    chat_template_kwargs: Any
    _signature_columns: Any
    num_generations_eval: Any

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        given = inspect.signature(super().__init__).bind(*args, **kwargs).arguments
        config = given.get("args")
        self._by_column = getattr(config, "group_by", "column") != "pass_rate"
        self._read_set(config, given)
        self._has_environment = given.get("environment_factory") is not None
        if config is not None:
            self._check_arguments(config)
        self._prompts_met = 0
        self._rewards: Tensor | None = None
        pads = _pad_token_ids(given.get("reward_funcs"), config)
        self._read_rows(config)
        super().__init__(*args, **kwargs)
        self._prepare_rows(self.model, self.ref_model)
        for function, pad in zip(self.reward_funcs, pads):  # an environment adds one
            if isinstance(function, PreTrainedModel):  # TRL has set it to the tokenizer's
                function.config.get_text_config().pad_token_id = pad
        combined = getattr(config, "reward_ambiguity", MEAN)
        if combined != MEAN:
            self.reward_weights: Any = WorstReward(self.reward_weights, combined)
        self._make_states()
        self.pass_rates = None if self._by_column else PassRates()
        self._check_setup()
        if self._weighted:
            logger.warning(
                "The column 'weight' is used as the nominal weight of every prompt. If it is there "
                "for the reward functions alone, rename it."
            )

    def _check_arguments(self, config: Any) -> None:
        super()._check_arguments(config)
        head.check(head.resolve(head.asked(config), config.device.type))
        check_ambiguity(getattr(config, "reward_ambiguity", MEAN), config.reward_weights)
        if not self._by_column and self._has_environment:
            raise ValueError(
                "group_by='pass_rate' with environment_factory, whose prompts begin alike: give "
                "groups in a column, with group_by='column'."
            )
        if not self._by_column and not isinstance(self.ambiguity, Group):
            raise ValueError(
                f"group_by='pass_rate' groups prompts for a Group set, got ambiguity="
                f"{str(self.ambiguity)!r}: take ambiguity='group:NUM_GROUPS', or leave group_by."
            )
        if self._reweighing and config.beta and (options := _beyond(config)):
            raise ValueError(
                f"{', '.join(options)} with beta={config.beta} and ambiguity="
                f"{str(self.ambiguity)!r}: TRL's reference term cannot be weighed by prompt there. "
                "Take beta=0, or leave that option out, or ambiguity='erm'."
            )

    def _check_setup(self) -> None:
        super()._check_setup()
        head.check_weights(*self._unwrapped(self.model, self.ref_model))

    def _set_signature_columns_if_needed(self) -> None:
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()
        if fresh:
            self._signature_columns += columns.COLUMNS

    def _get_train_sampler(self, dataset: Any = None) -> PromptSampler:
        return PromptSampler.like(super()._get_train_sampler(dataset))

    def _run_epoch(
        self, model: Any, epoch: int, train_dataloader: Any, *args: Any, **kwargs: Any
    ) -> Any:
        prompts.begin_epoch(train_dataloader, epoch)
        return super()._run_epoch(model, epoch, train_dataloader, *args, **kwargs)

    # -- from completions to what is known of their prompts ------------------------------------

    def _calculate_rewards(self, inputs: list[dict[str, Any]], *args: Any, **kwargs: Any) -> Tensor:
        functions = [
            self._as_function(function, tokenizer, inputs)
            if isinstance(function, torch.nn.Module)
            and isinstance(tokenizer, PreTrainedTokenizerBase)
            else function
            for function, tokenizer in zip(
                self.reward_funcs, self.reward_processing_classes, strict=True
            )
        ]
        rows = inputs
        if all(ours is not given for ours, given in zip(functions, self.reward_funcs, strict=True)):
            # TRL hands no columns to a model; two could not be told from a function's arguments.
            names = {"prompts", "completions"}
            rows = [{k: v for k, v in row.items() if k not in names} for row in inputs]
        with overridden(self, reward_funcs=functions):
            self._rewards = super()._calculate_rewards(rows, *args, **kwargs)
        return self._rewards

    def _as_function(self, model: Any, tokenizer: Any, inputs: list[dict[str, Any]]) -> Any:
        """A reward model as a function that reads texts as its training did. TRL reads standard
        texts without the special tokens and the end token that its ``RewardTrainer`` adds."""

        def rewards(prompts: list[Any], completions: list[Any], **_: Any) -> list[float]:
            ids = [
                reward_inputs.reward_ids(
                    tokenizer,
                    prompt,
                    completion,
                    **reward_inputs.template_arguments(row) | self.chat_template_kwargs,
                )
                for row, prompt, completion in zip(inputs, prompts, completions, strict=True)
            ]
            return reward_inputs.scores(model, ids, self.accelerator.device).tolist()

        return rewards

    def _generate_single_turn(self, *args: Any, **kwargs: Any) -> Any:
        # What generates may know the attention that the model was loaded with alone.
        with layouts.as_loaded(self.accelerator.unwrap_model(self.model)):
            return super()._generate_single_turn(*args, **kwargs)

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output = super()._generate_and_score_completions(inputs)
        if not self._reweighing and columns.GROUP not in inputs[0]:
            return output
        assert self._rewards is not None
        device, n = self.accelerator.device, len(inputs)
        each: int = self.num_generations if self.model.training else self.num_generations_eval
        per_function, self._rewards = self._rewards, None
        unscored = per_function.isnan().all(1)
        rewards = (per_function * self.reward_weights.to(device)).nansum(1)
        rewards[unscored] = torch.nan
        self._check_rewards(rewards, per_function)
        mine = slice(self.accelerator.process_index * n, (self.accelerator.process_index + 1) * n)
        values = rewards.view(-1, each).nanmean(1).repeat_interleave(each)[mine]
        numbers = torch.arange(len(rewards), device=device) // each + self._prompts_met
        self._prompts_met += len(rewards) // each
        nominal = [row.get(columns.WEIGHT, 1.0) for row in inputs]
        columns.check_values(columns.WEIGHT, nominal, None)  # a stream has not been looked at
        facts = {
            prompts.PROMPT: numbers[mine],
            prompts.VALUE: values,
            prompts.NOMINAL: torch.tensor(nominal, device=device, dtype=torch.float64),
            prompts.GROUP: self._groups_of(inputs, rewards),
        }
        if self.model.training and not self._reweighing:  # else the step logs them, weighed
            found, _ = prompts.from_table(self.accelerator.gather(prompts.table([facts])))
            self._log_prompts(found, None, "train")
        return output | facts

    def _check_rewards(self, rewards: Tensor, per_function: Tensor) -> None:
        if rewards.isinf().any():
            row = int(rewards.isinf().nonzero()[0])
            names: list[str] = self.reward_func_names
            named = zip(names, per_function[row].tolist(), strict=True)
            raise ValueError(
                f"rewards: expected finite numbers, got {dict(named)} for completion {row} of the "
                "batch; a reward function may return None for a completion that it cannot score."
            )

    def _groups_of(self, inputs: list[dict[str, Any]], rewards: Tensor) -> Tensor:
        """Group (n,) of each of this process's prompts, -1 without."""
        device = self.accelerator.device
        if self.pass_rates is None:
            given = [row.get(columns.GROUP, columns.NO_GROUP) for row in inputs]
            return torch.tensor(columns.group_numbers(given, self._numbered), device=device)
        identities = torch.tensor([prompts.identity(row["prompt"]) for row in inputs])
        assert self._num_groups is not None
        groups = self.pass_rates.groups(identities, self._num_groups)
        if self.model.training:  # a step is grouped by what was known before it
            everyone = self.accelerator.gather(identities.to(device))
            scored = ~rewards.isnan()
            passed = scored & (rewards >= self.args.pass_threshold)
            self.pass_rates.record(everyone, passed, scored)
        return groups.to(device)

    # -- the step ------------------------------------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> Any:
        """TRL's; completions of one prompt come together within a step, to share it."""
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        batches = self._buffered_inputs
        # An adversary of one batch weighs the prompts that TRL put there; bnpo divides by a batch's
        # tokens, experts are balanced over it, and some options of TRL's look at batches too.
        alone = self._reweighing and self.robust_scope == "microbatch"
        by_batch = self.loss_type == "bnpo" or self.aux_loss_enabled or _beyond(self.args)
        fixed = alone or by_batch or _multimodal(inputs)
        if batches is before or not self._share or fixed:
            return inputs
        # As many as surely lie in one optimizer step, whichever of the two is longer.
        window = math.gcd(len(batches), self.args.gradient_accumulation_steps)
        self._buffered_inputs = [
            batch
            for start in range(0, len(batches), window)
            for batch in prompts.together(batches[start : start + window])
        ]
        return self._buffered_inputs[self._step % self.args.steps_per_generation]

    def _wants_whole_step(self, batches: int) -> bool:
        return self._reweighing and self.robust_scope == "step"

    def _collect(self, batch: Any) -> Any:
        """Generates and scores."""
        start = time.perf_counter()
        prepared = self._prepare_inputs(batch)
        self._current_train_step_time += time.perf_counter() - start  # as TRL counts it
        self._step += 1
        return prepared

    def _whole_step(self, model: Any, batches: list[Any], items: Any) -> Tensor:
        factors = self._weigh(batches)
        self._step -= len(batches)
        total = torch.zeros((), device=self.accelerator.device)
        with overridden(self, _prepare_inputs=_prepared):
            for i, (batch, factor) in enumerate(zip(batches, factors, strict=True)):
                last = i == len(batches) - 1
                self.accelerator.gradient_state._set_sync_gradients(last)
                total += self._backward(model, batch | {FACTOR: factor}, last, items)
        return total

    def _weigh(self, batches: list[dict[str, Any]]) -> list[Tensor]:
        """The factor m q (B,) of every completion of this process's batches; one solve."""
        rows = prompts.table(batches)
        mine = slice(0, len(rows))
        if self._process_group is not None:
            first = self.accelerator.process_index * len(rows)
            mine = slice(first, first + len(rows))
            rows = self.accelerator.gather(rows)
        found, place = prompts.from_table(rows)
        # One step of the adversary for one of the optimizer; a stream takes every batch.
        whole = self.robust_scope == "step" or self._streaming
        update = whole or self.accelerator.sync_gradients
        risk = self._solve(found.losses, found.nominal, found.groups, update)
        found = found._replace(weights=risk.weights)
        self._log_prompts(found, risk.value.item(), "train")
        factors = (len(found.losses) * risk.weights)[place][mine]
        return list(factors.to(torch.float32).split([len(b[prompts.PROMPT]) for b in batches]))

    def _log_prompts(self, found: Weighted, risk: float | None, mode: str) -> None:
        """Metrics of all processes' prompts; without a risk they are not weighed."""
        metrics = self._by_group(found, PROMPTS)
        if risk is not None:
            metrics |= weighted.summary(found, risk, PROMPTS)
        self._log(metrics, mode)

    # -- the loss ------------------------------------------------------------------------------

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> Tensor:
        inputs = dict(inputs)
        facts = {name: inputs.pop(name) for name in prompts.COLUMNS if name in inputs}
        factor = inputs.pop(FACTOR, None)
        if self._evaluated is not None and facts:
            self._evaluated.append(self.accelerator.gather(prompts.table([facts])).cpu())
        if not self._reweighing or not self.model.training:
            return super()._compute_loss(model, inputs)
        if factor is None:
            (factor,) = self._weigh([facts])
        advantages = inputs["advantages"]
        factor = factor.to(advantages.dtype)
        if _beyond(self.args) or advantages.dim() != 1:
            # Every loss of TRL's is linear in the size of the advantage, whatever its sign.
            shape = (-1,) + (1,) * (advantages.dim() - 1)
            weighed = inputs | {"advantages": advantages * factor.view(shape)}
            return super()._compute_loss(model, weighed)
        return self._weighed_loss(model, inputs, factor)

    def _get_per_token_logps_and_entropies(
        self, model: Any, *args: Any, compute_entropy: bool = False, **kwargs: Any
    ) -> Any:
        """TRL's, on our head: of the policy, the policy that sampled and the reference."""
        which = head.resolve(head.asked(self.args), self.accelerator.device.type)
        with head.using(which, extras=compute_entropy):
            return super()._get_per_token_logps_and_entropies(
                self._runner(model), *args, compute_entropy=compute_entropy, **kwargs
            )

    def _weighed_loss(self, model: Any, inputs: dict[str, Any], factor: Tensor) -> Tensor:
        """TRL's objective of a microbatch, its completions (B,) multiplied by `factor`."""
        mask = inputs["completion_mask"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        count, tokens = len(factor), mask.sum()
        # The experts' auxiliary loss is no prompt's, and is taken over all completions.
        if not self.aux_loss_enabled and not _multimodal(inputs):
            kept = factor.nonzero().flatten()
            kept = kept if len(kept) else torch.zeros(1, dtype=torch.long, device=factor.device)
            inputs = {
                k: v[kept] if isinstance(v, Tensor) and v.ndim and len(v) == count else v
                for k, v in inputs.items()
            }
            mask, factor = mask[kept], factor[kept]
        completion = inputs["completion_ids"]
        logps, entropies, auxiliary = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], completion], 1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], 1),
            completion.size(1),
            compute_entropy=True,
            compute_aux_loss=self.aux_loss_enabled,
            **{name: inputs.get(name) for name in MULTIMODAL},
        )
        found = surrogate(
            logps,
            inputs.get("old_per_token_logps"),
            inputs["advantages"],
            mask=mask,
            ref_logps=inputs["ref_per_token_logps"] if self.beta else None,
            entropy=entropies,
            kl_beta=self.beta,
            correct_kl=self.args.use_bias_correction_kl,
            clip_low=self.epsilon_low,
            clip_high=self.epsilon_high,
            importance_level=self.importance_sampling_level,
        )
        self._log_tokens(found.sequences)
        accumulated = self.current_gradient_accumulation_steps
        # What TRL divides by; completions that were left out count there too.
        by: Any
        if self.loss_type == "dapo":
            window = inputs["num_items_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
            by = window * accumulated / self.args.steps_per_generation
        elif self.loss_type == "bnpo":
            by = tokens.clamp(min=1) * accumulated
        elif self.loss_type == "grpo":
            by = found.sequences.tokens.clamp(min=1) * (count * accumulated)
        else:
            by = self.max_completion_length * count * accumulated
        loss = weighted_sum(factor / by, found.losses).to(factor.dtype)
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * auxiliary / accumulated
            gathered = self.accelerator.gather_for_metrics(auxiliary)
            self._metrics["train"]["aux_loss"].append(gathered.mean().item())
        return loss

    def _log_tokens(self, s: SequenceStatistics) -> None:
        """TRL's metrics of tokens, and how many ratios were clamped, over all processes."""
        counted = s.tokens > 0
        low, high = (torch.where(counted, x / s.tokens, 0) for x in (s.low_clipped, s.high_clipped))
        sums = [s.tokens, s.entropy, s.kl, s.overflowed]
        if self.importance_sampling_level == "sequence":
            sums += [low, high, counted]
        else:
            sums += [s.low_clipped, s.high_clipped, s.tokens]
        totals = self.accelerator.reduce(torch.stack([x.sum() for x in sums]), reduction="sum")
        tokens, entropy, kl, overflowed, low_clipped, high_clipped, over = totals.tolist()
        # A completion without tokens is neither the least nor the most clipped.
        extremes = torch.stack(
            [torch.where(counted, x, torch.inf).amin() for x in (low, -high)]  # inf: none counted
        )
        extremes = self.accelerator.gather(extremes.unsqueeze(0)).amin(0)
        least, most = torch.where(extremes.isfinite(), extremes, torch.nan).tolist()
        metrics = {
            "entropy": entropy / max(tokens, 1.0),
            "clip_ratio/low_mean": low_clipped / max(over, 1.0),
            "clip_ratio/high_mean": high_clipped / max(over, 1.0),
            "clip_ratio/region_mean": (low_clipped + high_clipped) / max(over, 1.0),
            "clip_ratio/low_min": least,  # NaN is left out of means
            "clip_ratio/high_max": -most,
            "robust/overflowed": overflowed,
        }
        if self.beta:
            metrics["kl"] = kl / max(tokens, 1.0)
        self._log(metrics, "train")

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        """TRL's loop; then the worst case over all of its prompts."""
        with self._evaluating() as tables:
            output = super().evaluation_loop(*args, **kwargs)
        if tables:
            found, _ = prompts.from_table(torch.cat(tables).to(self.accelerator.device))
            value = None
            if self._reweighing:
                known = (found.losses, found.nominal, found.groups)
                risk = self._solve(*known, update=False, evaluated=True)
                found, value = found._replace(weights=risk.weights), risk.value.item()
            self._log_prompts(found, value, "eval")
        return output

    def _states(self) -> dict[str, torch.nn.Module]:
        states = super()._states()
        return states if self.pass_rates is None else states | {"pass_rates": self.pass_rates}


def _pad_token_ids(reward_funcs: Any, config: Any) -> list[int | None]:
    """The pad token that each reward model was saved with; None for functions."""
    if not isinstance(reward_funcs, list):
        reward_funcs = [] if reward_funcs is None else [reward_funcs]
    # As TRL loads them.
    given = getattr(config, "model_init_kwargs", None) or {}
    found = {name: given[name] for name in LOADING if name in given}
    found.setdefault("trust_remote_code", getattr(config, "trust_remote_code", False))
    return [
        models.pad_token_id_of(one, **found)
        if isinstance(one, str)
        else reward_inputs.pad_token_id(one)
        if isinstance(one, PreTrainedModel)
        else None
        for one in reward_funcs
    ]


def _beyond(config: Any) -> list[str]:
    """What of TRL's options `drrlhf.policy_loss` does not have; TRL computes the loss with them."""
    found = []
    if config.loss_type not in POLICY_LOSS_TYPES:
        found.append(f"loss_type={config.loss_type!r}")
    for name, plain in (
        ("delta", None),
        ("top_entropy_quantile", 1.0),
        ("off_policy_mask_threshold", None),
        ("use_adaptive_entropy", False),
        ("entropy_coef", 0.0),
    ):
        if getattr(config, name) != plain:
            found.append(f"{name}={getattr(config, name)!r}")
    if config.use_vllm and config.vllm_importance_sampling_correction:
        found.append("vllm_importance_sampling_correction=True")
    return found
