"""Every backend equals plain PyTorch, outputs and gradients, on the tables of `tests.cases`."""

from __future__ import annotations

import importlib
from collections import Counter
from pathlib import Path

import pytest
import torch
from three_ways import BACKENDS, SLOW

from drrlhf import backends
from drrlhf.conventions import statistics_dtype
from tests import cases

TABLES = {
    path.stem: importlib.import_module(f"tests.cases.{path.stem}").CASES
    for path in sorted(Path(cases.__path__[0]).glob("[a-z]*.py"))
}
ROWS = [
    pytest.param(
        op,
        case,
        id=f"{op}: {case.name}",
        marks=pytest.mark.thorough if case.thorough else (),
    )
    for op, rows in TABLES.items()
    for case in rows
]


# What two right answers of one dtype may lie apart: relative, and by the largest of them, for the
# rounding of a sum follows its largest term, and numbers that cancel have nothing else left.
#
# float64: the searches for a dual variable end where no better is to be found, and meet there.
# float32: sums of up to some thousand terms in another order, 2^-24 each; an exponential of numbers
# of some tens keeps as many units fewer of its last place as its argument has.
# bfloat16, float16: what is float32 until then is rounded once by each of the two, and where a
# gradient is a product of numbers that were rounded before, once more each.
RELATIVE = {
    torch.float64: 1e-9,
    torch.float32: 1e-5,
    torch.bfloat16: 2 * 2.0**-8,
    torch.float16: 2 * 2.0**-11,
}
# Of a row that is sure these are differences of numbers of the size of 1. Elsewhere what is below
# the least is 0, as 1 - tanh^2 at infinity.
LEAST = {"entropy": 1e-6, "log_sum_sq_probs": 1e-6}


# Defects that the table has found and that are open; strict where they were seen.
OPEN: dict[tuple[str, str, str], str] = {}  # (backend, op, beginning of a case) -> what is wrong


def assert_equal(ours: torch.Tensor, plain: torch.Tensor, made: cases.Made, name: str) -> None:
    """Equal to what their dtype, and that of the arithmetic for these leaves, allows."""
    assert ours.dtype == plain.dtype and ours.shape == plain.shape, name
    if ours.dtype == torch.bool:
        assert torch.equal(ours, plain), name
        return
    arithmetic = statistics_dtype(made.leaves[0])
    relative = max(RELATIVE[ours.dtype], RELATIVE[arithmetic])
    least = LEAST.get(name, 1e-16)
    size = plain[plain.isfinite()].abs().max().item() if plain.isfinite().any() else 0.0
    torch.testing.assert_close(
        ours,
        plain,
        rtol=relative,
        atol=relative * size + least,
        equal_nan=True,
        msg=lambda text: f"{name}: {text}",
    )


def answers(made: cases.Made) -> dict[str, torch.Tensor]:
    """Results and gradients by name."""
    leaves = [x.detach().clone().requires_grad_() for x in made.leaves]
    found = {k: x for k, x in made.run(*leaves)._asdict().items() if x is not None}
    upstream = {k: g.to(found[k].dtype).expand(found[k].shape) for k, g in made.upstream.items()}
    torch.autograd.backward([found[k] for k in upstream], list(upstream.values()))
    gradients = {f"gradient of leaf {i}": x.grad for i, x in enumerate(leaves)}
    return {k: x.detach() for k, x in found.items()} | gradients


@pytest.mark.parametrize("op, case", ROWS)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
def test_backend_equals_reference(request, backend, op, case):
    if op not in backends.SERVED[backend]:
        pytest.skip(f"{backend} leaves {op} to others")
    for (name, where, row), reason in OPEN.items():
        if (name, where) == (backend, op) and case.name.startswith(row):
            request.applymarker(pytest.mark.xfail(reason=reason, strict=SLOW))
    made = case.make()
    with backends.use(backend):
        ours = answers(made)
    with backends.use("reference"):
        plain = answers(made)
    assert ours.keys() == plain.keys()
    for name in plain:
        assert_equal(ours[name], plain[name], made, name)


def test_every_op_has_a_table_and_every_row_a_name_and_a_reason():
    assert set(TABLES) == {op for op in backends.OPS if "_backward" not in op}
    for op, rows in TABLES.items():
        assert max(Counter(case.name for case in rows).values()) == 1, op
        assert all(case.why for case in rows), op


def test_pairs_of_options_all_meet():
    options = {"a": [1, 2, 3], "b": [4, 5], "c": [6, 7, 8, 9]}
    rows = list(cases.pairwise(**options))
    for x, y in (("a", "b"), ("a", "c"), ("b", "c")):
        met = {(row[x], row[y]) for row in rows}
        assert met == {(p, q) for p in options[x] for q in options[y]}
    assert len(rows) < 3 * 2 * 4
