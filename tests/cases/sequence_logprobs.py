"""`sequence_logprobs` and its backward: lengths, layouts, integers."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import drrlhf as dr
from tests.cases import INFINITY, NAN, Case, Made, numbers, pairwise, said

# Sequences of no tokens, of one, and either side of 16, 64, 128 and a block of 1024.
LENGTHS = [3, 0, 15, 1, 16, 0, 17, 63, 64, 65, 127, 128, 129]
LONG = [1023, 1024, 1025, 2, 3000]


class Found(NamedTuple):
    sums: Tensor


def sequences(
    lengths: list[int],
    packed: bool = True,
    mean: bool = False,
    dtype: torch.dtype = torch.float32,
    integer: torch.dtype = torch.int64,
    ignore_index: int = -100,
    behind: float = NAN,
) -> Made:
    """Ragged sequences; every seventh token is ignored and, as padding, holds `behind`."""
    sizes = torch.tensor(lengths, dtype=torch.long)
    inside = torch.arange(max(lengths)) < sizes.unsqueeze(1)
    labels = torch.where(inside, 1, ignore_index)
    labels[:, 2::7] = ignore_index
    logps = torch.where(labels == ignore_index, behind, numbers(*labels.shape)).to(dtype)
    cu = F.pad(sizes.cumsum(0), (1, 0)).to(integer) if packed else None
    if packed:
        logps, labels = logps[inside], labels[inside]
    return made(logps, labels.to(integer), cu, mean, ignore_index)


def made(logps, labels, cu_seqlens=None, mean=False, ignore_index=-100, upstream=None) -> Made:
    def run(x):
        return Found(
            dr.sequence_logprobs(
                x,
                labels,
                cu_seqlens=cu_seqlens,
                reduction="mean" if mean else "sum",
                ignore_index=ignore_index,
            )
        )

    count = labels.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    return Made(run, [logps], {"sums": numbers(count, seed=5) if upstream is None else upstream})


def strided() -> Made:
    logps, labels = numbers(6, 10), torch.ones(6, 10, dtype=torch.long)
    labels[:, ::3] = -100
    return made(torch.stack([logps, logps], -1)[..., 0], labels.T.contiguous().T)


def strided_boundaries() -> Made:
    cu = torch.tensor([0, 4, 4, 9])
    return made(numbers(9), torch.ones(9, dtype=torch.long), torch.stack([cu, cu + 1], 1)[:, 0])


def with_bad(bad: float, packed: bool) -> Made:
    logps, labels = numbers(12), torch.ones(12, dtype=torch.long)
    logps[4] = bad
    if packed:
        return made(logps, labels, torch.tensor([0, 3, 7, 12]))
    return made(logps.view(3, 4), labels.view(3, 4))


CASES = [
    *(
        Case(
            said(x),
            "sum or mean, padded or packed, in any dtype of numbers and of integers",
            lambda x=x: sequences(LENGTHS, **x),
        )
        for x in pairwise(
            packed=[True, False],
            mean=[False, True],
            dtype=[torch.float32, torch.float64, torch.bfloat16, torch.float16],
            integer=[torch.int64, torch.int32, torch.int16],
            ignore_index=[-100, 0],
        )
    ),
    *(
        Case(
            f"long sequences, packed {packed}",
            "either side of whole blocks, and several of them",
            lambda p=packed: sequences(LONG, p, mean=p),
        )
        for packed in (True, False)
    ),
    Case("one sequence", "the smallest grid", lambda: sequences([5])),
    Case("sequences of one token", "many small ones", lambda: sequences([1] * 40)),
    Case(
        "no sequences",
        "an empty grid",
        lambda: made(numbers(0), torch.zeros(0, dtype=torch.long), torch.tensor([0])),
    ),
    *(
        Case(
            f"shape {shape}",
            "nothing to add up",
            lambda s=shape: made(numbers(*s), torch.zeros(s, dtype=torch.long), mean=True),
        )
        for shape in ((0, 3), (3, 0))
    ),
    Case("strided log-probs and labels", "a stride in both", strided),
    Case("strided boundaries", "and in the boundaries", strided_boundaries),
    Case(
        "one upstream gradient for all",
        "a stride of 0 in the backward",
        lambda: made(
            numbers(6, 10), torch.ones(6, 10, dtype=torch.long), upstream=torch.ones(1).expand(6)
        ),
    ),
    *(
        Case(
            f"{bad} that counts, packed {packed}",
            "seen in its sequence and in no other",
            lambda b=bad, p=packed: with_bad(b, p),
        )
        for bad, packed in ((NAN, True), (NAN, False), (-INFINITY, True))
    ),
]
