"""`row_worst_case`: a table of losses in; the worst case of every row and its weights out."""

from __future__ import annotations

from typing import Any

from drrlhf.conventions import statistics_dtype
from drrlhf.ops.library import Op, first_order_only

# The sets of which a row of a few entries has a closed form.
KINDS = ("erm", "tv", "kl_temperature", "cvar")


def _fake(table, mask, nominal, kind, parameter):
    dtype = statistics_dtype(table)
    return table.new_empty(table.shape[:1], dtype=dtype), table.new_empty(table.shape, dtype=dtype)


def _setup(ctx: Any, arguments: Any, results: Any) -> None:
    ctx.save_for_backward(results.weights, arguments.table)
    ctx.mark_non_differentiable(results.weights)
    ctx.dtype = arguments.table.dtype
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grads: Any) -> tuple:
    # Danskin: d value / d losses = q, and q itself is a constant.
    q, table = ctx.saved_tensors
    values = grads.values
    gradients = row_worst_case.gradients(
        table=None if values is None else (values.unsqueeze(1) * q).to(ctx.dtype)
    )
    return first_order_only("worst_view", gradients, table)


row_worst_case = Op(
    "row_worst_case",
    "(Tensor table, Tensor? mask, Tensor? nominal, str kind, float parameter) -> "
    "(Tensor values, Tensor weights)",
    _fake,
)
row_worst_case.differentiate(_backward, _setup)
