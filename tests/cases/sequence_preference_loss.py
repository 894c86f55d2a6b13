"""`sequence_preference_loss`: token log-probs to DPO's worst case in one op."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from three_ways import INTERPRETED

import drrlhf as dr
from drrlhf import ops
from drrlhf.conventions import statistics_dtype
from tests.cases import NAN, Case, Made, numbers, pairwise, said
from tests.cases.robust_risk import SETS, uneven

OP = ops.sequence_preference_loss


def stacked(
    pairs: int = 6,
    length: int = 7,
    packed: bool = False,
    ambiguity: str = "tv:0.2",
    weights: str = "uniform",
    dtype: torch.dtype = torch.float32,
    integer: torch.dtype = torch.int64,
    beta: float = 0.1,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    update: bool = True,
    size: float = 1.0,
) -> Made:
    """Chosen sequences, then rejected ones, of lengths down to 0; what is behind them is NaN."""
    g = torch.Generator().manual_seed(2)
    sizes = torch.randint(0, length + 1, (2 * pairs,), generator=g)
    if pairs:
        sizes[0] = length
    inside = torch.arange(length) < sizes.unsqueeze(1)
    labels = torch.where(inside, 3, ignore_index)
    labels[::3, :1] = ignore_index
    logps = torch.where(labels == ignore_index, NAN, -size * numbers(*labels.shape).abs()).to(dtype)
    cu = F.pad(sizes.cumsum(0), (1, 0)).to(integer) if packed else None
    if packed:
        logps, labels = logps[inside], labels[inside]
    encoded = dr.parse_ambiguity(ambiguity).encode(update)
    grouped = encoded.kind == "group"
    nominal = {"uniform": None, "uneven": uneven(pairs), "masked": uneven(pairs, True)}[weights]
    state = torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64) if grouped else None
    groups = (torch.arange(pairs) % 3).to(integer) if grouped else None
    refs = (-4 * size * numbers(2 * pairs, seed=3).abs()).to(statistics_dtype(logps))
    labels = labels.to(integer)

    def run(x):
        return OP(
            x,
            labels,
            cu,
            refs,
            nominal,
            groups,
            state,
            ignore_index,
            beta,
            label_smoothing,
            *encoded,
        )

    return Made(run, [logps], {"value": torch.tensor(-2.5)})


def _nan(masked: bool) -> Made:
    """A log-prob that counts is NaN, in a pair of weight 0 or 1."""
    labels = torch.ones(6, 4, dtype=torch.long)
    logps, refs = -numbers(6, 4).abs(), -4 * numbers(6, seed=3).abs()
    logps[1, 2] = NAN
    nominal = torch.tensor([1.0, 0.0, 2.0], dtype=torch.float64) if masked else None
    encoded = dr.parse_ambiguity("tv:0.2").encode()

    def run(x):
        found = OP(x, labels, None, refs, nominal, None, None, -100, 0.1, 0.0, *encoded)
        return found if masked else found._replace(dual=None)  # there is none

    return Made(run, [logps], {"value": torch.tensor(1.0)})


CASES = [
    *(
        Case(
            said(x),
            "every set, weights of every kind, padded and packed, every option",
            lambda x=x: stacked(**x),
        )
        for x in pairwise(
            ambiguity=SETS,
            weights=["uniform", "uneven", "masked"],
            packed=[False, True],
            dtype=[torch.float32, torch.float64, torch.bfloat16],
            integer=[torch.int64, torch.int32],
            label_smoothing=[0.0, 0.2],
            beta=[0.1, 1.5],
        )
    ),
    *(
        Case(
            f"{n} pairs of up to {length} tokens, packed {packed}",
            "either side of blocks of pairs and of tokens",
            lambda n=n, k=length, p=packed: stacked(n, k, p, "kl:0.2", "masked"),
            INTERPRETED and n in (127, 128, 129),  # blocks of the CPU
        )
        for n, length, packed in (
            (1, 1, True),
            (2, 1025, False),
            (3, 1025, True),
            (31, 15, True),
            (32, 16, False),
            (33, 17, True),
            (127, 1, False),
            (128, 1, True),
            (129, 1, False),
            (513, 1, False),
        )
    ),
    Case("no pairs", "nothing to divide by", lambda: stacked(0, 3)),
    Case("no pairs, packed", "no boundary but the first", lambda: stacked(0, 3, True)),
    Case(
        "sequences of no tokens",
        "sums of 0, and margins of the references alone",
        lambda: stacked(4, 0, False),
    ),
    Case(
        "margins of thousands",
        "the sigmoid at both of its ends",
        lambda: stacked(size=3e3, beta=1.0),
    ),
    Case("another ignore_index", "0 is a label elsewhere", lambda: stacked(ignore_index=0)),
    Case(
        "no update",
        "the weights of groups are used and not stepped",
        lambda: stacked(ambiguity="group:3", update=False),
    ),
    Case(
        "NaN in a pair without weight",
        "costs nothing, and its tokens get no gradient",
        lambda: _nan(True),
    ),
    Case("NaN in a pair that counts", "is seen", lambda: _nan(False)),
]
