"""Changes of a pair's texts under which a model should keep its order, and how it scores them.

A change acts on the answers or on the prompt. An answer that it leaves as it was has no such form.
An attack makes an answer worse, so that it is tried on the rejected one alone.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drrlhf.stress.curves import Array
from drrlhf.transformations import (
    ATTACK,
    BY_COLUMN,
    FORM,
    PROMPT,
    SIDES,
    TRANSFORMATIONS,
    from_column,
    lookup,
    transformed,
)

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
# Rewards (rows, 2) of the chosen and the rejected answer of rows.
Score = Callable[[Sequence[Row]], Array]
ALL, NONE = "all", "none"
CHANGED_PAIRS = 1000
MOST_LOST = 0.01  # of the scores of a change, which may be NaN


@dataclass(frozen=True)
class Change:
    """A change by name; ``what`` it is in words, its ``kind``, what it is ``on``, and when it
    ``keeps`` the meaning."""

    name: str
    what: str
    kind: str = FORM
    on: str = "answer"
    keeps: str = "as whoever made the column says"


def named(name: str) -> Change:
    """The change of a name: a transformation, perhaps with a rate, or a column ``@NAME`` or
    ``prompt@NAME`` of other forms. A name that is neither is a form that a file has scores of."""
    try:
        found = lookup(name)
    except ValueError:
        on = PROMPT if name.startswith(PROMPT + BY_COLUMN) else "answer"
        return Change(name, f"other form: {name}", on=on)
    return Change(name, found.what, found.kind, found.on, found.keeps)


def chosen_changes(names: str | Sequence[str], columns: Sequence[str]) -> list[str]:
    """The names of the changes to try on data with these columns: "all" is every transformation and
    every column of other forms, "none" is none.

    Raises:
        ValueError: a name that there is not, or a column that the data lack.
    """
    given = [name for name in (names.split(",") if isinstance(names, str) else names) if name]
    forms = dict.fromkeys(_form(column) for column in columns if BY_COLUMN in column)
    by_column = [name for name in forms if name is not None]
    if given == [ALL]:
        return [*TRANSFORMATIONS, *by_column]
    if given == [NONE]:
        return []
    for name in given:
        if BY_COLUMN not in name:
            lookup(name, "changes", also="all, none, '@NAME', 'prompt@NAME'")
        elif name not in by_column:
            known = ", ".join(by_column) or "none"
            raise ValueError(
                f"changes: {name!r} needs columns such as 'chosen{name}' in the data, whose other "
                f"forms are: {known}"
            )
    return list(dict.fromkeys(given))


def _form(column: str) -> str | None:
    """The change that a column is for: ``@NAME`` of chosen@NAME, prompt@NAME as it is."""
    part, at, name = column.partition(BY_COLUMN)
    if not name or part not in (*SIDES, PROMPT):
        return None
    return column if part == PROMPT else at + name


def changed(row: Row, name: str, number: int) -> Row:
    """A row under a change; ``number`` of the row decides what is drawn."""
    part, at, column = name.partition(BY_COLUMN)
    if at:
        for side in (part,) if part else SIDES:
            row = from_column(row, side, column)
        return row
    change = lookup(name)
    apply = partial(change.apply, draw=Random(f"{name}/{number}"))
    parts = (PROMPT,) if change.on == PROMPT else SIDES[1:] if change.kind == ATTACK else SIDES
    return transformed(row, **dict.fromkeys(parts, apply))


def scored(
    rows: Sequence[Row],
    names: Sequence[str],
    pairs: NDArray[np.int64],
    score: Score,
    each: bool = False,
) -> tuple[Array, dict[str, Array]]:
    """Rewards (n, 2) of rows as they are, and under every change that changes any, NaN where it
    changes nothing; changes are tried on ``pairs`` alone. All texts go through ``score`` at once,
    so that it can put those of like length together. A change of which more than `MOST_LOST` of
    the scores are not finite is left out, and a warning says so.

    Raises:
        ValueError: with ``each``, a change that changes no text.
    """
    jobs: list[Row] = list(rows)
    found: dict[str, Array] = {}
    places: list[tuple[str, int, int, int]] = []  # change, pair, side, the job that scores it
    for name in names:
        for pair in pairs.tolist():
            new = changed(rows[pair], name, pair)
            sides = [side for side in (0, 1) if _differs(rows[pair], new, side)]
            if sides:
                places += [(name, pair, side, len(jobs)) for side in sides]
                jobs.append(new)
    idle = [name for name in names if name not in {place[0] for place in places}]
    if each and idle:
        raise ValueError(
            f"changes: {', '.join(map(repr, idle))} would change none of the {len(pairs)} pairs; "
            "leave out what does not apply to these texts, or ask for all"
        )
    rewards = score(jobs)
    lost, asked = Counter[str](), Counter[str]()
    for name, pair, side, job in places:
        new_form = found.setdefault(name, np.full((len(rows), 2), np.nan))
        reward = rewards[job, side]
        new_form[pair, side] = reward if np.isfinite(reward) else np.nan
        if np.isfinite(rewards[pair]).all():
            asked[name] += 1
            lost[name] += not np.isfinite(reward)
    for name in asked:
        if lost[name] > MOST_LOST * asked[name]:
            logger.warning(
                "change %r is left out: %d of its %d scores are NaN or infinite, and those of the "
                "texts as they are were not; score in float32, or raise --max-length",
                name,
                lost[name],
                asked[name],
            )
            del found[name]
    return rewards[: len(rows)], found


def _differs(old: Row, new: Row, side: int) -> bool:
    return old.get(PROMPT) != new.get(PROMPT) or old[SIDES[side]] != new[SIDES[side]]


def drawn_pairs(prompts: Sequence[Any], most: int, seed: int) -> NDArray[np.int64]:
    """The places of all pairs of as many prompts as have about ``most`` pairs, drawn at random. A
    pair whose prompt is None or blank is one of its own."""
    # Not by an array of strings, in which every prompt is as long as the longest one.
    numbers: dict[Any, int] = {}
    texts = ("" if prompt is None else str(prompt).strip() and str(prompt) for prompt in prompts)
    keys = (text or place for place, text in enumerate(texts))
    codes = np.array([numbers.setdefault(key, len(numbers)) for key in keys])
    if len(codes) <= most:
        return np.arange(len(codes))
    order = np.random.default_rng([seed, 3]).permutation(int(codes.max()) + 1)
    rank = order[codes]
    upto = int(np.searchsorted(np.cumsum(np.bincount(rank)), most, side="right"))
    return np.flatnonzero(rank < max(upto, 1))


def margins_under(
    margin: Array, rewards: Array | None, forms: Mapping[str, Array], other: Mapping[str, Array]
) -> Iterator[tuple[Change, str, Array]]:
    """The margins (n,) under each change, NaN where it changes nothing, with the side that is
    changed: "chosen", "rejected", "both" or "prompt". ``other`` are margins that a file gives."""
    for name, form in forms.items():
        assert rewards is not None
        change, known = named(name), np.isfinite(form)
        filled = np.where(known, form, rewards)
        if change.on == PROMPT:
            yield change, PROMPT, np.where(known.all(1), filled[:, 0] - filled[:, 1], np.nan)
            continue
        for side, new in (
            ("chosen", np.where(known[:, 0], filled[:, 0] - rewards[:, 1], np.nan)),
            ("rejected", np.where(known[:, 1], rewards[:, 0] - filled[:, 1], np.nan)),
            ("both", np.where(known.all(1), filled[:, 0] - filled[:, 1], np.nan)),
        ):
            if np.isfinite(new).any():
                yield change, side, new
    for name, new in other.items():
        yield named(name), "both", new
