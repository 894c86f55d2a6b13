"""The correctness gate: an implementation against float64, beside plain PyTorch at its dtype."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

RMS_FACTOR = 2.0
WORST_FACTOR = 4.0  # one logit's rounding decides the worst element


class Verdict(NamedTuple):
    """How far one quantity is from float64, relative to its root mean square there.

    rms, worst: of what is judged; allowed_rms, allowed_worst: what plain PyTorch's errors allow.
    """

    quantity: str
    rms: float
    allowed_rms: float
    worst: float
    allowed_worst: float

    @property
    def ok(self) -> bool:
        return self.rms <= self.allowed_rms and self.worst <= self.allowed_worst  # NaN fails

    def __str__(self) -> str:
        return (
            f"{self.quantity}: RMS error {self.rms:.2g} (at most {self.allowed_rms:.2g}), "
            f"worst {self.worst:.2g} (at most {self.allowed_worst:.2g}), relative to float64"
        )


def judge(
    quantity: str,
    result: Tensor,
    plain: Tensor,
    truth: Tensor,
    floor: float = 0.0,
    most: float = math.inf,
) -> Verdict:
    """Hold `result` against `truth` (float64), allowing it twice the RMS error of `plain`.

    The worst element may be four times as far off as plain's. Errors of plain below the rounding
    of the result itself, or below `floor` (absolute), count as that: a plain result that is exact
    by luck sets no standard. With `most`, plain's RMS error excuses that much and no more: a plain
    result that is noise sets none either.
    """
    if result.shape != truth.shape or plain.shape != truth.shape:
        raise ValueError(
            f"{quantity}: expected shape {tuple(truth.shape)}, got {tuple(result.shape)} and, from "
            f"plain PyTorch, {tuple(plain.shape)}"
        )
    truth = truth.detach().double()
    scale = float(truth.square().mean().sqrt()) or 1.0
    unit = torch.finfo(result.dtype).eps / 4  # RMS of rounding to nearest, nearly
    rms, worst = _errors(result, truth, scale)
    plain_rms, plain_worst = _errors(plain, truth, scale)
    largest = float(truth.abs().max()) / scale
    return Verdict(
        quantity,
        rms,
        RMS_FACTOR * max(min(plain_rms, most), unit, floor / scale),
        worst,
        WORST_FACTOR * max(plain_worst, 2 * unit * largest, floor / scale),
    )


def _errors(result: Tensor, truth: Tensor, scale: float) -> tuple[float, float]:
    error = (result.detach().double().to(truth.device) - truth) / scale
    return float(error.square().mean().sqrt()), float(error.abs().max())


@dataclass(eq=False)
class Gate:
    """The truth of one computation, and plain PyTorch's result of it; made once, when asked for.

    truth: quantity -> float64 tensor. plain: the same at the dtype that is measured. floors:
    quantity -> absolute error below which plain's sets no standard. most: the largest relative RMS
    error of plain's that is still a standard.
    """

    truth: Callable[[], Mapping[str, Tensor]]
    plain: Callable[[], Mapping[str, Tensor]]
    floors: Callable[[], Mapping[str, float]] = dict
    most: float = math.inf

    @cached_property
    def _known(self) -> tuple[Mapping[str, Tensor], Mapping[str, Tensor], Mapping[str, float]]:
        truth = self.truth()
        return truth, {k: v.detach().clone() for k, v in self.plain().items()}, self.floors()

    def judge(self, outputs: Mapping[str, Tensor]) -> list[Verdict]:
        """One verdict for each quantity of the truth."""
        truth, plain, floors = self._known
        return [
            judge(name, outputs[name], plain[name], truth[name], floors.get(name, 0.0), self.most)
            for name in truth
        ]
