"""What the output head keeps between forward and backward, and the bytes that it may hold.

The same answer for every caller of the op, so that a memory budget means one thing. All choices are
by size alone: the host does not know how many tokens count.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from drrlhf import backends
from drrlhf.checks import constant_in_graphs
from drrlhf.conventions import Keep


class MemoryBudget(NamedTuple):
    """Bytes that the head may hold at a time, and how many of them for temporary logits."""

    budget: int
    workspace: int


# Unless the caller says otherwise. Products gain nothing from more rows than these hold; a GPU
# needs more of them to be busy.
ON_CPU = MemoryBudget(256 * 2**20, 48 * 2**20)
ON_GPU = MemoryBudget(576 * 2**20, 512 * 2**20)

# Triton's products. Fewer rows than these multiply the whole head for little: from there on the
# logits are cheaper made twice, by all tokens and some columns at a time.
LEAST_ROWS = 512
# Gradients of hidden from fewer columns at a time spend much on adding up: 8 bytes an entry, on an
# H100 933 / columns of their product.
LEAST_COLUMNS = 4096


class Plan(NamedTuple):
    """What the forward keeps, and the bytes for logits."""

    keep: Keep
    workspace: int


def plan(
    tokens: int, head: Tensor, need_hidden: bool, need_head: bool, memory_budget: int | None
) -> Plan:
    """For a head (V, D) of which these gradients are wanted, and a budget in bytes."""
    default = ON_CPU if head.device.type == "cpu" else ON_GPU
    budget = default.budget if memory_budget is None else memory_budget
    workspace = min(budget, default.workspace)
    backend = _serving(head.device.type)
    if backend == "reference":  # computes everything again
        return Plan(Keep.NOTHING, workspace)
    if need_head and tokens * head.shape[0] * head.element_size() + workspace <= budget:
        forms = {"triton": Keep.RATIOS, "cuda": Keep.ROWS}
        return Plan(forms.get(backend, Keep.COLUMNS), workspace)
    if not need_hidden:
        return Plan(Keep.NOTHING, workspace)
    if backend == "triton" and _twice_is_cheaper(tokens, head, need_head, workspace):
        return Plan(Keep.NOTHING, workspace)
    return Plan(Keep.HIDDEN, workspace)


def _twice_is_cheaper(tokens: int, head: Tensor, need_head: bool, workspace: int) -> bool:
    """Whether to make the logits again in the backward, though the head's gradient needs none.

    With a trained head they are made again anyway, and the gradient of hidden then comes from the
    same columns, of the tokens alone that have a part in the loss.
    """
    rows = workspace // (head.shape[0] * head.element_size())
    if rows < min(tokens, LEAST_ROWS):
        return True
    return need_head and workspace // (tokens * head.element_size()) >= LEAST_COLUMNS


@constant_in_graphs
def _serving(device: str) -> str:
    return backends.serving("linear_token_logprobs", device)
