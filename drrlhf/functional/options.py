"""Keyword options of several functions, told apart by the function that they belong to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def take(
    function: str, options: Mapping[str, Any], *kinds: frozenset[str]
) -> tuple[dict[str, Any], ...]:
    """The part of `options` that each kind, a set of names, has; TypeError for a name of none."""
    known: frozenset[str] = frozenset().union(*kinds)
    for name in options:
        if name not in known:
            raise TypeError(f"{function}() got an unexpected keyword argument {name!r}")
    return tuple({k: v for k, v in options.items() if k in kind} for kind in kinds)
