"""`token_logprobs` and its backward, into memory of its own or in place."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

import drrlhf as dr
from tests.cases import INFINITY, LAYOUTS, NAN, Case, Made, integers, numbers, pairwise, said

OUTPUTS = ("entropy", "logsumexp", "mean_logit", "is_top1", "log_sum_sq_probs")
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"softcap": 30.0},
    {"softcap": 5.0, "temperature": 2.0},
]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Either side of the vectors of 4, 8 and 16 entries, the unrolled 64, the chunks of 2048 and the
# blocks of 4096.
SIZES = [
    1,
    2,
    3,
    4,
    5,
    7,
    8,
    9,
    15,
    16,
    17,
    31,
    33,
    63,
    64,
    65,
    127,
    128,
    129,
    255,
    257,
    511,
    512,
    513,
    1023,
    1024,
    1025,
    2047,
    2048,
    2049,
    2051,
    4095,
    4096,
    4097,
    4099,
    8197,
]


class Found(NamedTuple):
    logps: Tensor
    entropy: Tensor | None = None
    logsumexp: Tensor | None = None
    mean_logit: Tensor | None = None
    is_top1: Tensor | None = None
    log_sum_sq_probs: Tensor | None = None


def rows(
    vocabulary: int,
    n: int = 13,
    dtype: torch.dtype = torch.float32,
    size: float = 4.0,
    offset: float = 0.0,
    **options: Any,
) -> Made:
    """Rows of logits, some of whose labels are ignored and some of whose gradients are 0."""
    logits = (offset + size * numbers(n, vocabulary)).to(dtype)
    labels = integers(0, vocabulary, n)
    labels[1::7] = -100
    return made(logits, labels, **options)


def made(
    logits: Tensor,
    labels: Tensor,
    outputs: tuple[str, ...] = OUTPUTS,
    layout: str | None = None,
    inplace: bool = False,
    by: tuple[str, ...] = ("logps", "entropy"),
    upstream: Any = None,
    **options: Any,
) -> Made:
    """outputs: what is asked for; by: what is differentiated, of those that are there."""

    def run(x):
        lies = x if layout is None else LAYOUTS[layout](x)
        if inplace:
            lies = lies * 1.0 if layout is None else lies
        found = dr.token_logprobs(
            lies, labels, outputs=outputs, inplace_backward=inplace, **options
        )
        return found if outputs else Found(found)

    grad = numbers(*labels.shape, seed=5)
    if labels.dim():
        grad[2::5] = 0.0
    there = [x for x in by if x == "logps" or x in outputs]
    given = {name: -grad if i else grad for i, name in enumerate(there)}
    return Made(run, [logits], given if upstream is None else upstream)


def rising(n: int, vocabulary: int) -> Tensor:
    return torch.linspace(-60, 60, vocabulary) + numbers(n, vocabulary).abs()


def stepping(n: int, vocabulary: int) -> Tensor:
    return torch.arange(vocabulary).div(37, rounding_mode="floor") + numbers(n, vocabulary).abs()


def confident(n: int, vocabulary: int) -> Tensor:
    logits = numbers(n, vocabulary)
    logits[torch.arange(n), torch.arange(n) % vocabulary] += 25.0
    return logits


HARD = {
    "rising": (rising, "the largest comes last: what was summed must be taken down many times"),
    "falling": (lambda *n: rising(*n).flip(-1), "the first is the largest: the others underflow"),
    "stepping": (stepping, "a larger level now and then, inside of vectors and chunks"),
    "confident": (confident, "1 - p is 0 in float32; the gradient is not"),
    "near 1e4": (lambda *n: 1e4 + numbers(*n), "the log-sum-exp has few digits left: its tail"),
    "near -9e3": (lambda *n: numbers(*n) - 9e3, "the same below 0"),
    "wide": (lambda *n: 60 * numbers(*n), "most of a row underflows"),
    "equal": (lambda *n: torch.zeros(*n) + 1e6, "every entry is the top one; the first counts"),
}


def hard(name: str, vocabulary: int) -> Made:
    logits = HARD[name][0](9, vocabulary)
    labels = integers(0, vocabulary, 9)
    labels[::2] = logits.argmax(-1)[::2]
    return made(logits, labels)


LEAST = torch.finfo(torch.float32).min
SPECIAL = {
    "-inf": [-INFINITY],
    "+inf": [INFINITY],
    "NaN": [NAN],
    "both infinities": [INFINITY, -INFINITY],
    "two +inf": [INFINITY, INFINITY],
    "NaN and -inf": [NAN, -INFINITY],
    "1e30": [1e30],
    "-1e30": [-1e30],
    "finfo.min": [LEAST],
    "finfo.min twice": [LEAST, LEAST],
    "finfo.max": [-LEAST],
}


def special(name: str, vocabulary: int, **options: Any) -> Made:
    """Each label at every place where the special entries may be."""
    ends = sorted({0, vocabulary // 3, vocabulary // 2, vocabulary - 1})
    logits = numbers(len(ends) ** 2, vocabulary)
    for row, place in enumerate(p for p in ends for _ in ends):
        for k, value in enumerate(SPECIAL[name]):
            logits[row, (place + k) % vocabulary] = value
    labels = torch.tensor(ends * len(ends))
    # Of the others plain PyTorch's own numbers depend on the order in which NaN is met.
    return made(logits, labels, outputs=("entropy",), by=("logps",), **options)


def masked_rows(dtype: torch.dtype, level: float) -> Made:
    return made(torch.full((3, 70), level, dtype=dtype), torch.tensor([0, 69, -100]), outputs=())


def ignored_nan() -> Made:
    """Rows of NaN that are ignored, or that nobody asks about."""
    logits, labels = numbers(6, 33), integers(0, 33, 6)
    logits[1], labels[1], logits[4, 3] = NAN, -100, NAN
    grad = torch.tensor([1.0, 2.0, -1.0, 0.5, 0.0, 3.0])
    return made(logits, labels, (), upstream={"logps": grad})


def ties(vocabulary: int) -> Made:
    """The label, another entry before it, another after it, all over vectors and chunks."""
    ends = (0, 1, 4, 15, 16, 63, 64, 2047, 2048, vocabulary - 1)[:: 1 if vocabulary < 100 else 3]
    places = sorted({x for x in ends if x < vocabulary})
    pairs = torch.tensor([(a, b) for a in places for b in places])
    logits = numbers(len(pairs), vocabulary).clamp(max=4)
    logits.scatter_(1, pairs, 5.0)
    return made(logits, pairs[:, 0], ("is_top1",))


CASES = [
    *(
        Case(
            said({"vocabulary": v, "dtype": DTYPES[i % 3]}),
            "either side of vectors, unrolled loops, chunks and blocks, in each dtype by turns",
            lambda v=v, i=i: rows(v, dtype=DTYPES[i % 3], **OPTIONS[i % 4]),
        )
        for i, v in enumerate(SIZES)
    ),
    *(
        Case(
            said(x),
            "every option, dtype, layout, set of outputs and source of gradients",
            lambda x=x: rows(**{k: v for k, v in x.items() if k != "options"}, **x["options"]),
        )
        for x in pairwise(
            vocabulary=[131, 2049],
            options=OPTIONS,
            dtype=DTYPES,
            layout=[None, *LAYOUTS],
            outputs=[OUTPUTS, (), ("entropy",)],
            by=[("logps", "entropy"), ("logps",), ("entropy", "logps")],
        )
    ),
    *(
        Case(
            "in place, " + said(x),
            "the same gradient in the logits' own memory",
            lambda x=x: rows(131, inplace=True, temperature=0.7, **x),
        )
        for x in pairwise(
            layout=[None, *(k for k in LAYOUTS if k != "one row for all")],
            dtype=DTYPES,
            outputs=[("entropy",), ()],
        )
    ),
    *(
        Case(
            f"only {name}",
            "one statistic alone is that beside the others",
            lambda k=name: rows(70, outputs=(k,)),
        )
        for name in OUTPUTS
    ),
    *(
        Case(
            f"softcap {cap} of {size}",
            "small arguments, and large ones: 1 - tanh^2 cancels",
            lambda c=cap, s=size: rows(257, size=s, softcap=c, temperature=0.3),
        )
        for cap, size in ((5.0, 20.0), (0.5, 4.0), (30.0, 0.01))
    ),
    *(
        Case(f"{name} logits, {v} of them", why, lambda k=name, v=v: hard(k, v))
        for name, (_, why) in HARD.items()
        for v in (3, 65, 4500)
    ),
    *(
        Case(
            f"{name} among {x['vocabulary']}, {x['options']}",
            "what plain PyTorch says; above all, NaN is never hidden",
            lambda k=name, x=x: special(k, x["vocabulary"], **x["options"]),
        )
        for name in SPECIAL
        for x in pairwise(vocabulary=[70, 2051, 2, 1], options=[{}, {"softcap": 2.0}])
        if x["vocabulary"] > 2 or x["options"]
    ),
    *(
        Case(
            f"rows of {level} alone, {said({'': dtype})}",
            "a mask over everything",
            lambda d=dtype, x=level: masked_rows(d, x),
        )
        for dtype in DTYPES
        for level in (-INFINITY, torch.finfo(dtype).min)
    ),
    Case("NaN that is ignored or not asked about", "gradients of exactly 0", ignored_nan),
    *(
        Case(
            f"ties among {v}",
            "the first of equals is the top one, as for argmax",
            lambda v=v: ties(v),
        )
        for v in (5, 17, 70, 2100, 4200)
    ),
    *(
        Case(
            f"labels in {said({'': dtype})}",
            "read in the width that they have, and strided",
            lambda d=dtype: made(numbers(2, 3, 11), integers(0, 11, 3, 2).T.to(d), ()),
        )
        for dtype in (torch.int32, torch.int16, torch.int8, torch.uint8)
    ),
    Case(
        "another ignore_index",
        "a label of the vocabulary that does not count",
        lambda: made(numbers(13, 5), integers(0, 5, 13), ignore_index=2),
    ),
    Case(
        "every label ignored",
        "gradients of exactly 0",
        lambda: made(numbers(4, 9), torch.full((4,), -100)),
    ),
    Case(
        "one row",
        "no dimension but the vocabulary",
        lambda: made(numbers(9), torch.tensor(3), (), upstream={"logps": torch.tensor(2.0)}),
    ),
    Case("no rows", "an empty grid", lambda: made(numbers(0, 9), integers(0, 9, 0))),
    Case(
        "one upstream gradient for all",
        "a stride of 0 in the backward",
        lambda: made(
            numbers(6, 9), integers(0, 9, 6), (), upstream={"logps": torch.ones(1).expand(6)}
        ),
    ),
]
