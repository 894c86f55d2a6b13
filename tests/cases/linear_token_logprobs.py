"""`linear_token_logprobs` and its backward: what is kept, how much room, which gradients."""

from __future__ import annotations

from typing import Any

import torch
from three_ways import BACKENDS, INTERPRETED
from torch import Tensor

from drrlhf import ops
from drrlhf.conventions import Keep
from tests.cases import INFINITY, LAYOUTS, NAN, Case, Made, integers, numbers, pairwise, said

OP = ops.linear_token_logprobs
MIB = 2**20
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7, "logit_scale": 0.5},
    {"logit_scale": -1.3},
    {"softcap": 6.0},
]
SLAB = {"triton": Keep.RATIOS, "cuda": Keep.ROWS}.get(BACKENDS[0], Keep.COLUMNS)
KEEPS = [Keep.NOTHING, Keep.HIDDEN, SLAB]
NEEDS = ["hidden, weight, bias", "hidden", "weight", "bias", "weight, bias", "hidden, bias"]
# Tokens by width by vocabulary, either side of columns of 16, blocks of 64 tokens, tiles of 64 and
# blocks of 128 rows of the head; of 1024 scored tokens and 1024 widened rows. Odd widths have no
# blocked product, multiples of 16 have one for the gradients too.
SHAPES = [
    (1, 2, 65),
    (15, 3, 63),
    (16, 16, 64),
    (17, 32, 65),
    (31, 18, 127),
    (63, 33, 128),
    (64, 48, 129),
    (65, 16, 193),
    (127, 16, 257),
    (129, 64, 257),
    (33, 8, 1023),
    (16, 80, 1024),
    (47, 16, 1025),
    (1023, 4, 19),
    (1025, 16, 33),
]
if INTERPRETED:  # whose tiles have 64 rows and 128 columns, and whose every token is a program
    SHAPES = [(min(n, 130), d, min(v, 260)) for n, d, v in SHAPES]


def head(
    tokens: int = 37,
    width: int = 16,
    vocabulary: int = 193,
    dtype: torch.dtype = torch.float32,
    keep: Keep = Keep.NOTHING,
    workspace: int = 48 * MIB,
    outputs: int = 0,
    bias: bool = True,
    needs: str = NEEDS[0],
    size: float = 2.0,
    labels: Tensor | None = None,
    active: int = -1,
    of_hidden: str = "dense",
    of_weight: str = "dense",
    integer: torch.dtype = torch.int64,
    change: Any = None,
    without: tuple[str, ...] = (),
    **options: Any,
) -> Made:
    """A head and tokens, some ignored, some without upstream gradient. active: how many have one;
    change: of (hidden, weight, bias, labels, grad), in place; without: results not to look at."""
    hidden, weight = numbers(tokens, width), size * numbers(vocabulary, width, seed=1) / width**0.5
    if labels is None:
        labels = integers(0, vocabulary, tokens)
        if active < 0 and tokens > 4:
            labels[1::6] = -100
    grad = numbers(tokens, seed=5)
    if active >= 0:
        grad[torch.randperm(tokens, generator=torch.Generator().manual_seed(3))[active:]] = 0.0
    elif tokens > 4:
        grad[2::5] = 0.0
    b = numbers(vocabulary, seed=2)
    hidden, weight, b = (x.to(dtype) for x in (hidden, weight, b))
    if change is not None:
        change(hidden, weight, b, labels, grad)
    labels = labels.to(integer)
    leaves = {"hidden": hidden, "weight": weight, "bias": b if bias else None}
    given = [k for k in leaves if k in needs and leaves[k] is not None]

    def run(*x):
        all_of = leaves | dict(zip(given, x))
        h = LAYOUTS.get(of_hidden, lambda x: x)(all_of["hidden"])
        w = LAYOUTS.get(of_weight, lambda x: x)(all_of["weight"])
        found = OP(
            h,
            w,
            all_of["bias"],
            labels,
            -100,
            options.get("temperature", 1.0),
            options.get("softcap"),
            options.get("logit_scale", 1.0),
            outputs,
            keep,
            workspace,
        )
        # `kept` has each backend's own form, and two numbers that are one in `lse` their own parts.
        found = found._replace(kept=None, lse=found.lse.double() + found.lse_tail, lse_tail=None)
        return found._replace(**dict.fromkeys(without))

    upstream = {"logp": grad} | ({"entropy": grad.flip(0)} if outputs & 1 else {})
    return Made(run, [leaves[k] for k in given], upstream)


def nan_in_silent(hidden, weight, bias, labels, grad):
    hidden[(labels == -100) | (grad == 0)] = NAN


def nan_in_one(hidden, weight, bias, labels, grad):
    hidden[3, 5], labels[3], grad[3] = NAN, 1, 1.0


def large_bias(hidden, weight, bias, labels, grad):
    bias += 200.0


def all_of_one_sign(hidden, weight, bias, labels, grad):
    """Of sums that cancel nothing but rounding would be left."""
    grad.abs_().add_(0.5)


def labels_at_the_top(hidden, weight, bias, labels, grad):
    """Every other one; the others are improbable."""
    logits = hidden.double() @ weight.double().T + bias.double()
    labels[::2] = logits.argmax(-1)[::2]


SPECIAL = {
    "-inf": [-INFINITY],
    "+inf": [INFINITY],
    "NaN": [NAN],
    "both infinities": [INFINITY, -INFINITY],
    "finfo.min twice": [torch.finfo(torch.float32).min] * 2,
    "1e30": [1e30],
}


def special(name: str, vocabulary: int, keep: Keep, **options: Any) -> Made:
    """A bias brings them in; it alone is trained, for 0 times infinity is NaN elsewhere."""

    def change(hidden, weight, bias, labels, grad):
        hidden.zero_(), weight.zero_(), grad.fill_(1.0)
        for k, value in enumerate(SPECIAL[name]):
            bias[(vocabulary // 2 + k) % vocabulary] = value

    labels = torch.tensor([0, vocabulary // 2, vocabulary - 1])
    # The log-sum-exp of infinities may be told apart from NaN or not.
    return head(
        3,
        2,
        vocabulary,
        keep=keep,
        needs="bias",
        labels=labels,
        change=change,
        without=("lse",),
        **options,
    )


MANY = 400 if INTERPRETED else 1500
# Room for 16 tokens' logits, and for all: passes of few tokens, and one.
ROOMS = [48 * MIB, 0 if INTERPRETED else 16 * 4 * 1100]
CASES = [
    *(
        Case(
            f"{n} by {d} by {v}, {said({'dtype': DTYPES[i % 3]})}, {keep.name}",
            "either side of blocks of tokens, of columns and of rows of the head",
            lambda n=n, d=d, v=v, i=i, k=keep: head(
                n, d, v, DTYPES[i % 3], k, ROOMS[(i + k) % 2], outputs=i % 2, bias=i % 4 > 0
            ),
            INTERPRETED and keep != KEEPS[i % 3],
        )
        for i, (n, d, v) in enumerate(SHAPES)
        for keep in KEEPS
    ),
    *(
        Case(
            f"{said(x)}",
            "every form of keeping, every option, dtype, output and gradient wanted",
            lambda x=x: head(**{k: v for k, v in x.items() if k != "options"}, **x["options"]),
        )
        for x in pairwise(
            keep=KEEPS,
            dtype=DTYPES,
            options=OPTIONS,
            outputs=[15, 0, 1],
            needs=NEEDS,
            bias=[True, False],
            workspace=ROOMS,
            integer=[torch.int64, torch.int32],
        )
        if x["bias"] or x["needs"] != "bias"
    ),
    *(
        Case(
            said(x),
            "hidden and head as they may lie in memory",
            # Of equal rows every gradient but the bias's is 0 and nothing but rounding.
            lambda x=x: head(
                19, 16, 70, needs="bias" if "one row" in x["of_weight"] else NEEDS[0], **x
            ),
        )
        for x in pairwise(
            of_hidden=["dense", *LAYOUTS],
            of_weight=["dense", *LAYOUTS],
            keep=KEEPS,
            dtype=[torch.float32, torch.bfloat16],
        )
    ),
    *(
        Case(
            f"{active} of 77 tokens active, {keep.name}",
            "any number of tokens takes part, also none: as if the others were not there",
            lambda a=active, k=keep, i=i: head(77, 16, 193, DTYPES[i % 2], k, active=a),
            INTERPRETED and keep != KEEPS[i % 3],
        )
        for i, active in enumerate((0, 1, 2, 16, 63, 77))
        for keep in KEEPS
    ),
    *(
        Case(
            f"width {width}, {active} active, {keep.name}",
            "nothing behind the tokens is read, where a product reads whole registers",
            lambda w=width, a=active, k=keep: head(79, w, 65, torch.bfloat16, k, MIB, active=a),
        )
        for width, active in ((8, 13), (24, 34), (100, 58), (24, 77))
        for keep in KEEPS
    ),
    *(
        Case(
            f"a large bias on {n} tokens, {keep.name}",
            "its exponential overflows where no token normalises it",
            lambda n=n, k=keep: head(n, 16, 70, keep=k, change=large_bias),
        )
        for n in (1, 5, 17)
        for keep in KEEPS
    ),
    *(
        Case(
            f"{said({'': dtype})[1:]}, logits of {size}, {keep.name}",
            "flat rows, confident ones, and labels too improbable for a ratio",
            lambda s=size, d=dtype, k=keep: head(
                33, 32, 131, d, k, size=s, change=labels_at_the_top
            ),
        )
        for size in (0.1, 30.0)
        for dtype in (torch.float32, torch.bfloat16)
        for keep in KEEPS
    ),
    *(
        Case(
            f"every label ignored, {keep.name}",
            "gradients of exactly 0",
            lambda k=keep: head(20, keep=k, labels=torch.full((20,), -100)),
        )
        for keep in KEEPS
    ),
    *(
        Case(
            f"NaN in tokens nobody asks about, {keep.name}",
            "0 times NaN in a product is NaN",
            lambda k=keep: head(20, 16, 70, keep=k, outputs=0, change=nan_in_silent),
        )
        for keep in KEEPS
    ),
    *(
        Case(
            f"NaN in one token, {keep.name}",
            "stays there",
            lambda k=keep: head(20, 16, 70, keep=k, needs="hidden", change=nan_in_one),
        )
        for keep in KEEPS
    ),
    *(
        Case(
            f"{name} among {x['vocabulary']}, {x['options']}, {x['keep'].name}",
            "what plain PyTorch says; NaN is never hidden",
            lambda k=name, x=x: special(k, x["vocabulary"], x["keep"], **x["options"]),
            INTERPRETED and x["keep"] != KEEPS[i % 3],
        )
        for i, name in enumerate(SPECIAL)
        for x in pairwise(keep=KEEPS, vocabulary=[70, 200, 2], options=[{}, {"softcap": 2.0}])
    ),
    *(
        Case(
            f"no tokens, {keep.name}",
            "an empty product; gradients of zeros",
            lambda k=keep: head(0, keep=k),
        )
        for keep in KEEPS
    ),
    *(
        Case(
            f"{MANY} tokens of one label, {keep.name}",
            "sums over tokens in float32: in bfloat16 they would stop growing at 256",
            lambda k=keep: head(
                MANY,
                16,
                3,
                torch.bfloat16,
                k,
                labels=torch.zeros(MANY).long(),
                change=all_of_one_sign,
            ),
        )
        for keep in KEEPS
    ),
]
