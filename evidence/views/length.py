"""Length bias, from the kept changes: what it is worth to say one's last sentence once more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

import numpy as np

from drrlhf.bench.table import markdown
from evidence.tables import compared
from evidence.views.run import SEEDS
from evidence.views.summary import DOMAINS, compared_with, complete

LONGER = "repeated"  # a held-out change that adds length alone


def bias(test: Mapping[str, Any], domains: Sequence[str]) -> float:
    """Points of accuracy when the chosen answer is the longer one, less those when the rejected
    answer is; 0 where length counts for nothing."""
    sides = (
        fmean(test[domain]["changes"][f"{LONGER}/{side}"] for domain in domains)
        for side in ("chosen", "rejected")
    )
    chosen, rejected = sides
    return 100 * (chosen - rejected)


def table(records: Sequence[Mapping[str, Any]], needed: int = SEEDS) -> str:
    """Markdown: the bias of `plain` and the differences of methods to it, a column a group of
    domains."""
    seeds = complete(records)
    if len(seeds) < needed:
        return f"{len(seeds)} of {needed} seeds so far."
    found = {
        group: {
            method: np.array([bias(seed[method], domains) for seed in seeds]) for method in seeds[0]
        }
        for group, domains in DOMAINS.items()
    }
    plain = [f"{values['plain'].mean():.1f}" for values in found.values()]
    against = {"plain": compared_with(seeds[0])["plain"]}
    return markdown(
        ("length bias", *DOMAINS), [("plain", *plain), *compared(found, against, digits=1)]
    )
