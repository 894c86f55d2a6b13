"""Small computations for the benchmark harness, and its command."""

from __future__ import annotations

from functools import partial

import torch
from typer.testing import CliRunner

from drrlhf.bench.gate import Gate
from drrlhf.bench.registry import Case, Contest, Work
from drrlhf.cli import app

RECORD = {
    "op",
    "backend",
    "dtype",
    "shape",
    "head",
    "metric",
    "value",
    "unit",
    "baseline",
    "baseline_value",
    "ratio",
}


def bench(*arguments):
    return CliRunner().invoke(app, ["bench", *map(str, arguments)], prog_name="drrlhf")


def case(build, **options) -> Case:
    return Case("an_op", "forward", "float32", (4,), build, **options)


def contest(ours=lambda: 1.0, peer=lambda: 1.0, **options) -> Contest:
    """A computation whose truth is 1: ours, plain PyTorch and a peer."""

    def work(function):
        found = {}
        return Work(
            lambda: found.update(value=torch.tensor([float(function())])), outputs=lambda: found
        )

    gate = Gate(lambda: {"value": torch.ones(1).double()}, lambda: {"value": torch.ones(1)})
    makers = {"drrlhf": ours, "plain": lambda: 1.0, "peer": peer}
    return Contest(
        {name: partial(work, function) for name, function in makers.items()},
        baseline=("plain",),
        gates=dict.fromkeys(makers, gate),
        **options,
    )
