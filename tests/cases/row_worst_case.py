"""`row_worst_case`: sets, what counts, ties, infinities, widths of rows."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from drrlhf import ops
from tests.cases import INFINITY, NAN, Case, Made, integers, numbers, pairwise, said

SETS = [
    ("tv", 1.0),
    ("erm", 0.0),
    ("tv", 0.0),
    ("tv", 0.35),
    ("cvar", 0.4),
    ("cvar", 1.0),
    ("kl_temperature", 0.5),
    ("kl_temperature", -2.0),
]


class Found(NamedTuple):
    values: Tensor
    weights: Tensor


def made(table: Tensor, kind="tv", parameter=1.0, mask=None, nominal=None) -> Made:
    def run(x):
        return Found(*ops.row_worst_case(x, mask, nominal, kind, parameter))

    return Made(run, [table], {"values": numbers(len(table), seed=5)})


def rows(set, width=5, dtype=torch.float32, masked=False, weighted=False, ties=False, n=70) -> Made:
    table = 3 * numbers(n, width)
    table = (table.round() if ties else table).to(dtype)
    mask = integers(0, 3, n, width, seed=1) > 0 if masked else None
    nominal = numbers(width, seed=2).abs() * (torch.arange(width) != 1) if weighted else None
    return made(table, *set, mask, nominal)


def with_bad(set, bad: float, counts: bool) -> Made:
    """A bad entry in most rows, alone in the last, twice in one, beside its opposite in another."""
    table, mask = numbers(6, 4), torch.ones(6, 4, dtype=torch.bool)
    table[0, 1] = table[1, 0] = table[3, 2] = table[3, 3] = table[5, 1] = bad
    table[1, 3] = -bad
    mask[5] = False
    mask[5, 1] = True
    return made(table, *set, mask if counts else mask & (table.abs() < INFINITY))


def ending(set, width: int, finite: int) -> Made:
    """Rows of numbers, and -inf from the place `finite` on."""
    table = numbers(6, width)
    table[:, finite:] = -INFINITY
    return made(table, *set)


def strided() -> Made:
    mask = integers(0, 2, 5, 40, seed=1).bool()
    return made(numbers(5, 40).T, "cvar", 0.3, mask.T, numbers(10).abs()[::2])


CASES = [
    *(
        Case(said(x), "sets, what counts with which weight, ties", lambda x=x: rows(**x))
        for x in pairwise(
            set=SETS,
            masked=[False, True],
            weighted=[False, True],
            ties=[False, True],
            width=[5, 1, 4, 33],
            dtype=[torch.float32, torch.float64, torch.bfloat16],
        )
    ),
    *(
        Case(
            f"{kind} {parameter}, {bad}, counts {counts}",
            "has all of the weight, or none; seen in its row alone",
            lambda s=(kind, parameter), b=bad, c=counts: with_bad(s, b, c),
        )
        for kind, parameter in SETS
        for bad in (NAN, INFINITY, -INFINITY)
        for counts in (True, False)
    ),
    *(
        Case(
            f"{kind} {parameter} of {width}, of which the rest are -inf",
            "a share that is no binary fraction leaves 1e-17 behind, which is none",
            lambda s=(kind, parameter), w=width, f=finite: ending(s, w, f),
        )
        for kind, parameter, width, finite in (
            ("cvar", 0.8, 10, 8),
            ("cvar", 7 / 25, 25, 7),
            ("tv", 0.2, 10, 8),
            ("tv", 1 - 7 / 25, 25, 7),
        )
    ),
    Case(
        "kl of a temperature far beyond the losses",
        "the mean of them, and no digit lost",
        lambda: rows(("kl_temperature", 1e12), dtype=torch.float64, masked=True),
    ),
    Case("wide rows", "more than a warp has lanes", lambda: rows(("cvar", 0.2), width=300, n=3)),
    Case("more rows than a program", "several programs", lambda: rows(("tv", 0.2), n=300)),
    Case("no rows", "an empty grid", lambda: made(numbers(0, 3))),
    Case("no entries", "rows of nothing", lambda: made(numbers(3, 0))),
    Case("strided", "losses, mask and weights", strided),
]
