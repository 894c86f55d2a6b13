"""`preference_loss`: from sequence log-probs to gradients by every backend that can, with and
without launch costs, against the same mathematics in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

import drrlhf as dr
from drrlhf import backends
from drrlhf.ambiguity import parse_ambiguity
from drrlhf.bench.gate import Gate
from drrlhf.bench.registry import (
    OURS,
    SUITES,
    Case,
    Contest,
    Unavailable,
    Work,
    other_backends,
    variant,
)

PAIRS = {"cpu": 4096, "gpu": 4096, "quick": 64}
SETS = ("erm", "tv:0.1", "kl:0.1", "chi2:0.5", "cvar:0.3")
REFERENCE = "reference"
GRAPH = variant("CUDA graph")  # without what Python costs a launch
Call = Callable[[torch.dtype], tuple[Tensor, ...]]


def cases(suite: str) -> Iterator[Case]:
    """Loss, weights and the gradient, for each kind of set."""
    for text in SETS:
        yield Case(
            op="preference_loss",
            metric=f"margins to gradients, {text}",
            dtype="float32",
            shape=(PAIRS[suite],),
            unit="us",
            threads=1,
            order=4,
            build=lambda text=text: contest(  # type: ignore[misc]
                "robust_risk", suite, _margins(suite, text)
            ),
        )


def _margins(suite: str, text: str) -> Call:
    device, generator = SUITES[suite], torch.Generator().manual_seed(0)
    logps = [torch.randn(PAIRS[suite], generator=generator).mul(20).to(device) for _ in range(4)]
    ambiguity = parse_ambiguity(text)

    def call(dtype: torch.dtype) -> tuple[Tensor, ...]:
        chosen, *others = (x.to(dtype) for x in logps)
        chosen = chosen.detach().requires_grad_()
        out = dr.preference_loss(chosen, *others, ambiguity=ambiguity)
        (gradient,) = torch.autograd.grad(out.loss, chosen)
        return out.loss.detach(), out.weights, gradient

    return call


def contest(op: str, suite: str, call: Call) -> Contest:
    """`call` gives loss, weights and a gradient; `op` is the one whose backends are compared."""
    device = SUITES[suite]

    def named(found: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        return {"loss": found[0], "weights": found[1], "gradient": found[2]}

    def by(backend: str | None, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        if backend is None:
            return call(dtype)
        with backends.use(backend):
            return call(dtype)

    def work(backend: str | None) -> Work:
        found: list[tuple[Tensor, ...]] = []

        def run() -> None:
            found[:] = [by(backend)]

        return Work(run, outputs=lambda: named(found[0]))

    def graph(backend: str | None) -> Work:
        if device != "cuda":
            raise Unavailable("CUDA graphs are a GPU's")
        # A capture must not compile, and autograd's threads must have met the side stream.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        try:
            with torch.cuda.stream(side):
                by(backend)
        except backends.BackendError as error:
            raise Unavailable(str(error)) from error
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = by(backend)
        return Work(captured.replay, outputs=lambda: named(found))

    ours: dict[str, Callable[[], Work]] = {OURS: lambda: work(None), GRAPH: lambda: graph(None)}
    on: dict[str, str] = {}
    if device == "cuda":
        for backend in other_backends(op, suite):
            what = variant(backend, "CUDA graph")
            ours[what] = lambda backend=backend: graph(backend)  # type: ignore[misc]
            on[what] = backend
    gate = Gate(lambda: named(by(REFERENCE, torch.float64)), lambda: named(by(REFERENCE)))
    return Contest(
        {**ours, REFERENCE: lambda: work(REFERENCE)},
        ours=tuple(ours),
        baseline=(REFERENCE,),
        gates=dict.fromkeys(ours, gate),
        named=on,
    )
