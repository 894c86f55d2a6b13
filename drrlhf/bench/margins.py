"""`preference_loss`: from margins to gradients by every backend that can, with and without launch
costs, against the same mathematics in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from drrlhf import backends, ops
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
# loss_type, beta, label_smoothing, simpo_gamma, discopop_tau, f_divergence, f_alpha
LOSS = ("sigmoid", 0.1, 0.0, 0.5, 0.05, "reverse_kl", 0.5)

Call = Callable[[torch.dtype], tuple[Tensor, ...]]


def cases(suite: str) -> Iterator[Case]:
    """One op that returns loss, weights and gradients, for each kind of set."""
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
                "preference_loss", suite, _margins(suite, text), 7
            ),
        )


def _margins(suite: str, text: str) -> Call:
    device, generator = SUITES[suite], torch.Generator().manual_seed(0)
    logps = [torch.randn(PAIRS[suite], generator=generator).mul(20).to(device) for _ in range(4)]
    encoded = parse_ambiguity(text).encode()
    return lambda dtype: ops.preference_loss(
        *(x.to(dtype) for x in logps), None, None, None, None, None, *LOSS, *encoded
    )


def contest(op: str, suite: str, call: Call, gradient: int) -> Contest:
    """`call` of the op, which returns loss, weights, ..., and a gradient at index `gradient`."""
    device = SUITES[suite]

    def named(found: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        return {"loss": found[0], "weights": found[1], "gradient": found[gradient]}

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
        try:
            by(backend)  # compiles, which a capture must not
        except backends.BackendError as error:
            raise Unavailable(str(error)) from error
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
