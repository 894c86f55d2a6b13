"""Answers that a causal language model gives to prompts, and the reward of each.

The answers come by transformers' ``generate``, in batches of prompts that are padded on the left.
Every finished batch goes to a file of JSON lines, from which a run that was stopped goes on.
"""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from drrlhf import models, reward_inputs
from drrlhf.data import TEMPLATE, PreferenceData, load_prompt_data
from drrlhf.files import json_lines, tables
from drrlhf.files.tables import DataError
from drrlhf.stress.changes import ALL, CHANGED_PAIRS, Row, changed, chosen_changes, drawn_pairs
from drrlhf.stress.changes import named as named_change
from drrlhf.stress.curves import Array
from drrlhf.stress.models import RewardModel
from drrlhf.stress.scores import Attribute, attributes_of
from drrlhf.transformations import BY_COLUMN, PROMPT

AS_IS = ""  # stands among the changes for the prompts as they are
COMPLETIONS, MAX_NEW_TOKENS, TEMPERATURE, BATCH_SIZE = 4, 128, 1.0, 32
# A function as TRL calls it, or a reward model.
Reward = Callable[..., Any] | RewardModel
# Told (what is done, answers done, answers in all).
Progress = Callable[[str, int, int], None]

_WEIGHTS = (".safetensors", ".bin", ".model", ".jinja")
_SETTINGS = (
    "config.json",
    "generation_config.json",
    models.ADAPTER,
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
_BLOCK, _BLOCKS = 1 << 16, 64  # bytes, and how many such blocks of a file are read


@dataclass(frozen=True)
class Generated:
    """Rewards of K answers of a policy to each of P prompts, as they are and changed.

    ``rewards`` has an array (P, K), float64, for the prompts as they are, under the key "", and for
    each change that changes any prompt. It is NaN where the reward is None, NaN or infinite, and in
    the rows of prompts that a change leaves as they were or was not tried on. ``forms`` holds the
    changed prompts [P] of each change, None in these rows; ``completions`` the answers [P][K],
    none in these rows; ``cut`` (P, K) says which answers reached the most tokens without an end.
    ``made_with`` are the settings that the answers were made with, ``source`` names the prompts,
    and ``ignored`` says of each column that is no attribute why.
    """

    rewards: Mapping[str, Array]
    prompts: Sequence[Any]
    forms: Mapping[str, Sequence[Any]]
    completions: Mapping[str, Sequence[Sequence[str]]]
    cut: Mapping[str, NDArray[np.bool_]]
    attributes: Mapping[str, Attribute] = field(default_factory=dict)
    ignored: Mapping[str, str] = field(default_factory=dict)
    made_with: Mapping[str, Any] = field(default_factory=dict)
    source: str = "prompts"

    def __len__(self) -> int:
        return len(self.prompts)

    def asked(self, change: str) -> NDArray[np.bool_]:
        """Which prompts (P,) were asked under a change; all of them as they are."""
        if change == AS_IS:
            return np.ones(len(self), dtype=bool)
        return np.array([one is not None for one in self.forms[change]])


def generate_scores(
    model: str | Path,
    reward: Reward,
    data: str | Path,
    *,
    split: str = "train",
    completions: int = COMPLETIONS,
    max_new_tokens: int = MAX_NEW_TOKENS,
    temperature: float = TEMPERATURE,
    changes: str | Sequence[str] = ALL,
    changed_prompts: int = CHANGED_PAIRS,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    dtype: torch.dtype | None = None,
    device: str | None = None,
    file: str | Path | None = None,
    on_progress: Progress = lambda *_: None,
) -> Generated:
    """``completions`` answers of a causal language model to every prompt, and to every changed form
    of it, with the reward of each.

    The reward is asked about the prompt as it was, also where the policy was given a changed form:
    what a change costs is then due to other answers, and not to a reward that reads the prompt.

    The same data, changes and settings give the same answers on the same machine with the same
    versions, wherever an earlier run was stopped: each batch is drawn by a seed of its own, made
    from ``seed``, the change and the number of its first prompt. Another batch size, device or
    number type gives other draws. A reward function that itself draws at random is not seeded.

    Args:
        model: directory of a causal language model, whole or as adapters.
        reward: ``reward(prompts, completions, completion_ids, **columns)`` gives a number or None
            for each answer, as TRL's; or a `RewardModel`, which scores the prompt followed by it.
        data: prompts as `drrlhf.data.load_prompt_data` reads them.
        changes: names of changes of prompts, of columns ``prompt@NAME`` too; "all" or "none".
        changed_prompts: changes are tried on so many prompts, drawn by ``seed``.
        temperature: of the sampling, from the whole distribution; 0 takes the likeliest token.
        batch_size: answers that are made at once; those of one prompt stay together.
        file: where every finished batch is kept, and where this call goes on; None keeps nothing.

    Raises:
        ValueError: no causal language model, an argument out of range, a change of something else
            than prompts, a reward that gives another number of values, a file made otherwise.
        DataError: prompts that cannot be read, or too long for the model.
    """
    _check_range(completions, max_new_tokens, temperature, batch_size, seed)
    if models.kind_of(model) != models.POLICY:
        raise ValueError(f"{model}: expected a causal language model, got a reward model")
    loaded = load_prompt_data(data, split=split)
    rows = loaded.dataset.to_list()
    names = chosen_prompt_changes(changes, loaded.dataset.column_names)
    forms = _forms(rows, names, changed_prompts, seed)
    made_with = {
        "model": str(model),
        "model_files": _digest_of_model(model),
        **_told_of_reward(reward),
        "data_rows": _digest([json.dumps(rows, sort_keys=True, default=str).encode()]),
        "completions": completions,
        "max_new_tokens": max_new_tokens,
        "temperature": temperature,
        "changed_prompts": min(changed_prompts, len(rows)),
        "batch_size": batch_size,
        "seed": seed,
        "dtype": "as saved" if dtype is None else str(dtype).removeprefix("torch."),
    }
    kept = _Kept(None if file is None else Path(file), made_with)
    asked = {AS_IS: [row["prompt"] for row in rows]} | forms
    batches = _batches(asked, max(1, batch_size // completions))
    missing = [batch for batch in batches if not kept.has(*batch)]
    kept.check(asked)
    total = completions * sum(len(numbers) for _, numbers in batches)
    done = total - completions * sum(len(numbers) for _, numbers in missing)
    on_progress("Answering", done, total)
    if missing:
        answerer = _Answerer(model, completions, max_new_tokens, temperature, dtype, device)
        ids = answerer.read(asked, missing)
        for change, numbers in missing:
            drawn = answerer.answers([ids[change, i] for i in numbers], (seed, change, numbers[0]))
            rewards = _rewards(
                reward, [rows[i] for i in numbers for _ in range(completions)], drawn
            )
            kept.add(_records(change, numbers, asked[change], drawn, rewards))
            done += completions * len(numbers)
            on_progress("Answering", done, total)
    attributes, ignored = _attributes(loaded, tables.is_csv(data))
    return Generated(
        prompts=asked[AS_IS],
        forms=forms,
        attributes=attributes,
        ignored=ignored,
        made_with=made_with,
        source=str(data),
        **kept.tables(list(asked), len(rows), completions),
    )


def chosen_prompt_changes(names: str | Sequence[str], columns: Sequence[str]) -> list[str]:
    """As `chosen_changes`, of prompts alone: "all" is every form of prompts and every column
    ``prompt@NAME``.

    Raises:
        ValueError: there is no such change, the data lack its column, or it changes answers.
    """
    found = chosen_changes(names, columns)
    of_prompts = [name for name in found if named_change(name).on == PROMPT]
    if (names if isinstance(names, str) else ",".join(names)) != ALL:
        for name in found:
            if name not in of_prompts:
                raise ValueError(
                    f"changes: {name!r} changes answers, and the policy's own answers stay as they "
                    f"are; name changes of prompts, such as prompt_typos or prompt{BY_COLUMN}NAME"
                )
    return of_prompts


def _check_range(
    completions: int, max_new_tokens: int, temperature: float, batch_size: int, seed: int
) -> None:
    for name, value, least in (
        ("completions", completions, 1),
        ("max_new_tokens", max_new_tokens, 1),
        ("batch_size", batch_size, 1),
        ("seed", seed, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}")
    if not 0 <= temperature < float("inf"):
        raise ValueError(f"temperature must be a finite number of at least 0; got {temperature}")
    if temperature == 0 and completions > 1:
        raise ValueError(
            "temperature 0 gives one answer to a prompt; ask for 1 completion, or raise it"
        )


def _forms(rows: Sequence[Row], names: Sequence[str], most: int, seed: int) -> dict[str, list[Any]]:
    """The changed prompts of every change that changes any."""
    numbers = drawn_pairs([json.dumps(row["prompt"]) for row in rows], most, seed).tolist()
    found: dict[str, list[Any]] = {}
    for name in names:
        forms: list[Any] = [None] * len(rows)
        for number in numbers:
            old, new = rows[number]["prompt"], changed(rows[number], name, number)["prompt"]
            if new != old:
                forms[number] = new
        if any(one is not None for one in forms):
            found[name] = forms
    return found


def _batches(asked: Mapping[str, Sequence[Any]], size: int) -> list[tuple[str, list[int]]]:
    """The numbers of the prompts that are answered together, of one change each."""
    found = []
    for change, prompts in asked.items():
        numbers = [number for number, prompt in enumerate(prompts) if prompt is not None]
        found += [(change, numbers[i : i + size]) for i in range(0, len(numbers), size)]
    return found


def _attributes(
    loaded: PreferenceData, is_csv: bool
) -> tuple[dict[str, Attribute], dict[str, str]]:
    names = [
        name
        for name in loaded.dataset.column_names
        if name not in (PROMPT, *TEMPLATE) and not name.startswith(PROMPT + BY_COLUMN)
    ]
    columns = {name: tables.array(values) for name, values in loaded.columns(names).items()}
    if is_csv:  # whose cells the reward function is given as they are
        columns |= {name: tables.named(one) for name, one in columns.items() if name != "group"}
    return attributes_of(pa.table(columns), set())


# ---- answers and rewards -------------------------------------------------------------------------


class _Drawn(NamedTuple):
    """The answers of a batch, one after another: their texts, their tokens, and which were cut."""

    texts: list[str]
    ids: list[list[int]]
    cut: list[bool]


class _Answerer:
    """A causal language model that answers batches of prompts."""

    def __init__(
        self,
        directory: str | Path,
        completions: int,
        max_new_tokens: int,
        temperature: float,
        dtype: Any,
        device: str | None,
    ) -> None:
        from transformers import AutoTokenizer, GenerationConfig

        self.directory, self.most = directory, max_new_tokens
        self.device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self.tokenizer: Any = AutoTokenizer.from_pretrained(directory)
        self.model = models.load(directory, models.POLICY, dtype).to(self.device).eval()
        ends = self.model.generation_config.eos_token_id
        ends = self.tokenizer.eos_token_id if ends is None else ends
        self.ends = set(ends) if isinstance(ends, list) else {ends} - {None}
        pad = self.tokenizer.pad_token_id
        self.pad = min(self.ends, default=0) if pad is None else pad
        # What a model is saved with, such as a top_k, would draw from another distribution.
        self.model.generation_config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            do_sample=temperature > 0,
            num_return_sequences=completions,
            pad_token_id=self.pad,
            eos_token_id=sorted(self.ends) or None,
            **({"temperature": temperature, "top_k": 0, "top_p": 1.0} if temperature > 0 else {}),
        )

    def read(
        self, asked: Mapping[str, Sequence[Any]], batches: Sequence[tuple[str, list[int]]]
    ) -> dict[tuple[str, int], list[int]]:
        """The tokens of every prompt of the batches; `DataError` for one that does not fit."""
        most = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        found = {}
        for change, numbers in batches:
            for number in numbers:
                ids = found[change, number] = self._ids(asked[change][number])
                which = f"prompt {number + 1}" + (f" under {change}" if change else "")
                if not ids:
                    raise DataError(f"{which} has no tokens; drop the row")
                if most is not None and len(ids) + self.most > most:
                    raise DataError(
                        f"{which} has {len(ids)} tokens, which with {self.most} new ones is more "
                        f"than the {most} positions of {self.directory}; shorten it, or lower "
                        "max_new_tokens"
                    )
        return found

    def _ids(self, prompt: Any) -> list[int]:
        if isinstance(prompt, str):
            return self.tokenizer(prompt)["input_ids"]
        return reward_inputs.reward_ids(self.tokenizer, prompt, [], add_generation_prompt=True)

    @torch.inference_mode()
    def answers(self, ids: Sequence[Sequence[int]], drawn_by: tuple[Any, ...]) -> _Drawn:
        """The answers to prompts, those of one prompt after each other."""
        length = max(map(len, ids))
        padded = torch.full((len(ids), length), self.pad)
        mask = torch.zeros_like(padded)
        for row, one in enumerate(ids):
            padded[row, length - len(one) :] = torch.tensor(one)
            mask[row, length - len(one) :] = 1
        seed = hashlib.sha256("/".join(map(str, drawn_by)).encode()).digest()
        on_gpu = [torch.cuda.current_device()] if self.device.startswith("cuda") else []
        with torch.random.fork_rng(devices=on_gpu):
            torch.manual_seed(int.from_bytes(seed[:8], "big"))
            found = self.model.generate(
                input_ids=padded.to(self.device), attention_mask=mask.to(self.device)
            )
        tokens, cut = [], []
        for answer in found[:, length:].tolist():
            end = next((i for i, one in enumerate(answer) if one in self.ends), None)
            tokens.append(answer if end is None else answer[: end + 1])
            cut.append(end is None)
        return _Drawn(self.tokenizer.batch_decode(tokens, skip_special_tokens=True), tokens, cut)


def _records(
    change: str,
    numbers: Sequence[int],
    prompts: Sequence[Any],
    drawn: _Drawn,
    rewards: Sequence[float],
) -> list[dict[str, Any]]:
    """A line of the file for every prompt of a batch, whose answers come one after another."""
    found, size = [], len(rewards) // len(numbers)
    for place, number in enumerate(numbers):
        own = slice(place * size, (place + 1) * size)
        found.append(
            {
                "change": change,
                "number": number,
                "prompt": prompts[number],
                "completions": drawn.texts[own],
                "rewards": [one if np.isfinite(one) else None for one in rewards[own]],
                "cut": drawn.cut[own],
            }
        )
    return found


def _rewards(reward: Reward, rows: Sequence[Row], drawn: _Drawn) -> list[float]:
    """The rewards of answers to the prompts of these rows, NaN for None."""
    prompts = [row["prompt"] for row in rows]
    answers: list[Any] = [
        text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]
        for prompt, text in zip(prompts, drawn.texts, strict=True)
    ]
    if isinstance(reward, RewardModel):
        pairs = [
            {"prompt": prompt, "chosen": answer, "rejected": answer}
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        return reward.rewards(pairs, lambda _: None)[:, 0].tolist()
    given = (PROMPT, "completion", "completion_ids")  # as TRL leaves them out
    columns = {key: [row[key] for row in rows] for key in rows[0] if key not in given}
    found = reward(prompts=prompts, completions=answers, completion_ids=drawn.ids, **columns)
    if inspect.iscoroutine(found):
        found = asyncio.run(found)
    try:
        values = [float("nan") if one is None else float(one) for one in found]
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"reward {_name(reward)}: expected a number or None for each answer: {error}"
        ) from error
    if len(values) != len(answers):
        raise ValueError(
            f"reward {_name(reward)}: expected {len(answers)} values, one for each answer, got "
            f"{len(values)}"
        )
    return values


# ---- the file ------------------------------------------------------------------------------------


class _Kept:
    """What is known already, in memory and, where there is a path, in its file. The file begins
    with the settings that it was made with."""

    def __init__(self, path: Path | None, made_with: Mapping[str, Any]) -> None:
        self.path, self.made_with, self.open = path, made_with, False
        self.found: dict[tuple[str, int], dict[str, Any]] = {}
        lines = [] if path is None else json_lines(path)
        if not lines:
            return
        first = lines[0].get("made_with") if isinstance(lines[0], dict) else None
        if first is None:
            raise ValueError(f"{path} holds no answers; remove it, or give another place for them")
        others = [key for key in made_with if first.get(key) != made_with[key]]
        if others:
            told = ", ".join(f"{key} {first.get(key)!r}, not {made_with[key]!r}" for key in others)
            raise ValueError(
                f"{path} was made with {told}; ask for the same again, or remove it to begin anew"
            )
        self.found = {(line["change"], line["number"]): line for line in lines[1:]}

    def has(self, change: str, numbers: Sequence[int]) -> bool:
        return all((change, number) in self.found for number in numbers)

    def check(self, asked: Mapping[str, Sequence[Any]]) -> None:
        """`ValueError` where a kept answer belongs to another changed form."""
        for (change, number), line in self.found.items():
            if change in asked and asked[change][number] != line["prompt"]:
                raise ValueError(
                    f"{self.path} has answers to another form of prompt {number + 1} under "
                    f"{change!r}; remove it to begin anew"
                )

    def add(self, records: Sequence[dict[str, Any]]) -> None:
        """A batch that is finished; what the file has of it already is not written again."""
        new = [one for one in records if (one["change"], one["number"]) not in self.found]
        for one in new:
            self.found[one["change"], one["number"]] = one
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = new if self.open else self._opened() + new
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        with self.path.open("ab") as file:
            file.write(text.encode())

    def _opened(self) -> list[dict[str, Any]]:
        """Takes away what a crash left of a last line; the first line, where there is none."""
        assert self.path is not None
        self.open = True
        written = self.path.read_bytes() if self.path.is_file() else b""
        whole = written.rfind(b"\n") + 1
        if whole < len(written):
            os.truncate(self.path, whole)
        return [] if whole else [{"made_with": dict(self.made_with)}]

    def tables(self, changes: Sequence[str], prompts: int, completions: int) -> dict[str, Any]:
        """Rewards, answers and which were cut, of every change."""
        shape = prompts, completions
        rewards = {change: np.full(shape, np.nan) for change in changes}
        cut = {change: np.zeros(shape, dtype=bool) for change in changes}
        texts: dict[str, list[list[str]]] = {
            change: [[] for _ in range(prompts)] for change in changes
        }
        for (change, number), line in self.found.items():
            if change in rewards:
                rewards[change][number] = np.array(line["rewards"], dtype=float)  # None is NaN
                cut[change][number] = line["cut"]
                texts[change][number] = line["completions"]
        return {"rewards": rewards, "completions": texts, "cut": cut}


def _name(reward: Reward) -> str:
    if isinstance(reward, RewardModel):
        return str(reward.directory)
    named = reward if hasattr(reward, "__qualname__") else type(reward)
    return f"{named.__module__}:{named.__qualname__}"


def _told_of_reward(reward: Reward) -> dict[str, str | int | None]:
    """The name of a reward, and a digest of its model, with the most tokens that it reads, or of
    the file that its code lies in."""
    if isinstance(reward, RewardModel):
        return {
            "reward": _name(reward),
            "reward_files": _digest_of_model(reward.directory),
            "reward_max_length": reward.max_length,
        }
    try:
        source = inspect.getsourcefile(reward if inspect.isroutine(reward) else type(reward))
    except TypeError:  # built in
        source = None
    read = [Path(source).read_bytes()] if source and Path(source).is_file() else None
    return {"reward": _name(reward), "reward_files": None if read is None else _digest(read)}


def _digest_of_model(directory: str | Path) -> str:
    """A digest of what a model is loaded from, and of the model under adapters: settings whole, and
    of weights the size with blocks all over the file, which any training changes."""
    parts = []
    for folder in dict.fromkeys((Path(directory), Path(models.base_of(directory)))):
        for file in sorted(folder.iterdir()) if folder.is_dir() else ():
            if file.is_file() and (file.suffix in _WEIGHTS or file.name in _SETTINGS):
                size = file.stat().st_size
                parts.append(f"{file.name}/{size}".encode())
                with file.open("rb") as read:
                    for place in range(0, size, max(_BLOCK, size // _BLOCKS)):
                        read.seek(place)
                        parts.append(read.read(_BLOCK))
    return _digest(parts)


def _digest(parts: Sequence[bytes]) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(hashlib.sha256(part).digest())
    return found.hexdigest()[:16]
