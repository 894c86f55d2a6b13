"""`policy_loss` over prompts that lie on several ranks: one process with all of them."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import in_turn, on_ranks

import drrlhf as dr

pytestmark = pytest.mark.xdist_group("ranks")  # forked from one server

EXACT = {"rtol": 1e-10, "atol": 1e-12}
SETS = ["erm", "tv:0.3", "cvar:0.4", "kl:0.2", "group:2,step_size=0.5"]
COUNTS = ((2, 3, 1), (4, 2), ())  # completions of each rank's prompts
LENGTH = 5


def whole():
    """All ranks' completions in rank order; prompts are numbered over all of them."""
    draw = torch.Generator().manual_seed(0)
    counts = [k for rank in COUNTS for k in rank]
    n, m = sum(counts), len(counts)

    def normal(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    logps = -torch.rand(n, LENGTH, generator=draw, dtype=torch.float64)
    nominal = torch.rand(m, generator=draw, dtype=torch.float64) + 0.2
    nominal[3] = 0  # masked: absent
    mask = torch.rand(n, LENGTH, generator=draw) < 0.8
    mask[:, 0] = True
    return {
        "logps": logps,
        "old_logps": logps + 0.2 * normal(n, LENGTH),
        "ref_logps": logps + 0.2 * normal(n, LENGTH),
        "advantages": normal(n),
        "rewards": normal(n),
        "prompt_ids": torch.arange(m).repeat_interleave(torch.tensor(counts)),
        "mask": mask,
        "nominal": nominal,
        "groups": torch.arange(m) % 2,
    }


def part_of(rank):
    """What one rank has of it, its prompts numbered from 0."""
    first = sum(len(counts) for counts in COUNTS[:rank])
    prompts = slice(first, first + len(COUNTS[rank]))
    begin = sum(sum(counts) for counts in COUNTS[:rank])
    rows = slice(begin, begin + sum(COUNTS[rank]))
    found = {}
    for name, tensor in whole().items():
        found[name] = tensor[prompts if name in ("nominal", "groups") else rows]
    found["prompt_ids"] = found["prompt_ids"] - first
    return found


def solved(batch, ambiguity, loss_type, process_group=None):
    state = dr.GroupState(2)
    if ambiguity.startswith("group"):
        batch = batch | {"group_state": state}
    logps = batch["logps"].clone().requires_grad_()
    out = dr.policy_loss(
        **(batch | {"logps": logps}),
        loss_type=loss_type,
        max_completion_length=7,
        kl_beta=0.1,
        ambiguity=ambiguity,
        process_group=process_group,
    )
    out.loss.backward()
    return {
        "loss": out.loss.detach(),
        "weights": out.weights,
        "risk": out.risk,
        "grad": logps.grad,
        "state": state.weights,
    }


def everything(rank):
    return {
        (ambiguity, loss_type): solved(part_of(rank), ambiguity, loss_type, dist.group.WORLD)
        for ambiguity in SETS
        for loss_type in ("grpo", "dr_grpo", "dapo")
    }


def one_refuses(rank):
    batch = part_of(rank)
    if rank == 1:
        batch["rewards"][-1] = torch.nan
    return solved(batch, "tv:0.1", "grpo", dist.group.WORLD)


@pytest.fixture(scope="module")
def found():
    """What each rank gave to both, in one start of the processes."""
    return on_ranks(len(COUNTS), in_turn, [(everything,), (one_refuses,)])


@pytest.mark.parametrize("ambiguity", SETS)
@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo"])
def test_ranks_equal_one_process(found, ambiguity, loss_type):
    expected = solved(whole(), ambiguity, loss_type)
    parts = [rank[0][ambiguity, loss_type] for rank in found]
    for part in parts:
        for name in ("loss", "risk", "state"):
            torch.testing.assert_close(part[name], expected[name], **EXACT)
    for name in ("weights", "grad"):
        together = torch.cat([part[name] for part in parts])
        # DDP and FSDP average over ranks.
        scale = len(parts) if name == "grad" else 1
        torch.testing.assert_close(together / scale, expected[name], **EXACT)


def test_a_bad_reward_on_one_rank_ends_all(found):
    waiting, refusing, _ = (rank[1] for rank in found)
    assert (
        refusing[0] == "ValueError" and "rewards: expected finite numbers, got nan" in refusing[1]
    )
    assert waiting[0] == "RuntimeError" and "rank 1: ValueError: rewards" in waiting[1]
