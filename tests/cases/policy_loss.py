"""`policy_loss` and its backward: the clipped surrogate, its options, sizes and traps."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from drrlhf import ops
from tests.cases import INFINITY, NAN, Case, Made, numbers, pairwise, said

OP = ops.policy_loss


def batch(
    count: int = 6,
    length: int = 9,
    packed: bool = False,
    mask: str = "lengths",
    old: bool = True,
    ref: bool = True,
    entropy: bool = True,
    by_sequence: bool = False,
    clips: tuple[float, float] = (0.2, 0.28),
    kl_beta: float = 0.05,
    correct_kl: bool = True,
    dtype: torch.dtype = torch.float32,
    integer: torch.dtype = torch.int64,
    strided: bool = False,
    bad: tuple[str, float] | None = None,
    distance: float = 0.3,
    silent: bool = False,
) -> Made:
    """Sequences of 0 to `length` tokens; padding and masked tokens hold NaN. bad: a tensor and what
    its fifth token holds. silent: half of the sequences have no upstream gradient."""
    g = torch.Generator().manual_seed(2)
    sizes = torch.randint(0, length + 1, (count,), generator=g)
    if count:
        sizes[0] = length
    inside = torch.arange(length) < sizes.unsqueeze(1)
    counted = inside.clone()
    counted[:, 3::5] = False
    if mask == "none":
        counted = inside if packed else torch.ones_like(inside)
    shape = (count, length)
    logps = -numbers(*shape).abs()
    found = {
        "logps": logps,
        "old": logps + distance * numbers(*shape, seed=1) if old else None,
        "ref": logps + distance * numbers(*shape, seed=3) if ref else None,
        "entropy": numbers(*shape, seed=4).abs() if entropy else None,
    }
    for name, x in found.items():
        if x is not None:
            found[name] = torch.where(counted, x, NAN).to(dtype)
    if bad is not None:
        name, value = bad
        found[name][0, 4] = value
        counted[0, 4] = True
    marks = None if mask == "none" else counted
    cu = F.pad(sizes.cumsum(0), (1, 0)).to(integer) if packed else None
    if packed:
        found = {k: None if x is None else x[inside] for k, x in found.items()}
        marks = None if marks is None else marks[inside]
    if mask == "numbers":
        marks = marks.to(integer)
    if strided:
        wide = lambda x: None if x is None else torch.stack([x, x], -1)[..., 0]  # noqa: E731
        found = {k: wide(x) for k, x in found.items()}
        marks = wide(marks)
    advantages = numbers(count, seed=6).to(dtype)

    def run(x):
        return OP(
            x,
            found["old"],
            found["ref"],
            found["entropy"],
            marks,
            cu,
            advantages,
            by_sequence,
            *clips,
            kl_beta,
            correct_kl,
        )

    upstream = numbers(count, seed=8).double()
    if silent:
        upstream[::2] = 0.0
    return Made(run, [found["logps"]], {"losses": upstream})


CASES = [
    *(
        Case(
            said(x),
            "every option, every optional tensor, padded and packed",
            lambda x=x: batch(**x),
        )
        for x in pairwise(
            packed=[False, True],
            mask=["lengths", "none", "numbers"],
            old=[True, False],
            ref=[True, False],
            entropy=[True, False],
            by_sequence=[False, True],
            clips=[(0.2, 0.28), (0.0, 0.1), (1.0, 3.0)],
            kl_beta=[0.05, 0.0, 1.0],
            correct_kl=[True, False],
            dtype=[torch.float32, torch.float64, torch.bfloat16, torch.float16],
            integer=[torch.int64, torch.int32],
        )
    ),
    *(
        Case(
            f"{n} sequences of up to {length} tokens, packed {packed}, by sequence {whole}",
            "either side of vectors, warps and blocks of tokens, and several blocks",
            lambda n=n, k=length, p=packed, w=whole: batch(n, k, p, by_sequence=w),
        )
        for n, length, packed, whole in (
            (1, 1, False, True),
            (2, 15, True, True),
            (2, 16, False, False),
            (3, 17, True, False),
            (2, 127, False, True),
            (3, 128, True, True),
            (2, 129, True, False),
            (2, 1023, True, True),
            (2, 1024, False, False),
            (3, 1025, True, False),
            (2, 2500, False, True),
            (70, 3, True, False),
        )
    ),
    Case("strided tensors", "a stride in every one, the mask too", lambda: batch(strided=True)),
    Case(
        "strided and packed", "as above, of one dimension", lambda: batch(strided=True, packed=True)
    ),
    Case(
        "far from the old policy",
        "the clip takes the gradient of nearly every token away",
        lambda: batch(distance=5.0),
    ),
    *(
        Case(
            f"a log-ratio of {sign * 60} to {which}, by sequence {whole}",
            "beyond 40 it is clamped without a gradient, and counted; below -40 it is not",
            lambda s=sign, k=which, w=whole: batch(bad=(k, s * 60.0), by_sequence=w),
        )
        for sign in (1, -1)
        for which in ("old", "ref")
        for whole in (False, True)
    ),
    *(
        Case(
            f"{value} in {name}", "seen where it counts", lambda k=name, v=value: batch(bad=(k, v))
        )
        for name, value in (("logps", NAN), ("old", NAN), ("ref", NAN), ("logps", -INFINITY))
    ),
    *(
        Case(
            f"{value} in ref without kl_beta, by sequence {whole}, corrected {correct}",
            "not 0 times infinity: the divergence is in the table alone",
            lambda v=value, w=whole, c=correct: batch(
                bad=("ref", v), by_sequence=w, correct_kl=c, kl_beta=0.0
            ),
        )
        for value, whole, correct in (
            (-INFINITY, False, True),
            (-INFINITY, True, True),
            (-INFINITY, False, False),
            (INFINITY, True, False),
            (NAN, True, True),
        )
    ),
    *(
        Case(
            f"-inf in {name}, not corrected, by sequence {whole}",
            "a divergence or a ratio that is infinite and does not multiply",
            lambda k=name, w=whole: batch(bad=(k, -INFINITY), by_sequence=w, correct_kl=False),
        )
        for name in ("old", "ref")
        for whole in (False, True)
    ),
    Case(
        "sequences without upstream gradient",
        "exactly 0, whatever their slopes",
        lambda: batch(silent=True),
    ),
    Case("no sequences", "an empty grid", lambda: batch(count=0)),
    Case("no sequences, packed", "no boundary but the first", lambda: batch(count=0, packed=True)),
    Case("sequences of no tokens", "losses of 0", lambda: batch(length=0)),
]
