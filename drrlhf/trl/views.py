"""The worst view of a pair: what a batch becomes before its step.

Every form of every answer is scored, without gradients. The forms of a pair's two answers combine
to its views, whose losses need no more than these scores; the worst combination takes the pair's
place, and the step is that of an ordinary batch of pairs. By Danskin's theorem its gradient is that
of the worst case over views. Of a set that spreads its weight over several views one is drawn by
that weight, which is the gradient in expectation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from multiprocessing import get_start_method
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from drrlhf.functional.row_sets import solvable
from drrlhf.functional.worst_view import WORST, worst_views
from drrlhf.layouts.lengths import taken
from drrlhf.transformations import BY_COLUMN, PROMPT, SIDES, from_column
from drrlhf.transformations.rows import same_message, shared_messages
from drrlhf.trl import columns, rows
from drrlhf.trl.one_row import OneRowMixin, logger
from drrlhf.trl.view_texts import (
    CLEAN,
    ROW,
    VIEWS,
    Preparation,
    Tokenize,
    ViewCollator,
    ViewTexts,
    acts_on,
)

_COUNTS = ("scored", "drawn", "left")  # what `ViewCollator` says of the views of a batch


def check_options(config: Any) -> None:
    """ValueError unless ``views``, ``views_per_pair`` and ``view_ambiguity`` can be meant."""
    for name in (names := config.views or ()):
        acts_on(name)
        if names.count(name) > 1:
            raise ValueError(f"views: expected each name once, got {name!r} twice; leave one out")
    if not 0 <= config.views_scored <= 1:
        raise ValueError(f"views_scored: expected a share in [0, 1], got {config.views_scored!r}")
    if not 0 <= config.views_scored_from < 1:
        raise ValueError(
            "views_scored_from: expected a share of training in [0, 1), got "
            f"{config.views_scored_from!r}"
        )
    if not config.views_per_pair >= 1:
        raise ValueError(f"views_per_pair: expected >= 1, got {config.views_per_pair!r}")
    config.view_ambiguity = str(config.view_ambiguity)
    solvable("view_ambiguity", config.view_ambiguity, WORST)


class ViewsMixin(OneRowMixin):
    """Reads ``args.views`` and what goes with it, and puts the worst views into batches."""

    model: Any
    model_wrapped: Any
    data_collator: Any
    _views: Sequence[str] = ()
    accelerator: Any
    state: Any
    _signature_columns: Any
    _pad_token_id: int
    _view_texts: ViewTexts | None = None
    _view_totals: Counter[str]
    _view_ids: Preparation
    _view_collator: ViewCollator | None = None
    _views_need_prompt = False  # whether TRL takes prompts out of rows that have none

    def _score_sequences(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """What the losses of pairs need to know of sequences (m, L): (m, C), at least float32."""
        raise NotImplementedError

    def _losses_of_scores(
        self, chosen: Tensor, rejected: Tensor, columns: Mapping[str, Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Losses (m,) of pairs of scores (m, C), and by how much the chosen one wins (m,);
        ``columns`` are those of the batch, (m,)."""
        raise NotImplementedError

    def _reference_scores(
        self, every: Mapping[str, Tensor], views: Mapping[str, Any]
    ) -> Tensor | None:
        """What a reference says (m,) of the sequences; None without one. With one it is the last of
        the C scores."""
        return None

    def _known(self, chosen: Tensor, rejected: Tensor) -> dict[str, Tensor]:
        """Entries of a batch of what the reference says of its pairs (n,)."""
        raise NotImplementedError

    def _of_originals(self, chosen: Tensor, rejected: Tensor, scored: Tensor) -> dict[str, Tensor]:
        """Entries of a batch of what the model says (n, C) of its pairs as they are, of those that
        are ``scored`` (n,)."""
        return {}

    def _check_arguments(self, config: Any) -> None:
        super()._check_arguments(config)  # type: ignore[misc]
        loader = config.accelerator_config
        if self._views and (loader.dispatch_batches or loader.split_batches):
            raise ValueError(
                "views: cannot be combined with dispatch_batches or split_batches in "
                "accelerator_config, which cut a batch by its rows; leave them out"
            )
        method = getattr(config, "dataloader_multiprocessing_context", None) or get_start_method()
        if self._views and config.dataloader_num_workers and method != "fork":
            raise ValueError(
                f"views: expected data loader workers that are forked, got the start method "
                f"{method!r}; use dataloader_num_workers=0"
            )

    # -- the data ------------------------------------------------------------------------------

    def _prepare_dataset(
        self, dataset: Any, processing_class: Any, args: Any, dataset_name: str
    ) -> Any:
        """TRL's; the texts of the training data are kept for their views."""
        prepare = super()._prepare_dataset  # type: ignore[misc]
        # Evaluation data may be called "train" as well, and come later.
        if not self._views or dataset_name != "train" or self._view_texts is not None:
            return prepare(dataset, processing_class, args, dataset_name)
        _check_dataset(dataset, self._views, self._views_need_prompt)
        tokenizer = getattr(processing_class, "tokenizer", processing_class)
        self._view_texts = ViewTexts(
            dataset,
            tuple(self._views),
            args.views_per_pair,
            args.views_scored if are_scored(args) else 0.0,
            args.seed,
            self._views_need_prompt and PROMPT not in dataset.column_names,
            tokenizer.eos_token,
        )
        self._view_ids = Preparation(self._view_texts.row(0), self._tokenize(dataset, tokenizer))
        prepare(self._view_ids, processing_class, args, dataset_name)
        numbered = dataset.add_column(ROW, list(range(len(dataset))))
        return prepare(numbered, processing_class, args, dataset_name)

    def _tokenize(self, dataset: Any, tokenizer: Any) -> Tokenize | None:
        """What makes ids of a row where TRL leaves those of the dataset as they are."""
        return None

    def _collate_views(self, tokens: Any) -> None:
        """Let the collator make views; ``tokens`` is TRL's own inside of it."""
        if not self._views:
            return
        if self._view_texts is None:
            raise ValueError("views: TRL takes images as they are; use views=None with image data")
        self._view_collator = ViewCollator(
            self.data_collator, tokens, self._view_texts, self._view_ids
        )
        self.data_collator = self._view_collator

    def _set_signature_columns_if_needed(self) -> None:
        fresh = self._signature_columns is None
        super()._set_signature_columns_if_needed()  # type: ignore[misc]
        if fresh:
            self._signature_columns += [ROW]

    def _run_epoch(self, model: Any, epoch: int, *args: Any, **kwargs: Any) -> Any:
        """The loop's; an epoch has views of its own."""
        if self._view_collator is not None:
            self._view_collator.epoch.fill_(epoch)
        return super()._run_epoch(model, epoch, *args, **kwargs)  # type: ignore[misc]

    def _facts(self) -> dict[str, str]:
        """The set's; and which forms of a pair the adversary chooses from."""
        facts: dict[str, str] = super()._facts()  # type: ignore[misc]
        if not self._views:
            return facts
        named = ("views_per_pair", "views_scored", "views_scored_from", "view_ambiguity")
        options = (f"{name}={getattr(self.args, name)}" for name in named)
        return facts | {"views": ", ".join([*self._views, *options])}

    # -- the step ------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs: Any) -> Any:
        """The batch on its device; one with views becomes that of the worst ones. Our columns stay
        as they are: under DeepSpeed the loop rounds all numbers to the model's."""
        prepared = super()._prepare_inputs(inputs)  # type: ignore[misc]
        if not isinstance(prepared, Mapping):
            return prepared
        rounded = {
            name: inputs[name].to(prepared[name].device)
            for name in columns.PAIR_COLUMNS
            if name in prepared and prepared[name].dtype != inputs[name].dtype
        }
        if rounded:
            prepared = {**prepared, **rounded}
        if VIEWS not in prepared:
            return prepared
        if self.model.training:
            return self._of_worst_views(dict(prepared))
        # The training data, evaluated.
        return {name: value for name, value in prepared.items() if name != VIEWS}

    def _of_worst_views(self, batch: dict[str, Any]) -> dict[str, Any]:
        """The batch with each pair in its worst form; ``batch`` has views."""
        views = batch.pop(VIEWS)
        if not rows.separable(batch):
            raise ValueError(
                "views: expected a batch of text padded on the right, as TRL's collators make it, "
                f"got the entries {', '.join(batch)}; use views=None"
            )
        every = rows.below(batch, views["inputs"], self._pad_token_id)
        scores_now = self._scores_now()
        if are_scored(self.args) and not scores_now:
            views = _any_of(views)
        chosen, rejected, there = _combinations(views)
        weights, sums, originals = there.double(), {}, {}
        known = self._reference_scores(every, views)
        if scores_now:
            scores = self._policy_scores(every, views)
            if known is not None:
                scores = torch.cat([scores, known.to(scores).unsqueeze(1)], 1)
            repeated = {
                name: batch[name].repeat_interleave(chosen.shape[1])
                for name in rows.PAIRS
                if name in batch
            }
            losses, won = (
                one.view(chosen.shape)
                for one in self._losses_of_scores(
                    scores[chosen.flatten()], scores[rejected.flatten()], repeated
                )
            )
            scored = views["scored"]
            worst = worst_views(losses[scored], self.args.view_ambiguity, there[scored])
            broken = ~losses[scored].isfinite() & there[scored]  # is trained on, so that it shows
            found = torch.where(broken.any(1, keepdim=True), broken, worst.weights)
            weights[scored] = found.double()
            as_is = scores[chosen[:, 0]], scores[rejected[:, 0]]
            originals = self._of_originals(*as_is, scored)
            sums = {
                "views/loss": worst.values.sum(),
                "views/clean_loss": losses[scored, 0].sum(),
                "views/pairs_right": ((won > 0) | ~there)[scored].all(1).sum(),
            }
        place = _drawn(weights, views["number"]).unsqueeze(1)
        worst_forms = torch.cat([chosen.gather(1, place), rejected.gather(1, place)]).squeeze(1)
        self._log_views(views, worst_forms, sums)
        picked = batch | taken(every, worst_forms) | originals
        return picked if known is None else picked | self._known(*known[worst_forms].chunk(2))

    def _scores_now(self) -> bool:
        """Whether this step asks the model what it says of views; the same on all ranks."""
        begins = self.args.views_scored_from * self.state.max_steps
        return are_scored(self.args) and self.state.global_step >= begins

    def _policy_scores(self, every: Mapping[str, Tensor], views: Mapping[str, Any]) -> Tensor:
        """What `_score_sequences` says (m, C) of the forms of the pairs to be scored, as the model
        is evaluated; 0 of the other sequences."""
        model = self.model_wrapped
        model.eval()
        try:
            with self.compute_loss_context_manager():  # type: ignore[attr-defined]
                return self._in_parts(
                    every,
                    views,
                    views["scored"],
                    lambda inputs: self._score_sequences(model, inputs),
                )
        finally:
            model.train()

    def _in_parts(
        self,
        every: Mapping[str, Tensor],
        views: Mapping[str, Any],
        pairs: Tensor,
        score: Callable[[dict[str, Tensor]], Tensor],
    ) -> Tensor:
        """The scores (m, ...) of the sequences (m, L) that are forms of some pairs (n,) of a batch,
        0 of the others; as many calls on every rank: models that are shared meet in each."""
        extra = self.args.views_per_pair * self.args.views_scored if self._scores_now() else 0
        count = 1 + math.ceil(extra)  # parts about as long as the batch was
        which, numbers = _forms(views, pairs), pairs.nonzero()[:, 0]
        if self.accelerator.num_processes == 1:
            count = max(1, min(count, len(which)))
        lengths = every["attention_mask"].sum(1)
        if not self._in_rows:  # of like lengths, which need little padding
            which = which[lengths[which].argsort()]
        if self._in_rows and len(numbers) >= count:
            # Forms of a pair lie in one row, for what they have in common.
            parts = [_forms(views, some) for some in numbers.tensor_split(count)]
        else:
            parts = list(which.tensor_split(count))
        found: Tensor | None = None
        for part in parts:
            asked = part if len(part) else part.new_zeros(1)
            with torch.no_grad():
                scores = score(taken(every, asked))
            if found is None:
                found = scores.new_zeros(len(lengths), *scores.shape[1:])
            found[part] = scores[: len(part)]
        assert found is not None
        return found

    def _log_views(self, views: Mapping[str, Any], taken: Tensor, sums: dict[str, Tensor]) -> None:
        """Metrics over the pairs of all ranks since the last log: means of what is summed over the
        scored ones, and which views were taken."""
        family, names = views["family"][taken], ("clean", *self._views)
        mine = sums | {name: views[name].sum() for name in _COUNTS}
        mine |= {name: (family == number).sum() for number, name in enumerate(names, CLEAN)}
        table = torch.stack([one.double() for one in mine.values()])
        found = self.accelerator.gather(table.unsqueeze(0)).sum(0).tolist()
        metrics = self._metrics["train"]  # type: ignore[attr-defined]
        # Batches count by their pairs: TRL's mean of several would count them alike, and gets one
        # number. It takes what it has logged away.
        if "views/distinct" not in metrics:
            self._view_totals = Counter()
        self._view_totals.update(dict(zip(mine, found, strict=True)))
        totals = self._view_totals
        if totals["scored"]:
            metrics |= {name: [totals[name] / totals["scored"]] for name in sums}
        metrics["views/distinct"] = [totals["left"] / max(totals["drawn"], 1)]
        answers = sum(totals[name] for name in names)
        metrics |= {f"views/taken/{name}": [totals[name] / answers] for name in names}


def are_scored(config: Any) -> bool:
    """Whether the model is asked what it says of views: the set has to know it."""
    return solvable("view_ambiguity", config.view_ambiguity, WORST).kind != "erm"


def _combinations(views: Mapping[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Of every combination of the forms of a pair's answers, the pair as it is first, which form of
    the chosen answer it has and which of the rejected one, and whether it is a view of the pair:
    (n, A * B)."""
    chosen, rejected = (
        side.flatten(1)
        for side in torch.broadcast_tensors(
            views["chosen"].unsqueeze(2), views["rejected"].unsqueeze(1)
        )
    )
    there = (chosen >= 0) & (rejected >= 0)
    chosen, rejected = chosen.clamp(min=0), rejected.clamp(min=0)
    there &= views["prompt"][chosen] == views["prompt"][rejected]
    begins, alone = ((of[chosen], of[rejected]) for of in (views["begins"], views["alone"]))
    there &= (begins[0] == begins[1]) & (begins[0] == torch.minimum(*alone))
    # Nothing could lower the loss of two equal answers, which would be the worst of all.
    there[:, 1:] &= (views["text"][chosen] != views["text"][rejected])[:, 1:]
    return chosen, rejected, there


def _any_of(views: Mapping[str, Any]) -> dict[str, Any]:
    """The views with one combination of each pair's, any as likely, none to be scored."""
    chosen, rejected, there = _combinations(views)
    place = _drawn(there.double(), views["number"]).unsqueeze(1)
    picked = {"chosen": chosen.gather(1, place), "rejected": rejected.gather(1, place)}
    return {**views, **picked, "scored": torch.zeros_like(views["scored"])}


def _forms(views: Mapping[str, Any], pairs: Tensor) -> Tensor:
    """Places (k,) of the forms of some pairs, given by number or by a mask (n,), pair by pair."""
    places = torch.cat([views["chosen"], views["rejected"]], 1)[pairs]
    return places[places >= 0]


def _drawn(weights: Tensor, numbers: Tensor) -> Tensor:
    """For each row of weights (n, K) a place (n,), by weight; ``numbers`` (n,) in [0, 1)."""
    upto = weights.double().cumsum(1)
    below = numbers.double().clamp(max=1 - 1e-9)  # DeepSpeed rounds what a batch holds
    return (upto <= below.unsqueeze(1) * upto[:, -1:]).sum(1)


def _check_dataset(dataset: Any, views: Sequence[str], needs_prompt: bool) -> None:
    """ValueError for training data that can have no such views: they are streamed, without texts,
    or lack a column that a view is made of; ``needs_prompt``: a prompt would be taken out of the
    answers, and not of other forms of them."""
    if not isinstance(dataset, Dataset):
        raise ValueError(
            f"views: expected a map-style datasets.Dataset as train_dataset, got "
            f"{type(dataset).__name__}, whose texts cannot be looked up; load it without streaming"
        )
    missing = [side for side in SIDES if side not in dataset.column_names]
    if missing:
        raise ValueError(
            f"views: expected texts in the columns 'chosen' and 'rejected' of train_dataset, got "
            f"{', '.join(dataset.column_names)}; give the data as they were before tokenization"
        )
    if "chosen_input_ids" in dataset.column_names:
        raise ValueError(
            "views: the column 'chosen_input_ids' of train_dataset has a name that TRL no longer "
            "uses; remove the columns of ids, or call them chosen_ids and rejected_ids"
        )
    without_prompt = PROMPT not in dataset.column_names
    plain = isinstance(dataset[0][SIDES[0]], str)
    if plain and without_prompt and needs_prompt:
        logger.warning(
            "views: train_dataset has no column 'prompt', so that all that both answers begin with "
            "counts as the prompt. Views of an answer act on what is behind it, and what they put "
            "in front stands in the middle of the answer. Give the prompt in a column of its own."
        )
    for name in views:
        part, at, _ = name.partition(BY_COLUMN)
        of_prompt = acts_on(name) == PROMPT and not needs_prompt and (plain or at)
        if without_prompt and (of_prompt or (at and needs_prompt)):
            raise ValueError(
                f"views: {name!r} needs a column 'prompt' in train_dataset, got "
                f"{', '.join(dataset.column_names)}; give prompt and answers apart"
            )
        wanted = [name] if part else [f"{side}{name}" for side in SIDES]
        if at and not set(wanted) & set(dataset.column_names):
            raise ValueError(
                f"views: {name!r} needs the column {' or '.join(map(repr, wanted))}, and "
                f"train_dataset has {', '.join(dataset.column_names)}"
            )
        if at and without_prompt and not plain:
            used = [one for one in (*SIDES, *wanted) if one in dataset.column_names]
            _check_beginnings(dataset.select_columns(used), name.removeprefix(BY_COLUMN))


def _check_beginnings(dataset: Dataset, column: str) -> None:
    """ValueError for a conversation in a column of other forms that does not begin with what both
    answers of its row begin with: it would be another answer to another question."""
    for number, row in enumerate(dataset):
        shared = shared_messages(row)
        for side in SIDES:
            given, form = row[side], from_column(row, side, column)[side]
            count = min(shared, len(given) - 1)
            begins = not isinstance(form, str) and len(form) > count
            if not begins or not all(map(same_message, given[:count], form)):
                raise ValueError(
                    f"views: expected conversations in the column {side}{BY_COLUMN}{column} of "
                    f"train_dataset that begin with the messages that chosen and rejected have in "
                    f"common, got another beginning in row {number}; write them out from their "
                    "first message, or give prompt and answers apart"
                )
