"""What PROTOCOL.md expected before the runs, beside what they found."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from drrlhf.bench.table import markdown
from evidence.shift.findings import paired
from evidence.views import confirm
from evidence.views.measures import by_seed, measured
from evidence.views.run import FIRST, SEEDS, ended
from evidence.views.summary import DOMAINS


class Expected(NamedTuple):
    """A method's gain over a base in points of a measure, and its least value; None is any gain
    that is larger than chance. With ``share`` it is that part of the gain of ``other`` instead.
    With ``seeds`` only these tell of it."""

    method: str
    base: str
    group: str
    least: float | None
    measure: str = "right"
    share: float = 0.0
    other: str = ""
    seeds: Sequence[int] = ()

    @property
    def needed(self) -> set[str]:
        """The methods that tell of it."""
        return {self.method, self.base, *([self.other] if self.other else [])}


REWARD = (
    Expected("worst", "plain", "seen", 4),
    Expected("worst", "augment-long", "seen", 2),
    Expected("worst", "plain", "unseen", 2),
    Expected("worst", "augment-long", "unseen", 1),
    Expected("worst", "plain", "seen", -0.5, "clean"),
    Expected("worst", "plain", "unseen", -0.5, "clean"),
    Expected("worst-consistent", "worst", "seen", None),
    Expected("worst-half", "augment", "seen", None, share=0.75, other="worst"),
    *(
        one
        for name, base in (
            ("worst-late", "augment-long"),
            ("worst-quarter", "augment-long"),
            ("worst-wide", "augment-wide"),
        )
        for one in (
            Expected(name, "plain", "seen", 4),
            Expected(name, base, "seen", 2),
            Expected(name, base, "unseen", 1),
            Expected(name, "plain", "seen", -0.5, "clean"),
        )
    ),
)
CONFIRMED = (
    Expected(confirm.ASKED, "plain", "unseen", None, seeds=confirm.NEW),
    Expected(confirm.ASKED, "plain", "unseen", 2, seeds=confirm.NEW),
    Expected(confirm.ASKED, confirm.BASE, "unseen", 1, seeds=confirm.NEW),
    Expected(confirm.ASKED, "plain", "unseen", -0.5, "clean", seeds=confirm.NEW),
    Expected(confirm.ASKED, "plain", "seen", -0.5, "clean", seeds=confirm.NEW),
)
DPO = (
    Expected("worst", "plain", "seen", 2),
    Expected("worst", "augment-long", "seen", 1),
    Expected("worst", "plain", "seen", -1, "clean"),
    Expected("augment-long", "plain-long", "seen", 4),
    Expected("augment-long", "plain-long", "seen", 1, "clean"),
    Expected("worst", "augment", "seen", 1),
)


def table(
    records: Sequence[Mapping[str, Any]], expected: Sequence[Expected], needed: int = SEEDS
) -> str:
    """Markdown. Rows: what was expected, as soon as all seeds tell of it that should, or the first
    ones of an attempt that ended. Cells: the gain in points with a 95 % interval, and whether its
    mean is as large as expected."""
    tests, over = by_seed(records), ended(records)
    rows = []
    for one in expected:
        among = one.seeds or (FIRST if one.method in over else ())
        seeds = [tests[seed] for seed in among or tests if one.needed <= tests.get(seed, {}).keys()]
        if len(seeds) < (len(among) or needed):
            continue
        gains = _gains(seeds, one, one.method)
        _, (low, high) = paired(gains)
        least, words, digits = one.least, "above 0", 1
        if one.other:  # a share of what was found may differ by little
            least, digits = one.share * float(_gains(seeds, one, one.other).mean()), 2
            words = f"{one.share:g} of the gain of {one.other}, {least:+.2f}"
        elif least is not None:
            words = f"{least:+.1f}"
        found = ", ".join(f"{bound:+.{digits}f}" for bound in (low, high))
        met = low > 0 if least is None else gains.mean() >= least
        rows.append(
            (
                f"{one.method} over {one.base}",
                f"`{one.measure}`, {one.group}",
                words,
                f"{gains.mean():+.{digits}f} [{found}]",
                str(len(seeds)),
                "yes" if met else "no",
            )
        )
    if not rows:
        return "Nothing can be said yet."
    return markdown(("gain", "of", "expected", "found", "seeds", "met"), rows)


def _gains(
    seeds: Sequence[Mapping[str, Mapping[str, Any]]], one: Expected, method: str
) -> np.ndarray:
    """Gains (seeds,) of a method over the base."""
    domains = DOMAINS[one.group]
    return np.array(
        [
            measured(seed[method], domains, one.measure)
            - measured(seed[one.base], domains, one.measure)
            for seed in seeds
        ]
    )
