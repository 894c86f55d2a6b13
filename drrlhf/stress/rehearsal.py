"""A stress test with rewards drawn at random: a gate on what the report will not have is refused
before a model scores for minutes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from drrlhf.stress.candidates import Candidates
from drrlhf.stress.changes import Row
from drrlhf.stress.curves import Array
from drrlhf.stress.private import table_without_texts
from drrlhf.stress.run import stress_test
from drrlhf.stress.scores import from_table
from drrlhf.stress.scoring import score_candidates, score_table

FEWEST = 20  # resamples that `stress_test` takes


class RandomJudge:
    """Gives every answer another reward, none that is missing: no report has more than its own."""

    def __init__(self, seed: int) -> None:
        self._draw = np.random.default_rng(seed)

    def rewards(self, rows: Sequence[Row], on_progress: Callable[[int], None]) -> Array:
        """(n, 2), normal."""
        return self._draw.normal(size=(len(rows), 2))


def rehearse(
    source: str | Path,
    candidates: Candidates | None,
    scored: Mapping[str, Any],
    given: Mapping[str, Any],
    texts: bool = True,
) -> None:
    """`score_table` of ``source`` with the options ``scored``, the scores of ``candidates``, and
    `stress_test` with the options ``given``, by a `RandomJudge`; where ``texts`` must not leave, of
    the table without them.

    Raises:
        ValueError, DataError: what these raise, of a gate among others.
    """
    judge = RandomJudge(given["seed"])
    table = score_table(judge, source, **scored)
    if not texts:
        table = table_without_texts(table, scored["prompt_column"])
    columns = {"prompt_column": scored["prompt_column"], "max_nan": given["max_nan"]}
    scores = from_table(table, str(source), **columns)
    best_of = None if candidates is None else {"model": score_candidates(judge, candidates)}
    stress_test({"model": scores}, best_of=best_of, **{**given, "resamples": FEWEST})
