"""Accuracy by the styles of the answers: does a model see the better one under worse looks?

RM-Bench (arXiv 2410.16184) gives every answer in three styles, from plain to adorned. In its hard
pairs the chosen answer has a plainer style than the rejected one, in its easy pairs it is the other
way round.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from drrlhf.stress.answers import STYLED, STYLES
from drrlhf.stress.curves import ERRORS, error_codes
from drrlhf.stress.resample import Bootstrap
from drrlhf.stress.scores import Scores
from drrlhf.stress.student import above


def styles_of(scores: Scores, bootstrap: Bootstrap, min_support: int) -> dict[str, Any] | None:
    """Accuracy by the style of the chosen answer (rows) and of the rejected one ("matrix"), NaN
    where there is no pair; "easy", "normal" and "hard" where the order of all styles is known. Then
    style "misleads" where more of the easy pairs are right than of the hard ones, beyond chance."""
    if not all(name in scores.attributes for name in STYLED):
        return None
    found = [scores.attributes[name] for name in STYLED]
    names = {name for attribute in found for name in attribute.names}
    known = names <= {*STYLES}
    order = [name for name in STYLES if name in names] if known else sorted(names)
    of_answer = []
    for attribute in found:
        place = np.array([*(order.index(name) for name in attribute.names), -1])
        of_answer.append(place[attribute.codes])
    chosen, rejected = of_answer
    right = 1 - ERRORS[error_codes(scores.margin)]
    there = (chosen >= 0) & (rejected >= 0)
    matrix = [
        [
            bootstrap.mean(np.where(there & (chosen == i) & (rejected == j), right, np.nan))
            for j in range(len(order))
        ]
        for i in range(len(order))
    ]
    result: dict[str, Any] = {"styles": order, "matrix": matrix}
    if known:
        parts = {
            "easy": there & (chosen > rejected),
            "normal": there & (chosen == rejected),
            "hard": there & (chosen < rejected),
        }
        for name, part in parts.items():
            result[name] = bootstrap.mean(np.where(part, right, np.nan))
        sides = parts["easy"], parts["hard"]
        result["misleads"] = above(right, *sides, bootstrap.blocks, min_support)
    return result
