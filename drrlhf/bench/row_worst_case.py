"""`row_worst_case`, as `worst_view` calls it, against `torch.logsumexp` of the same rows."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

import drrlhf as dr
from drrlhf.bench.registry import SUITES, Case, Contest
from drrlhf.bench.robust_risk import reductions

SETS = ("max", "mean", "kl:temperature=1", "cvar:0.4", "tv:0.3")
SHAPES = {
    "cpu": ((64, 4), (64, 16), (4096, 8), (65536, 4)),
    "gpu": ((64, 16), (65536, 4)),
    "quick": ((16, 4),),
}


def cases(suite: str) -> Iterator[Case]:
    """Every set on tables of n pairs and K views."""
    for text in SETS:
        for shape in SHAPES[suite]:
            yield Case(
                op="row_worst_case",
                metric=text,
                dtype="float32",
                shape=shape,
                unit="us",
                order=6,
                threads=1,
                build=partial(_contest, text, shape, SUITES[suite]),
            )


def _contest(text: str, shape: tuple[int, ...], device: str) -> Contest:
    return reductions(
        shape,
        device,
        lambda losses: dr.worst_view(losses, text),
        lambda losses: torch.logsumexp(losses, 1),
    )
