"""`robust_risk`: its sets, sizes on both sides of blocks, weights and traps."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import drrlhf as dr
from tests.cases import INFINITY, NAN, Case, Made, integers, numbers, pairwise, said

SETS = [
    "erm",
    "tv:0.1",
    "tv:0.7",
    "kl:0.1",
    "kl:2",
    "kl:temperature=0.3",
    "kl:temperature=-0.5",
    "chi2:0.5",
    "chi2:20",
    "chi2:penalty=0.7",
    "cvar:0.3",
    "cvar:0.3,temperature=0.4",
    "cvar:0.3,temperature=1e-8",
    "tv:0.2,trim=0.15",
    "kl:0.4,trim=0.3",
    "chi2:0.3,trim=0.07",
    "cvar:0.4,trim=0.25",
    "erm:trim=0.3",
    "group:3,step_size=0.4",
    "group:3,step_size=0.4,trim=0.2",
]


class Found(NamedTuple):
    value: Tensor
    weights: Tensor
    dual: Tensor | None
    stepped: Tensor


def solve(
    losses: Tensor,
    ambiguity: str,
    nominal: Tensor | None = None,
    groups: Any = torch.int64,
    update: bool = True,
    factor: float = -2.5,
) -> Made:
    """The worst case of losses; groups: a dtype of ids that repeat, or ids."""
    if isinstance(groups, torch.dtype):
        groups = (torch.arange(len(losses)) % 3).to(groups)

    def run(losses):
        state = dr.GroupState(3).to(losses.device)
        state.weights.copy_(torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64))
        risk = dr.robust_risk(
            losses, ambiguity, nominal=nominal, groups=groups, group_state=state, update=update
        )
        dual = risk.dual if risk.value.isfinite() else None  # there is none otherwise
        return Found(risk.value, risk.weights, dual, state.weights.clone())

    return Made(run, [losses], {"value": torch.tensor(factor)})


def uneven(n: int, masked: bool = False) -> Tensor:
    """Nominal weights, of which some are 0."""
    p = numbers(n, seed=1).abs().double() + 0.05
    if masked:
        p[1::3] = 0.0
    return p


# Losses of one kind each: what searches have to bear.
LOSSES = {
    "spread": lambda n: numbers(n),
    "ties": lambda n: (numbers(n) * 2).round() / 2,
    "all equal": lambda n: numbers(n) * 0 + 3,
    "a heavy tail": lambda n: (2 * numbers(n)).exp(),
    "large and of one sign": lambda n: numbers(n) - 1e4,
    "tiny": lambda n: numbers(n) * 1e-6,
}


def _set(ambiguity: str, losses: str, weights: str, n: int) -> Made:
    x = LOSSES[losses](n).double()
    nominal = {"uniform": None, "uneven": uneven(n), "masked": uneven(n, True)}[weights]
    return solve(x, ambiguity, nominal)


def _masked(bad: float) -> Made:
    losses, nominal = numbers(7), uneven(7, True)
    losses[1] = bad
    return solve(losses, "tv:0.2", nominal)


def _not_finite(ambiguity: str, bad: float) -> Made:
    losses = numbers(7)
    losses[2] = bad
    return solve(losses, ambiguity)


CASES = [
    *(
        Case(
            said(x),
            "every set on losses, weights and few or many entries of every kind",
            lambda x=x: _set(**x),
        )
        for x in pairwise(
            ambiguity=SETS,
            losses=list(LOSSES),
            weights=["uniform", "uneven", "masked"],
            n=[9, 37, 1, 2],
        )
    ),
    *(
        Case(
            f"{ambiguity}, {n} losses",
            "either side of a warp, of a block, and of several",
            lambda n=n, a=ambiguity: solve(numbers(n), a, uneven(n, True)),
        )
        for n, ambiguity in zip(
            (31, 32, 33, 127, 128, 129, 255, 256, 257, 511, 512, 513, 1023, 1024, 1025, 2049),
            ("kl:0.1", "tv:0.2,trim=0.1", "chi2:0.5", "cvar:0.3,temperature=0.4") * 4,
        )
    ),
    Case(
        "16405 losses",
        "a grid of blocks searches, and the last has little to do",
        lambda: solve(numbers(16405), "tv:0.1"),
    ),
    *(
        Case(
            f"losses in {said({'': dtype})}",
            "narrow numbers in, float32 out, a narrow gradient",
            lambda d=dtype: solve(numbers(17, dtype=d), "kl:0.2"),
        )
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    ),
    *(
        Case(
            f"group ids in {said({'': dtype})}",
            "ids are read in the width that they have",
            lambda d=dtype: solve(numbers(17), "group:3", groups=d),
        )
        for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8)
    ),
    Case(
        "a group is absent",
        "its weight stays as it was, to the bit",
        lambda: solve(numbers(8), "group:3", groups=torch.arange(8) % 2),
    ),
    Case(
        "a group whose entries are masked",
        "it is absent, too",
        lambda: solve(numbers(8), "group:3", uneven(8, True), groups=torch.arange(8) % 3),
    ),
    Case(
        "no update",
        "the weights are used and not stepped",
        lambda: solve(numbers(8), "group:3", update=False),
    ),
    Case(
        "huge losses of groups",
        "exp(step size times loss) overflows long before",
        lambda: solve(numbers(8) * 1e4, "group:3,step_size=1"),
    ),
    Case("every other loss", "a stride", lambda: solve(numbers(34)[::2], "kl:0.3")),
    Case("one loss for all", "a stride of 0", lambda: solve(numbers(1).expand(9), "chi2:0.5")),
    Case(
        "every other nominal weight",
        "a stride there",
        lambda: solve(numbers(17), "cvar:0.4", uneven(34)[::2]),
    ),
    Case(
        "every other group id",
        "a stride there",
        lambda: solve(numbers(17), "group:3", groups=integers(0, 3, 34)[::2]),
    ),
    Case("no losses", "nothing to divide by", lambda: solve(numbers(0), "kl:0.1")),
    *(
        Case(
            f"{ambiguity}, all masked",
            "a value of 0, connected, and not 0 by 0",
            lambda a=ambiguity: solve(numbers(5) * NAN, a, torch.zeros(5)),
        )
        for ambiguity in ("tv:0.2", "kl:0.1", "group:3")
    ),
    *(
        Case(f"{bad} without weight", "0 times it is not added", lambda b=bad: _masked(b))
        for bad in (NAN, INFINITY, -INFINITY)
    ),
    *(
        Case(
            f"{ambiguity} of {bad}",
            "seen in value and weights, and no search without end",
            lambda a=ambiguity, b=bad: _not_finite(a, b),
        )
        for ambiguity, bad in zip(
            (
                "erm",
                "tv:0.2",
                "kl:0.3",
                "kl:temperature=0.5",
                "chi2:0.5",
                "cvar:0.3,temperature=1",
                "group:3",
                "cvar:0.4,trim=0.2",
            ),
            (NAN, INFINITY, -INFINITY, NAN, INFINITY, NAN, INFINITY, NAN),
        )
    ),
    *(
        Case(
            f"weights whose sum is {size}",
            "only ratios matter, also of what is no float64",
            lambda s=size: solve(numbers(4), "kl:0.5", uneven(4) * s),
        )
        for size in (2.0**1022, 2.0**-1060)
    ),
    *(
        Case(
            f"{ambiguity}, {'' if sign > 0 else '-'}1000",
            "every l/t below -104, where exp is 0",
            lambda a=ambiguity, s=sign: solve(
                s * torch.tensor([1000.0, 1000.0005, 1007.0, 999.0]).double(), a
            ),
        )
        for ambiguity in ("kl:temperature=1e-3", "cvar:0.3,temperature=1e-3")
        for sign in (1, -1)
    ),
    Case(
        "upstream gradient 0",
        "a gradient of zeros",
        lambda: solve(numbers(5), "tv:0.3", factor=0.0),
    ),
]
