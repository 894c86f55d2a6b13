"""Which ambiguity sets rows of a few entries can have: for `worst_view` and `robust_reward`."""

from __future__ import annotations

import functools

from drrlhf.ambiguity import AmbiguitySet, CVaR, Encoded, parse_ambiguity
from drrlhf.checks import constant_in_graphs
from drrlhf.ops.row_worst_case import KINDS

MEAN = "mean"
# The worst of losses is the largest, the worst of rewards the least: each has its own name.
EXTREMES = ("max", "min")


def solvable(option: str, ambiguity: str | AmbiguitySet, worst: str) -> Encoded:
    """The set, or the one that a string names, encoded, if its worst case has a closed form by
    rows. ``worst`` is the name of the worst entry alone, "max" or "min".

    Raises:
        ValueError: it has none, or there is no such set.
    """
    if isinstance(ambiguity, AmbiguitySet):
        encoded = _closed(ambiguity)
    else:
        encoded = _named(option, ambiguity, worst)
    if encoded is None:
        raise ValueError(
            f"{option}: expected {worst!r}, 'mean', 'tv:r', 'kl:temperature=t' or 'cvar:a', "
            f"without trim or momentum, got {str(ambiguity)!r}; another set has no closed form for "
            "the few entries of a row"
        )
    return encoded


@constant_in_graphs
def _named(option: str, ambiguity: str, worst: str) -> Encoded | None:
    return _read(option, ambiguity, worst)


@functools.lru_cache  # reading a string takes longer than a small table
def _read(option: str, ambiguity: str, worst: str) -> Encoded | None:
    name = ambiguity.strip().lower() if isinstance(ambiguity, str) else ambiguity
    # TV with all of the mass, which goes to the worst entries.
    name = {worst: "tv:1", MEAN: "erm"}.get(name, name)
    if name in EXTREMES:
        return None
    try:
        return _closed(parse_ambiguity(name))
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


def _closed(ambiguity: AmbiguitySet) -> Encoded | None:
    """The set encoded, None if it has no closed form for rows."""
    encoded = ambiguity.encode()
    # A running normaliser is that of one population, and rows are problems of their own.
    running = getattr(ambiguity, "momentum", None) is not None
    smooth = isinstance(ambiguity, CVaR) and ambiguity.temperature
    closed = encoded.kind in KINDS and not (encoded.trim or running or smooth)
    return encoded if closed else None
