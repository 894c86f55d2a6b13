"""The views of a pair: which forms of it a batch gets, as token ids.

A view is the same pair in another form (`drrlhf.transformations`, or a column ``chosen@NAME``).
What is drawn depends on the seed, the epoch and the row of the pair alone: not on the batch, the
process or the step, so that a resumed run draws what the saved one would have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from random import Random
from typing import Any, NamedTuple

import torch
from torch import Tensor
from trl.data_utils import extract_prompt

from drrlhf.transformations import (
    ANSWER,
    BIAS,
    BY_COLUMN,
    FORM,
    PROMPT,
    SIDES,
    from_column,
    lookup,
    transformed,
)
from drrlhf.trl import boundaries

VIEWS = "views"  # of a batch: what `ViewCollator` puts there
ROW = "view_row"  # of an example: its row in the texts
CLEAN = -1  # the family of a sequence that is as the data have it
# Entries of a batch that are laid out by sequence, and tell two of them apart.
_TELLING = ("input_ids", "completion_mask")


def acts_on(name: str) -> str:
    """What a view of that name changes: ANSWER or PROMPT.

    Raises:
        ValueError: there is no such view; an attack is none, for it need not keep the order of
            a pair whose answers are both changed.
    """
    part, at, column = name.partition(BY_COLUMN)
    if at and column and part in ("", PROMPT):
        return PROMPT if part else ANSWER
    columns = "'@NAME' for the columns chosen@NAME and rejected@NAME, or 'prompt@NAME'"
    return lookup(name, "views", (FORM, BIAS), also=columns).on


Tokenize = Callable[[Mapping[str, Any]], dict[str, list[int]]]


class Preparation:
    """What TRL's preparation of a dataset does to each row, to be done to other rows.

    It stands in for a streamed dataset of one row: TRL's functions come by in `map` and `filter`.
    ``tokenize`` goes before them, where the dataset was tokenized before.
    """

    def __init__(self, row: Mapping[str, Any], tokenize: Tokenize | None = None) -> None:
        self._row = dict(row)
        self._steps: list[tuple[bool, Callable[[dict[str, Any]], Any]]] = []
        if tokenize is not None:
            self.map(tokenize)

    @property
    def column_names(self) -> list[str]:
        return list(self._row)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        yield dict(self._row)

    def map(self, function: Any, fn_kwargs: Mapping[str, Any] | None = None) -> Preparation:
        self._steps.append((False, partial(function, **fn_kwargs or {})))
        self._row |= self._steps[-1][1](dict(self._row))
        return self

    def filter(self, function: Any) -> Preparation:
        self._steps.append((True, function))
        return self

    def ids(self, row: Mapping[str, Any]) -> dict[str, list[int]] | None:
        """The columns of token ids that TRL makes of a row; None where it leaves the row out."""
        found = dict(row)
        for filters, step in self._steps:
            if filters and not step(found):
                return None
            if not filters:
                found |= step(dict(found))
        return {name: value for name, value in found.items() if name.endswith("_ids")}


class Form(NamedTuple):
    """A changed row, and the names of the views of its two answers, None for one that is as it was;
    with ``prompt`` the view is of the prompt, and both answers are as they were."""

    row: dict[str, Any]
    names: tuple[str | None, str | None]
    prompt: bool = False


class Drawn(NamedTuple):
    """The forms of a pair; whether they are to be scored, else there is at most one, to be taken as
    it is; and a number in [0, 1)."""

    forms: list[Form]
    scored: bool
    number: float


@dataclass
class ViewTexts:
    """Draws ``count`` forms for rows of ``data``, of the views ``names``.

    ``scored`` is the share of pairs whose forms are to be scored. ``needs_prompt``: the prompt is
    taken out of the answers, as TRL's DPO does; ``end`` is the text of the end token, which no view
    changes.
    """

    data: Any
    names: Sequence[str]
    count: int
    scored: float
    seed: int
    needs_prompt: bool
    end: str | None

    def draw(self, index: int, epoch: int) -> Drawn:
        """The forms of a row in an epoch, each unlike the row."""
        draw = Random(f"{self.seed}/{epoch}/{index}")
        row, scored = self.row(index), draw.random() < self.scored
        answers = [name for name in self.names if acts_on(name) == ANSWER]
        prompts = [name for name in self.names if acts_on(name) == PROMPT]
        # Every family has its turn before one comes again.
        turns = {side: draw.sample(answers, len(answers)) for side in SIDES}
        turns[PROMPT] = draw.sample(prompts, len(prompts))
        forms = []
        for _ in range(self.count):
            if draw.random() * len(self.names) < len(prompts):
                changed, name = self._changed(row, PROMPT, turns[PROMPT], draw)
                form = Form(changed, (name, name), True)
            else:
                first, name = self._changed(row, SIDES[0], turns[SIDES[0]], draw)
                both, other = self._changed(first, SIDES[1], turns[SIDES[1]], draw)
                form = Form(both, (name, other))
            if form.names != (None, None):
                forms.append(form)
        if not scored:
            forms = self._one(row, forms, draw)
        return Drawn(forms, scored, draw.random())

    def _one(self, row: dict[str, Any], forms: list[Form], draw: Random) -> list[Form]:
        """Any one combination of the forms of the two answers, each as likely; none if it is the
        row as it was."""
        plain = [Form(row, (None, None)), *(form for form in forms if not form.prompt)]
        pairs: list[tuple[Form, Form]] = [(a, b) for a in plain for b in plain]
        pairs += [(form, form) for form in forms if form.prompt]
        chosen, rejected = draw.choice(pairs)
        if chosen.prompt:
            return [chosen]
        parts = {side: form.row[side] for side, form in zip(SIDES, (chosen, rejected), strict=True)}
        names = chosen.names[0], rejected.names[1]
        return [] if names == (None, None) else [Form(row | parts, names)]

    def row(self, index: int) -> dict[str, Any]:
        """A row of the data, ready to be changed."""
        row = self.data[index]
        if self.needs_prompt:
            row = {**row, **extract_prompt(row)}
        for side in SIDES:
            if self.end and isinstance(row[side], str):
                row[side] = row[side].removesuffix(self.end)
        return row

    def _changed(
        self, row: dict[str, Any], part: str, turns: list[str], draw: Random
    ) -> tuple[dict[str, Any], str | None]:
        """The row with a part changed by the first of the views whose turn it is that changes it,
        and the name of that; the row and None where none does."""
        for name in list(turns):
            turns.append(turns.pop(turns.index(name)))
            _, at, column = name.partition(BY_COLUMN)
            if at:
                found = from_column(row, part, column)
            else:
                apply = partial(lookup(name).apply, draw=draw)
                found = transformed(row, **{part: apply})
            if found != row:
                return dict(found), name
        return row, None


@dataclass
class ViewCollator:
    """A data collator around another: adds the views of the examples that have a `ROW`.

    ``views`` of a batch is a dict: ``inputs``, the sequences (S, L) of views that differ from all
    others of their pair; ``chosen`` (n, A) and ``rejected`` (n, B), places of the forms of each
    answer among the 2n sequences of the batch and these S behind them, -1 for none; and of the
    2n + S sequences ``prompt``, 0 or the number of another prompt, ``family``, the place of its
    view among the names or `CLEAN`, ``text``, the same number where the tokens are the same,
    ``begins``, the token at which the answer begins, and ``alone``, at which it would for itself:
    two combine that begin at the lesser of these two. ``scored`` (n,): the first form is then the
    clean one, else the only one is that to be taken; ``number`` (n,) in [0, 1); ``left``, how many
    of the ``drawn`` views there are. Two answers that are equal from the start have no views.
    """

    collator: Callable[[list[dict[str, Any]]], Any]
    tokens: Callable[[list[dict[str, Any]]], Any]  # TRL's own, inside
    texts: ViewTexts
    prepare: Preparation
    # Shared with the processes that load data.
    epoch: Tensor = field(
        default_factory=lambda: torch.zeros((), dtype=torch.int64).share_memory_()
    )

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        batch = self.collator(examples)
        if ROW in examples[0]:
            batch[VIEWS] = self._views(batch, examples)
        return batch

    def _views(self, batch: Mapping[str, Any], examples: Sequence[Mapping[str, Any]]) -> Any:
        drawn = [self.texts.draw(one[ROW], int(self.epoch)) for one in examples]
        n, made = len(examples), list[_Made]()
        # A form of one answer that is the other answer says nothing of the pair.
        seen = [{_key(batch, pair), _key(batch, n + pair)} for pair in range(n)]
        begins = [boundaries.begins(one) for one in examples] * 2
        alone = list(begins)
        for pair, one in enumerate(drawn):
            if len(seen[pair]) < 2:
                continue  # of two equal answers none is the better one, in no form
            found = [(form, self.prepare.ids(form.row)) for form in one.forms]
            rows = [(form, ids) for form, ids in found if ids is not None]
            answers = [(form, ids) for form, ids in rows if not form.prompt]
            if all(boundaries.begins(ids) == begins[pair] for _, ids in answers):
                made += [_Made.of(pair, *row) for row in rows]
            elif not one.scored:  # the whole row is taken
                made += [_Made.of(pair, *row, both=True) for row in rows]
            else:
                made += [_Made.of(pair, *row) for row in rows if row[0].prompt]
                again = list(_cut(pair, examples[pair], answers))
                made += again
                alone[pair], alone[n + pair] = again[0].alone
        m = len(made)
        laid = self.tokens([one.ids for one in made]) if made else batch
        places = [[[pair + side * n] for pair in range(n)] for side in (0, 1)]
        kept: list[int] = []
        prompt, family = [0] * (2 * n), [CLEAN] * (2 * n)
        texts = [_key(batch, i) for i in range(2 * n)]
        left = set()
        for number, (pair, form, _, needed, own) in enumerate(made):
            keys = [_key(laid, number + side * m) for side in (0, 1)]
            if keys[0] == keys[1] and (form.prompt or not drawn[pair].scored):
                continue  # two equal answers: nothing could lower their loss
            new = [asked and key not in seen[pair] for asked, key in zip(needed, keys, strict=True)]
            if form.prompt:
                new = [all(new)] * 2
            for side, name in enumerate(form.names):
                if new[side]:
                    places[side][pair].append(2 * n + len(kept))
                    kept.append(number + side * m)
                    prompt.append(number + 1 if form.prompt else 0)
                    family.append(CLEAN if name is None else self.texts.names.index(name))
                    seen[pair].add(keys[side])
                    texts.append(keys[side])
                    begins.append(boundaries.begins(made[number].ids))
                    alone.append(own[side])
                    if name is not None:
                        left.add((id(form), side))
        for pair, one in enumerate(drawn):
            if not one.scored:
                for side in (0, 1):
                    del places[side][pair][:-1]
        return {
            "inputs": {name: laid[name][kept] for name in laid if _by_sequence(laid, name)},
            "chosen": place_table(places[0]),
            "rejected": place_table(places[1]),
            "prompt": torch.tensor(prompt),
            "family": torch.tensor(family),
            "text": _numbered(texts),
            "begins": torch.tensor(begins),
            "alone": torch.tensor(alone),
            "scored": torch.tensor([one.scored for one in drawn]),
            "number": torch.tensor([one.number for one in drawn], dtype=torch.float64),
            "drawn": torch.tensor(
                sum(name is not None for one in drawn for f in one.forms for name in f.names)
            ),
            "left": torch.tensor(len(left)),
        }


class _Made(NamedTuple):
    """A row of token ids that a form of a pair was made into; which of its answers may be new; and
    where each would begin for itself."""

    pair: int
    form: Form
    ids: dict[str, Any]
    needed: tuple[bool, bool]
    alone: tuple[int, int]

    @classmethod
    def of(cls, pair: int, form: Form, ids: dict[str, Any], both: bool = False) -> _Made:
        needed = both or form.names[0] is not None, both or form.names[1] is not None
        return cls(pair, form, ids, needed, (boundaries.begins(ids),) * 2)


def _cut(
    pair: int, example: Mapping[str, Any], answers: Sequence[tuple[Form, dict[str, Any]]]
) -> Iterator[_Made]:
    """The pair as it is, first, and its forms, with the beginnings that its combinations need."""
    forms = [Form({}, (None, None)), *(form for form, _ in answers)]
    for number, ids, needed, alone in boundaries.cuts([example, *(ids for _, ids in answers)]):
        form = forms[number]
        changed = [number == 0 or name is not None for name in form.names]
        yield _Made(pair, form, ids, (needed[0] and changed[0], needed[1] and changed[1]), alone)


def _by_sequence(batch: Mapping[str, Any], name: str) -> bool:
    return isinstance(batch[name], Tensor) and batch[name].shape == batch["input_ids"].shape


def _key(batch: Mapping[str, Any], sequence: int) -> tuple[bytes, ...]:
    counted = batch["attention_mask"][sequence].bool()
    telling = (batch[name][sequence][counted] for name in _TELLING if name in batch)
    return tuple(tensor.numpy().tobytes() for tensor in telling)


def _numbered(keys: Sequence[tuple[bytes, ...]]) -> Tensor:
    """A number for each; equal ones have equal numbers."""
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return torch.tensor([numbers[key] for key in keys])


def place_table(places: Sequence[Sequence[int]]) -> Tensor:
    """(n, most), -1 behind the end of a row."""
    rows = [torch.tensor(row) for row in places]
    return torch.nn.utils.rnn.pad_sequence(rows, True, -1)
