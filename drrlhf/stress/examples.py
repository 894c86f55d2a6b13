"""The texts of a few pairs that show what a number means.

Scores have no texts. These few are chosen where the texts are at hand, and go with the scores.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from drrlhf.stress.changes import Row, changed, margins_under, named
from drrlhf.stress.curves import Array
from drrlhf.transformations import BIAS, PROMPT, SIDES

OF_EACH = 2  # pairs of a change
WRONG = 5  # pairs that are most clearly ranked wrongly
LONGEST = 600  # characters of a text


def chosen(
    rows: Sequence[Row], rewards: Array, forms: Mapping[str, Array]
) -> dict[str, list[dict[str, Any]]]:
    """{"": the worst pairs as they are, "CHANGE/SIDES": right pairs that it turns furthest,
    "CHANGE/preferred": answers whose changed form gains most over themselves}."""
    margin = rewards[:, 0] - rewards[:, 1]
    found = {"": [_pair(rows[i], margin[i]) for i in _largest(-margin, WRONG)]}
    for change, side, new in margins_under(margin, rewards, forms, {}):
        turned = np.where((margin > 0) & (new < 0), margin - new, np.nan)
        shown = found[f"{change.name}/{side}"] = []
        for i in _largest(turned, OF_EACH):
            after = changed(rows[i], change.name, i)
            if side in SIDES:
                after = {**rows[i], side: after[side]}
            shown.append(_pair(rows[i], margin[i], after, new[i]))
    for name, form in forms.items():
        if named(name).kind == BIAS:
            gain = form - rewards
            found[f"{name}/preferred"] = [
                {
                    "prompt": shortened(rows[i].get(PROMPT, "")),
                    "answer": shortened(rows[i][SIDES[side]]),
                    "changed": shortened(changed(rows[i], name, i)[SIDES[side]]),
                    "reward": float(rewards[i, side]),
                    "reward_after": float(form[i, side]),
                }
                for i, side in (divmod(place, 2) for place in _largest(gain.ravel(), OF_EACH))
            ]
    return {name: some for name, some in found.items() if some}


def _largest(values: Array, most: int) -> list[int]:
    """The places of the largest values above 0."""
    known = np.flatnonzero(np.nan_to_num(values, nan=0.0) > 0)
    return known[np.argsort(-values[known], kind="stable")][:most].tolist()


def _pair(
    row: Row, margin: float, new: Row | None = None, new_margin: float | None = None
) -> dict[str, Any]:
    """The texts of a pair and its margin, and, of a changed one, what it became."""
    parts = (PROMPT, *SIDES)
    told: dict[str, Any] = {part: shortened(row.get(part, "")) for part in parts}
    told["margin"] = float(margin)
    if new is not None and new_margin is not None:
        told["margin_after"] = float(new_margin)
        told["after"] = {p: shortened(new[p]) for p in parts if new.get(p) != row.get(p)}
    return told


def shortened(value: Any) -> str:
    """A text, or the messages of one, cut to a readable length."""
    if not isinstance(value, str):
        value = "\n".join(f"{one['role']}: {one.get('content') or ''}" for one in value or ())
    return value if len(value) <= LONGEST else value[: LONGEST - 1] + "…"
