"""Which ambiguity sets rows of a few entries can have: for `worst_view` and `robust_reward`."""

from __future__ import annotations

import functools

from drrlhf.ambiguity import CVaR, Encoded, parse_ambiguity
from drrlhf.checks import constant_in_graphs
from drrlhf.ops.row_worst_case import KINDS

# "max" is TV with all of the mass: it goes to the largest entries.
NAMES = {"max": "tv:1", "mean": "erm"}


@constant_in_graphs
def solvable(option: str, ambiguity: str) -> Encoded:
    """The set that a string names, encoded, if its worst case has a closed form by rows.

    Raises:
        ValueError: it has none, or there is no such set.
    """
    return _solvable(option, ambiguity)


@functools.lru_cache  # reading a string takes longer than a small table
def _solvable(option: str, ambiguity: str) -> Encoded:
    found = parse_ambiguity(NAMES.get(ambiguity.strip().lower(), ambiguity))
    encoded = found.encode()
    if encoded.kind not in KINDS or encoded.trim or (isinstance(found, CVaR) and found.temperature):
        raise ValueError(
            f"{option}: expected 'max', 'mean', 'tv:r', 'kl:temperature=t' or 'cvar:a', without "
            f"trim, got {ambiguity!r}; another set has no closed form for the few entries of a row"
        )
    return encoded
