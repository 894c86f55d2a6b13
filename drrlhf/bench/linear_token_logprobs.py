"""`linear_token_logprobs` in units of one bare product hidden @ weight.T of the same dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch

import drrlhf as dr
from drrlhf.bench import heads, memory
from drrlhf.bench.heads import COMPILED, GEMM, PLAIN, TRL, Problem
from drrlhf.bench.registry import OURS, SUITES, Case, Contest, Unavailable, Work

# Tokens, vocabulary, depth.
SHAPES = {"cpu": (1024, 32000, 1024), "gpu": (8192, 128256, 4096), "quick": (40, 211, 32)}
# Of a model of 1B parameters: twice the tokens, half the width.
MORE_SHAPES: dict[str, tuple[tuple[int, int, int], ...]] = {
    "cpu": (),
    "gpu": ((16384, 128256, 2048),),
    "quick": ((24, 131, 16),),
}
MEMORY_SHAPES = {"cpu": (4096, 128256, 1024), "gpu": (8192, 128256, 4096), "quick": (64, 509, 32)}
TOKENS = {"cpu": (128, 256, 512, 2048), "gpu": (1024, 4096, 16384), "quick": (20,)}
VOCABULARIES = {"cpu": (8192, 65536, 128256), "gpu": (32000, 65536, 262144), "quick": (101,)}
PAIRS = 10
ZERO_PAIRS = (0, 1, 3, 4, 6, 8, 9)  # 70 %
PLAIN_PEAK = "plain (12 N V bytes)"

# Products of the size of hidden @ weight.T that the work cannot do without.
_LEAST = {"forward": 1, "frozen": 2, "trained": 3}


def cases(suite: str) -> Iterator[Case]:
    """Scoring, both heads, with and without what TRL's metrics ask for, sparse gradients, peak
    memory, scaling over tokens and vocabulary."""
    n, v, d = SHAPES[suite]
    for dtype in (torch.bfloat16, torch.float32):
        yield _case(suite, (n, v, d), dtype, "frozen", backward=False)
        yield _case(suite, (n, v, d), dtype, "frozen")
        yield _case(suite, (n, v, d), dtype, "trained")
        yield _sparse(suite, (n, v, d), dtype)
    for shape in ((n, v, d), *MORE_SHAPES[suite]):
        if shape != (n, v, d):
            yield _case(suite, shape, torch.bfloat16, "frozen", backward=False)
            yield _case(suite, shape, torch.bfloat16, "frozen")
            yield _case(suite, shape, torch.bfloat16, "trained")
        for backward in (False, True):
            yield _case(suite, shape, torch.bfloat16, "frozen", backward=backward, extras=True)
    yield _memory(suite, MEMORY_SHAPES[suite])
    for tokens in (*TOKENS[suite], n):
        yield _case(suite, (tokens, v, d), torch.bfloat16, "frozen", axis="tokens")
    for vocabulary in (*VOCABULARIES[suite], v):
        yield _case(suite, (n, vocabulary, d), torch.bfloat16, "frozen", axis="vocabulary")


def _case(
    suite: str,
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    head: str,
    *,
    backward: bool = True,
    axis: str | None = None,
    extras: bool = False,
) -> Case:
    n, v, d = shape
    metric = "forward+backward" if backward else "forward"

    def build() -> Contest:
        problem = Problem(*shape, dtype, SUITES[suite], head == "trained", backward, extras)
        everyone, named = heads.everyone(problem, suite)
        if axis is not None:
            everyone = {name: everyone[name] for name in (OURS, GEMM, PLAIN)}
        elif extras or shape in MORE_SHAPES[suite]:
            del everyone[COMPILED]  # compiling takes longer than the rest, once is enough
        gate = problem.gate()
        return Contest(
            everyone,
            ours=tuple(name for name in everyone if name.startswith(OURS)),
            baseline=(GEMM,),
            gates={name: gate for name in everyone if name != GEMM},
            named={name: backend for name, backend in named.items() if name in everyone},
        )

    return Case(
        op="linear_token_logprobs",
        metric=f"{metric}, with entropy, mean logit, top-1" if extras else metric,
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        head=head,
        axis=axis,
        memory=axis is None,
        order=8 if axis else 9 if dtype == torch.float32 else 2 if extras else 1,
        flops=2 * n * v * d * _LEAST[head if backward else "forward"],
        build=build,
    )


def _sparse(suite: str, shape: tuple[int, int, int], dtype: torch.dtype) -> Case:
    """The backward when most pairs have weight exactly 0, against the dense one."""
    dense, sparse = f"{OURS} (dense)", OURS

    def build() -> Contest:
        problem = Problem(*shape, dtype, SUITES[suite], trained=True)
        # Sequences [chosen..., rejected...] of nearly equal lengths.
        sequence = torch.arange(problem.n, device=problem.device) * 2 * PAIRS // problem.n
        zero = torch.isin(sequence % PAIRS, torch.tensor(ZERO_PAIRS, device=problem.device))
        upstream = problem.upstream.masked_fill(zero, 0.0)
        return Contest(
            {
                sparse: lambda: problem.backward_work(dr.linear_token_logprobs, upstream),
                dense: lambda: problem.backward_work(dr.linear_token_logprobs, problem.upstream),
            },
            ours=(sparse, dense),
            baseline=(dense,),
            gates={sparse: problem.gate(upstream, values=False), dense: problem.gate(values=False)},
        )

    return Case(
        op="linear_token_logprobs",
        metric="backward, 70 % of the pairs at 0",
        dtype=str(dtype).removeprefix("torch."),
        shape=shape,
        head="trained",
        order=5 if dtype == torch.bfloat16 else 9,
        build=build,
    )


def _memory(suite: str, shape: tuple[int, int, int]) -> Case:
    """Peak extra memory of forward and backward; plain PyTorch's by formula, and measured if it
    fits.

    Plain keeps the float32 log-softmax, and its backward holds two more such tensors.
    """
    n, v, _ = shape
    plain_bytes = 12 * n * v

    def build() -> Contest:
        problem = Problem(*shape, torch.bfloat16, SUITES[suite], trained=False)
        everyone, _ = heads.everyone(problem, suite)
        gate = problem.gate()

        def plain() -> Work:
            free = memory.available_bytes(problem.device)
            if free is not None and 1.25 * plain_bytes > free:
                needed, left = plain_bytes // memory.MIB, free // memory.MIB
                raise Unavailable(f"needs about {needed} MiB, and {left} MiB are free")
            return everyone[PLAIN]()

        return Contest(
            {OURS: everyone[OURS], PLAIN: plain, TRL: everyone[TRL]},
            gates={OURS: gate},
            formula=(PLAIN_PEAK, plain_bytes / memory.MIB),
        )

    return Case(
        op="linear_token_logprobs",
        metric="peak memory, forward+backward",
        dtype="bfloat16",
        shape=shape,
        head="frozen",
        unit="MiB",
        order=6,
        build=build,
    )
