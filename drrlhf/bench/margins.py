"""`preference_loss`: from margins to gradients, against the same mathematics in plain PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from drrlhf import backends, ops
from drrlhf.ambiguity import parse_ambiguity
from drrlhf.bench.gate import Gate
from drrlhf.bench.registry import OURS, SUITES, Case, Contest, Unavailable, Work

PAIRS = {"cpu": 4096, "gpu": 4096, "quick": 64}
SETS = ("erm", "tv:0.1", "kl:0.1", "chi2:0.5", "cvar:0.3")
REFERENCE = "reference"
GRAPH = f"{OURS} (CUDA graph)"  # without what Python costs a launch


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
            build=lambda text=text: _contest(suite, text),  # type: ignore[misc]
        )


def _contest(suite: str, text: str) -> Contest:
    device = SUITES[suite]
    generator = torch.Generator().manual_seed(0)
    logps = [torch.randn(PAIRS[suite], generator=generator).mul(20).to(device) for _ in range(4)]
    encoded = parse_ambiguity(text).encode()

    def call(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        return ops.preference_loss(
            *(x.to(dtype) for x in logps), None, None, None, None, None, "sigmoid", 0.1, 0.0, 0.5,
            0.05, "reverse_kl", 0.5, *encoded,
        )  # fmt: skip

    def named(found: tuple[Tensor, ...]) -> Mapping[str, Tensor]:
        return {"loss": found[0], "weights": found[1], "d chosen": found[7]}

    def by_reference(dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
        with backends.use("reference"):
            return call(dtype)

    def work(function: Callable[[], tuple[Tensor, ...]]) -> Work:
        found: list[tuple[Tensor, ...]] = []

        def run() -> None:
            found[:] = [function()]

        return Work(run, outputs=lambda: named(found[0]))

    def graph() -> Work:
        if device != "cuda":
            raise Unavailable("CUDA graphs are a GPU's")
        call()  # compiles, which a capture must not
        torch.cuda.synchronize()
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            found = call()
        return Work(captured.replay, outputs=lambda: named(found))

    gate = Gate(lambda: named(by_reference(torch.float64)), lambda: named(by_reference()))
    return Contest(
        {OURS: lambda: work(call), GRAPH: graph, REFERENCE: lambda: work(by_reference)},
        ours=(OURS, GRAPH),
        baseline=(REFERENCE,),
        gates={OURS: gate, GRAPH: gate},
    )
