"""Run the confirmation of PROTOCOL.md, in the file of the runs that it goes on from:
``python -m evidence.views.confirm --output evidence/views/results/reward.jsonl``."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

from evidence.views import run
from evidence.views.run import BASES, FIRST, SEEDS, Record, Stages

ASKED = "worst-wide"
BASE = next(base for base, attempt in BASES.items() if attempt == ASKED)
NEW = tuple(seed for seed in range(SEEDS) if seed not in FIRST)  # that had no part in the finding


def stages(records: Sequence[Record], seeds: Sequence[int], methods: Iterable[str]) -> Stages:
    """Seeds and methods: both methods on the new seeds, then the base on those of the finding."""
    both = [name for name in (ASKED, BASE) if name in methods]
    return (
        [(seed, name) for seed in seeds if seed in NEW for name in both],
        [(seed, name) for seed in seeds if seed in FIRST for name in both],
    )


main = partial(run.main, __doc__, stages)

if __name__ == "__main__":
    main()
