"""What can score preference pairs: reward models, and policies by their implicit reward.

Every different text is read once, in rows of tokens in which texts with a common prompt share it,
or, where a model does not keep its numbers in such rows, in padded batches of like length. Texts
are tokenised as TRL's trainers of that kind of model do, so a score here is the one that training
saw.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import drrlhf as dr
from drrlhf import models, reward_inputs
from drrlhf.batching import by_beginning, by_length
from drrlhf.layouts.model import OneRow, in_rows
from drrlhf.stress.changes import Row
from drrlhf.stress.curves import Array


class Text(NamedTuple):
    """Tokens of a prompt with its answer, which begins at ``start``; whether some were ``cut``."""

    ids: tuple[int, ...]
    start: int
    cut: bool = False


class Scorer:
    """A model that gives texts a reward; ``cut`` counts those longer than ``max_length`` tokens."""

    kind: str  # of `drrlhf.models`
    called: str  # in words
    batch_tokens: int

    def __init__(
        self, directory: str | Path, max_length: int, device: str | None, dtype: Any
    ) -> None:
        from transformers import AutoTokenizer

        self.directory = directory
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.model = self._loaded(directory, dtype)
        self.max_length, self.cut = max_length, 0
        self.rows = in_rows(self.model, max_length)

    def rewards(self, rows: Sequence[Row], on_progress: Callable[[int], None]) -> Array:
        """Of the chosen and the rejected answer (n, 2), float64; every different text is read
        once."""
        texts = [text for row in rows for text in self._texts(row)]
        index = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        different, rewards = list(index), np.empty(len(index))
        self.cut += sum(text.cut for text in different)
        times = np.bincount([index[text] for text in texts])
        ids = [text.ids for text in different]
        batches = (
            by_length([len(one) for one in ids], self.batch_tokens)
            if self.rows is None
            else by_beginning(ids, self.batch_tokens)
        )
        for batch in batches:
            rewards[batch] = self._score([different[i] for i in batch])
            on_progress(int(times[batch].sum()))
        return rewards[[index[text] for text in texts]].reshape(-1, 2)

    def _texts(self, row: Row) -> tuple[Text, Text]:
        """The chosen and the rejected answer, each behind the prompt."""
        raise NotImplementedError

    def _score(self, batch: Sequence[Text]) -> Array:
        """Rewards (texts,), float64."""
        raise NotImplementedError

    def _check_kind(self, directory: str | Path) -> None:
        if models.kind_of(directory) != self.kind:
            raise ValueError(f"{directory}: expected a {self.called} model")

    def _loaded(self, directory: str | Path, dtype: Any) -> Any:
        return models.load(directory, self.kind, dtype).to(self.device).eval()

    def _ids(self, row: Row, side: str) -> list[int]:
        template = reward_inputs.template_arguments(row)
        return reward_inputs.reward_ids(self.tokenizer, row.get("prompt"), row[side], **template)


class RewardModel(Scorer):
    """A sequence-classification model with one label, as ``drrlhf train reward`` leaves it: whole,
    or as adapters of a model that can be loaded.

    The score of an answer is that of the prompt followed by it: the end token behind a standard
    text, the chat template for messages. Of a text longer than ``max_length`` tokens the last ones
    are read.

    Raises:
        ValueError: no model of that kind there, or not one label.
    """

    kind, called, batch_tokens = models.REWARD, "sequence-classification", 4096

    def __init__(
        self,
        directory: str | Path,
        *,
        max_length: int = 2048,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._check_kind(directory)
        super().__init__(directory, max_length, device, dtype)
        labels = self.model.config.num_labels
        if labels != 1:
            raise ValueError(f"{directory}: expected a reward model of one label, got {labels}")

    def _texts(self, row: Row) -> tuple[Text, Text]:
        return self._text(row, "chosen"), self._text(row, "rejected")

    def _text(self, row: Row, side: str) -> Text:
        ids = self._ids(row, side)
        return Text(tuple(ids[-self.max_length :]), 0, len(ids) > self.max_length)

    def _score(self, batch: Sequence[Text]) -> Array:
        ids = [text.ids for text in batch]
        model = self.rows or self.model
        return reward_inputs.scores(model, ids, self.device).double().cpu().numpy()


class Policy(Scorer):
    """A causal language model by its implicit reward, as DPO defines it (arXiv 2305.18290, eq. 5):

        beta (log p(answer | prompt) - log p_ref(answer | prompt))

    with the end token, or the chat template's, as part of the answer. The reference is the model in
    ``reference``; without one, for adapters, those that their training began with, in ``ref``
    beside them, or else the model under them. Of a text longer than
    ``max_length`` tokens the first ones are read; where the prompt alone is that long, the score is
    NaN.

    Raises:
        ValueError: no model of that kind there, or a whole model without a reference.
    """

    kind, called, batch_tokens = models.POLICY, "causal language", 1024

    def __init__(
        self,
        directory: str | Path,
        *,
        reference: str | Path | None = None,
        beta: float = 0.1,
        max_length: int = 2048,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        self._check_kind(directory)
        if reference is None and models.adapters_of(directory) is None:
            raise ValueError(
                f"{directory}: a policy's reward is its log-ratio to the model that it was trained "
                "from; give that as reference (--reference DIR)"
            )
        if not beta > 0:
            raise ValueError(f"beta must be > 0, got {beta!r}")
        super().__init__(directory, max_length, device, dtype)
        self.reference = None if reference is None else self._loaded(reference, dtype)
        self.reference_rows = (
            self.rows if self.reference is None else in_rows(self.reference, max_length)
        )
        self.began_with_adapters = reference is None and models.has_reference(directory)
        if self.began_with_adapters:
            self.model.load_adapter(str(Path(directory) / models.REFERENCE), models.REFERENCE)
            self.model.to(self.device).eval()
        self.beta = beta

    def _texts(self, row: Row) -> tuple[Text, Text]:
        prompt, template = row.get("prompt") or "", reward_inputs.template_arguments(row)
        before = (
            self.tokenizer(prompt)["input_ids"]
            if isinstance(prompt, str)
            else reward_inputs.reward_ids(
                self.tokenizer, prompt, [], **template, add_generation_prompt=True
            )
        )
        both = [self._ids(row, side) for side in ("chosen", "rejected")]
        # Tokens may merge where prompt and answer meet: the answer begins where they part.
        start = max(1, min(_common(before, ids) for ids in both))
        most = self.max_length
        chosen, rejected = (Text(tuple(ids[:most]), start, len(ids) > most) for ids in both)
        return chosen, rejected

    @torch.inference_mode()
    def _score(self, batch: Sequence[Text]) -> Array:
        padded = reward_inputs.padded([text.ids for text in batch], 0, self.device)
        starts = torch.tensor([text.start for text in batch], device=self.device)
        places = torch.arange(1, padded["input_ids"].shape[1], device=self.device)
        wanted = (places >= starts[:, None]) & padded["attention_mask"][:, 1:].bool()
        labels = padded["input_ids"][:, 1:][wanted]

        def logps(model: Any, rows: OneRow | None) -> torch.Tensor:
            logits = (
                model(**padded).logits[:, :-1][wanted]
                if rows is None
                else rows.predictions(**padded, wanted=wanted)
            )
            return dr.token_logprobs(logits, labels).double()

        after = logps(self.model, self.rows)
        with self._as_it_began():
            reference = self.model if self.reference is None else self.reference
            before = logps(reference, self.reference_rows)
        rewards = torch.zeros(len(batch), dtype=torch.float64, device=self.device)
        rows = torch.arange(len(batch), device=self.device)[:, None].expand_as(wanted)[wanted]
        rewards.index_add_(0, rows, self.beta * (after - before))
        return rewards.masked_fill(~wanted.any(1), torch.nan).cpu().numpy()

    @contextlib.contextmanager
    def _as_it_began(self) -> Iterator[None]:
        """Inside, a model of adapters is the reference of their training."""
        if self.reference is not None:
            yield
        elif not self.began_with_adapters:
            with self.model.disable_adapter():
                yield
        else:
            self.model.set_adapter(models.REFERENCE)
            try:
                yield
            finally:
                self.model.set_adapter("default")


def load_judge(
    directory: str | Path,
    *,
    reference: str | Path | None = None,
    beta: float = 0.1,
    max_length: int = 2048,
    dtype: torch.dtype | None = None,
) -> Scorer:
    """The `RewardModel` or the `Policy` that lies in a directory, in ``dtype``, else as saved.

    Raises:
        ValueError: neither of them is there, or a reference is given for a reward model.
    """
    if models.kind_of(directory) == models.POLICY:
        return Policy(directory, reference=reference, beta=beta, max_length=max_length, dtype=dtype)
    if reference is not None:
        raise ValueError(f"reference: {directory} is a reward model, which has none; leave it out")
    return RewardModel(directory, max_length=max_length, dtype=dtype)


def _common(one: Sequence[int], other: Sequence[int]) -> int:
    """The length of the prefix that both share."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other)))
