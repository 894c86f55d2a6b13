"""Scores of preference pairs by a reward model, in batches of like length."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from drrlhf.batching import by_length
from drrlhf.data import load_preference_data
from drrlhf.stress.counterfactual import Row, counterfactuals
from drrlhf.stress.curves import Array
from drrlhf.stress.scores import Scores, from_table

BATCH_TOKENS = 4096
# Told (what is scored, answers done, answers in all).
Progress = Callable[[str, int, int], None]


class RewardModel:
    """A sequence-classification model with one label, as ``drrlhf train reward`` leaves it.

    The score of an answer is that of the prompt followed by it, tokenised as TRL's reward trainer
    does: the end token behind a standard text, the chat template for messages. Of a text longer
    than ``max_length`` tokens the last ones are read; ``cut`` counts these.

    Raises:
        ValueError: no model there, or not one label.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        max_length: int = 2048,
        device: str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

        config = AutoConfig.from_pretrained(directory)
        kind = (config.architectures or ["?"])[0]
        if "ForSequenceClassification" not in kind or config.num_labels != 1:
            raise ValueError(
                f"{directory}: expected a sequence-classification model with one label, got "
                f"{kind} with {config.num_labels}; for a policy write its margins to a file and "
                "give that as --scores"
            )
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        model: Any = AutoModelForSequenceClassification.from_pretrained(directory, dtype=dtype)
        if model.config.pad_token_id is None:
            model.config.pad_token_id = self.tokenizer.pad_token_id
        self.model = model.to(self.device).eval()
        self.max_length, self.cut = max_length, 0

    def margins(self, rows: Sequence[Row], on_progress: Callable[[int], None]) -> Array:
        """chosen minus rejected reward (n,), float64; every different text is read once."""
        rewards = self._rewards(rows, on_progress)
        return rewards[0::2] - rewards[1::2]

    def _rewards(self, rows: Sequence[Row], on_progress: Callable[[int], None]) -> Array:
        texts = [self._ids(row, side) for row in rows for side in ("chosen", "rejected")]
        index = {ids: number for number, ids in enumerate(dict.fromkeys(texts))}
        different, rewards = list(index), np.empty(len(index))
        times = np.bincount([index[ids] for ids in texts])
        for batch in by_length([len(ids) for ids in different], BATCH_TOKENS):
            rewards[batch] = self._score([different[i] for i in batch])
            on_progress(int(times[batch].sum()))
        return rewards[[index[ids] for ids in texts]]

    def _ids(self, row: Row, side: str) -> tuple[int, ...]:
        prompt, answer = row.get("prompt"), row[side]
        if isinstance(answer, str):
            end = self.tokenizer.eos_token or ""
            text = (prompt or "") + answer
            ids = self.tokenizer(text if text.endswith(end) else text + end)["input_ids"]
        else:
            messages = [*(prompt or []), *answer]
            ids = self.tokenizer.apply_chat_template(messages, return_dict=True)["input_ids"]
        self.cut += len(ids) > self.max_length
        return tuple(ids[-self.max_length :])

    @torch.inference_mode()
    def _score(self, batch: Sequence[tuple[int, ...]]) -> Array:
        padded = self.tokenizer.pad(
            {"input_ids": [list(ids) for ids in batch]}, return_tensors="pt", padding_side="right"
        )
        return self.model(**padded.to(self.device)).logits[:, 0].double().cpu().numpy()


def score_pairs(
    model: RewardModel,
    source: str | Path,
    *,
    split: str = "train",
    prompt_column: str | None = None,
    max_nan: float = 0.01,
    on_progress: Progress = lambda *_: None,
) -> Scores:
    """The pairs of a preference data set scored by ``model``, and again under every change of
    `counterfactual.CHANGES`. Columns beside those of the preference format become attributes.

    Raises:
        DataError: see `drrlhf.data.load_preference_data` and `drrlhf.stress.load_scores`.
    """
    loaded = load_preference_data(source, split=split, keep_columns=True)
    rows = loaded.dataset.to_list()

    def score(what: str, some: Sequence[Row]) -> Array:
        done = 0

        def advance(answers: int) -> None:
            nonlocal done
            done += answers
            on_progress(what, done, 2 * len(some))

        return model.margins(some, advance)

    margin = score("as they are", rows)
    after = counterfactuals(rows, margin, score)
    columns = {name: loaded.dataset[name][:] for name in loaded.dataset.column_names}
    columns = {name: values for name, values in columns.items() if name != "margin"}
    if loaded.group_names is not None:
        columns["group"] = [loaded.group_names[group] for group in columns["group"]]
    for side in ("chosen", "rejected"):
        columns[f"{side}_length"] = [_length(row[side]) for row in rows]
    table = pa.table(columns | {"margin": margin})
    for what, new in after.items():
        table = table.append_column(f"margin@{what}", pa.array(new))
    return from_table(table, str(source), prompt_column=prompt_column, max_nan=max_nan)


def _length(answer: Any) -> int:
    """Characters of an answer; of messages, of the assistant's."""
    if isinstance(answer, str):
        return len(answer)
    return sum(len(message["content"]) for message in answer if message["role"] == "assistant")
