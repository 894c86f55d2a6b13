"""`token_logprobs` against log-softmax and gather, the faster of two spellings."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

import drrlhf as dr
from drrlhf.bench import peers
from drrlhf.bench.gate import Gate
from drrlhf.bench.registry import (
    OURS,
    SUITES,
    Case,
    Contest,
    Unavailable,
    Work,
    on_backend,
    other_backends,
    variant,
)

SHAPES = {"cpu": (1024, 128256), "gpu": (8192, 151936), "quick": (16, 211)}
TOKENS = {"cpu": (128, 512, 2048), "gpu": (1024, 4096, 16384), "quick": (8, 24)}
VOCABULARIES = {"cpu": (8192, 32000, 131072), "gpu": (32000, 65536, 262144), "quick": (53, 101)}
FIXED = {"cpu": (256, 32000), "gpu": (4096, 32000), "quick": (8, 101)}
CHECKED_ROWS = 64
TRL = "trl"

IN_PLACE = variant("in place")
PLAIN = "log_softmax"  # rounds its result to the dtype of the logits
PLAIN_FLOAT = "float().log_softmax"  # as precise as ours


def cases(suite: str) -> Iterator[Case]:
    """Forward, and forward with backward, in two dtypes; scaling over tokens and vocabulary."""
    for dtype in (torch.bfloat16, torch.float32):
        yield _case(suite, *SHAPES[suite], dtype, backward=False)
        yield _case(suite, *SHAPES[suite], dtype, backward=True)
    tokens, vocabulary = FIXED[suite]
    for n in TOKENS[suite]:
        yield _case(suite, n, vocabulary, torch.bfloat16, backward=True, axis="tokens")
    for v in VOCABULARIES[suite]:
        yield _case(suite, tokens, v, torch.bfloat16, backward=True, axis="vocabulary")


def _case(
    suite: str, n: int, v: int, dtype: torch.dtype, *, backward: bool, axis: str | None = None
) -> Case:
    return Case(
        op="token_logprobs",
        metric="forward+backward" if backward else "forward",
        dtype=str(dtype).removeprefix("torch."),
        shape=(n, v),
        axis=axis,
        memory=axis is None,
        order=8 if axis else 3 if dtype == torch.bfloat16 else 9,
        # Logits read once; with backward read again, and the gradient written.
        bytes=n * v * dtype.itemsize * (3 if backward else 1),
        build=partial(_contest, suite, n, v, dtype, backward, axis is None),
    )


def plain(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs (N,) of labels (N,) under logits (N, V), in the dtype of the logits."""
    return logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


def plain_float(logits: Tensor, labels: Tensor) -> Tensor:
    """The same, in float32."""
    return plain(logits.float(), labels)


class _Producer(torch.autograd.Function):
    """Stands for the operation that made the logits: it keeps the gradient that it is handed."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, found: dict[str, Tensor]) -> Tensor:
        ctx.found = found
        return logits.detach()  # no view of a leaf, which nothing may overwrite

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, None]:
        ctx.found["gradient"] = gradients[0]
        return None, None


def _trl() -> Callable[[Tensor, Tensor], Tensor]:
    """TRL's fused log-probs and entropies, whose entropies are dropped; or `Unavailable`."""
    kernels = peers.load("trl.kernels", "trl")
    if not hasattr(kernels, "selective_log_softmax_and_entropy"):
        raise Unavailable("this trl offers no selective_log_softmax_and_entropy here")
    return lambda logits, labels: kernels.selective_log_softmax_and_entropy(logits, labels)[0]


def _contest(suite: str, n: int, v: int, dtype: torch.dtype, backward: bool, full: bool) -> Contest:
    device = SUITES[suite]
    torch.manual_seed(0)
    logits = torch.empty(n, v, dtype=dtype, device=device).normal_(std=3).requires_grad_(backward)
    labels = torch.randint(v, (n,), device=device)
    upstream = torch.randn(n, device=device)
    rows = torch.linspace(0, n - 1, min(n, CHECKED_ROWS), device=device).long()

    def work(function: Callable[[Tensor, Tensor], Tensor], *, spends: bool = False) -> Work:
        """`spends`: the function overwrites its logits, so that it gets its own, made anew."""
        found: dict[str, Tensor] = {}
        given = logits.detach().clone().requires_grad_() if spends else logits

        def before() -> None:
            found.clear()
            if spends:
                with torch.no_grad():
                    given.copy_(logits)

        def run() -> None:
            logps = function(_Producer.apply(given, found) if backward else given, labels)
            found["log-probs"] = logps.detach()
            if backward:
                logps.backward(upstream.to(logps.dtype))

        def outputs() -> Mapping[str, Tensor]:
            return {name: value[rows] for name, value in found.items()}

        return Work(run, before, outputs)

    def on_rows(dtype: torch.dtype) -> Mapping[str, Tensor]:
        leaf = logits.detach()[rows].to(dtype).requires_grad_()
        function = plain if dtype == torch.float64 else plain_float
        logps = function(leaf, labels[rows])
        result = {"log-probs": logps.detach()}
        if backward:
            logps.backward(upstream[rows].to(logps.dtype))
            assert leaf.grad is not None
            result["gradient"] = leaf.grad
        return result

    implementations: dict[str, Callable[[], Work]] = {OURS: lambda: work(dr.token_logprobs)}
    ours: tuple[str, ...] = (OURS, IN_PLACE)
    named = {variant(backend): backend for backend in other_backends("token_logprobs", suite)}
    for name, backend in named.items() if full else ():
        ours += (name,)
        implementations[name] = on_backend(backend, implementations[OURS])
    if backward and full:
        in_place = partial(dr.token_logprobs, inplace_backward=True)
        implementations[IN_PLACE] = lambda: work(in_place, spends=True)
    implementations[PLAIN] = lambda: work(plain)
    baseline: tuple[str, ...] = (PLAIN,)
    if dtype != torch.float32:
        implementations[PLAIN_FLOAT] = lambda: work(plain_float)
        baseline = (PLAIN, PLAIN_FLOAT)
    if full and device == "cuda":
        implementations[TRL] = lambda: work(_trl())
    if full:
        implementations["torch.compile"] = lambda: work(peers.compiled(plain_float, suite))
    gate = Gate(lambda: on_rows(torch.float64), lambda: on_rows(dtype))
    return Contest(
        implementations,
        ours=ours,
        baseline=baseline,
        gates=dict.fromkeys(implementations, gate),
        named=named,
    )
