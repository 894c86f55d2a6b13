"""Changes of the text that leave its meaning alone, and the accuracy lost to each.

A pair that the model ranked by its meaning keeps its order. Every change is applied to the answers
alone, the prompt stays; a pair that a change leaves as it was does not count for it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from random import Random
from typing import Any

import numpy as np
from numpy.typing import NDArray

from drrlhf.stress.curves import ERRORS, Array, band, error_codes
from drrlhf.stress.resample import counts
from drrlhf.transformations import SIDES, TRANSFORMATIONS, transformed

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Change:
    """A transformation, by name, of the answers named in ``sides``; ``what`` it is in reports."""

    what: str
    transformation: str
    sides: tuple[str, ...] = SIDES


CHANGES: Mapping[str, Change] = {
    "padding": Change(
        "length: the rejected answer gets an empty closing sentence", "sentence", ("rejected",)
    ),
    "lower_case": Change("case: both answers in lower case", "lower_case"),
    "upper_case": Change("case: both answers in capitals", "upper_case"),
    "whitespace": Change(
        "whitespace: doubled spaces and a blank line behind both answers", "whitespace"
    ),
    "sentence_order": Change(
        "order: the sentences of both answers, last to first", "sentence_order"
    ),
}
POSITIONS = "positions: the rejected answer is read first, the chosen one second"


def changed(row: Row, change: Change) -> Row:
    """The row with its answers changed; messages: the last one of the assistant."""
    apply = partial(TRANSFORMATIONS[change.transformation].apply, draw=Random(0))
    return transformed(row, **dict.fromkeys(change.sides, apply))


def counterfactuals(
    rows: Sequence[Row], margin: Array, score: Callable[[str, Sequence[Row]], Array]
) -> dict[str, Array]:
    """The margins (n,) under every change, NaN where it changes nothing; by the change's words.

    ``score(what, rows)`` gives margins for rows; ``what`` is for its progress bar.
    """
    found = {}
    for change in CHANGES.values():
        new = [changed(row, change) for row in rows]
        touched = np.array([a != b for a, b in zip(new, rows, strict=True)])
        if touched.any():
            after = np.full(len(margin), np.nan)
            after[touched] = score(change.what, [new[i] for i in np.flatnonzero(touched)])
            found[change.what] = after
    swapped = [{**row, "chosen": row["rejected"], "rejected": row["chosen"]} for row in rows]
    return found | {POSITIONS: -score(POSITIONS, swapped)}


def losses(
    margin: Array, after: Mapping[str, Array], blocks: NDArray[np.int64], draws: Array
) -> list[dict[str, Any]]:
    """Of each change: pairs, accuracy before and after, what is lost with its band, decisions that
    flip. Only the pairs that the change touches."""
    table = []
    for what, new in after.items():
        known = np.isfinite(new)
        if not known.any():
            continue
        old, now = (ERRORS[error_codes(one[known])] for one in (margin, new))
        nowhere = np.zeros(len(old), dtype=np.int64)
        pairs, lost = np.zeros((2, draws.shape[1]))
        sums = counts(blocks[known], nowhere, 1)[:, 0], counts(blocks[known], nowhere, 1, now - old)
        pairs[: len(sums[0])], lost[: len(sums[0])] = sums[0], sums[1][:, 0]
        drawn = (draws @ lost / np.maximum(draws @ pairs, 1)).tolist()
        table.append(
            {
                "what": what,
                "pairs": len(old),
                "accuracy_before": 1 - float(old.mean()),
                "accuracy": 1 - float(now.mean()),
                "lost": band(float((now - old).mean()), drawn),
                "flipped": float((np.sign(margin[known]) != np.sign(new[known])).mean()),
            }
        )
    return sorted(table, key=lambda one: -one["lost"]["value"])
