"""A batch on several ranks gives the value, weights and gradients of one process with all of it."""

from __future__ import annotations

import datetime
import os
import time

import pytest
import torch
import torch.distributed as dist
from ranks import in_turn, on_ranks
from torch import nn

import drrlhf as dr

pytestmark = pytest.mark.xdist_group("ranks")  # forked from one server

SETS = [
    "erm",
    "tv:0.3",
    "kl:0.2",
    "kl:temperature=0.5",
    "kl:temperature=-1",
    "chi2:0.5",
    "chi2:penalty=1",
    "cvar:0.3",
    "cvar:0.3,trim=0.1",
    "cvar:0.4,temperature=0.5",
    "group:3,step_size=0.5",
    "kl:temperature=0.5,momentum=0.7",
]
SIZES = {2: (5, 2), 3: (3, 0, 5)}  # uneven, and a rank with no pair at all
PROBLEMS = ("risk", "preference", "reward", "linear")
EXACT = {"rtol": 1e-10, "atol": 1e-10}


class Scorer(nn.Module):
    """Features of the two sides (n, 2, 6) -> two scores (n, 2), or hidden states (n, 2, 6)."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Linear(6, 6, dtype=torch.float64)
        self.second = nn.Linear(6, 1, dtype=torch.float64)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator).double())

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        hidden = self.first(x).tanh()
        scores = self.second(hidden)
        return scores.squeeze(-1), hidden * scores


def batch(n: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 2, 6, generator=generator, dtype=torch.float64)
    nominal = torch.rand(n, generator=generator, dtype=torch.float64) + 0.1
    nominal[1] = 0
    reference = torch.randn(n, 2, generator=generator, dtype=torch.float64)
    reference[1] = torch.nan  # a masked pair may hold anything
    return {
        "x": x,
        "nominal": nominal,
        "groups": torch.arange(n) % 3,
        "reference": reference,
        "labels": torch.randint(0, 9, (n, 2), generator=generator),
        "head": torch.randn(9, 6, generator=generator, dtype=torch.float64),
    }


def risk_of(problem, ambiguity, model, part, states, process_group=None):
    """(value to backpropagate, weights) of one of the losses over a part of the batch."""
    options = {
        "ambiguity": ambiguity,
        "nominal": part["nominal"],
        "process_group": process_group,
        **states,
    }
    if ambiguity.startswith("group"):
        options["groups"] = part["groups"]
    scores, hidden = model(part["x"])
    chosen, rejected = scores.unbind(1)
    if problem == "risk":
        out = dr.robust_risk((chosen - rejected) ** 2, **options)
        return out.value, out.weights
    if problem == "reward":
        out = dr.reward_loss(chosen, rejected, center_coefficient=0.1, **options)
    elif problem == "preference":
        out = dr.preference_loss(chosen, rejected, *part["reference"].unbind(1), **options)
    else:
        stacked = hidden.transpose(0, 1).reshape(-1, 1, 6)
        labels, reference = (part[name].T.reshape(-1) for name in ("labels", "reference"))
        out = dr.linear_preference_loss(
            stacked, part["head"], labels[:, None], reference, beta=0.5, **options
        )
    return out.loss, out.weights


def states_of(ambiguity):
    if ambiguity.startswith("group"):
        return {"group_state": dr.GroupState(3)}
    return {"normaliser_state": dr.NormaliserState()} if "momentum" in ambiguity else {}


def gradients(model):
    full = (
        p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad
        for p in model.parameters()
    )
    return torch.cat([g.flatten() for g in full])


def slice_of(whole, sizes, rank):
    start = sum(sizes[:rank])
    return {
        name: x if name == "head" else x[start : start + sizes[rank]] for name, x in whole.items()
    }


def solve_everything(rank, wrapping):
    """Value, weights, gradient and state of every problem and set, two steps each, on this rank."""
    sizes = SIZES[dist.get_world_size()]
    whole = batch(sum(sizes))
    part, found = slice_of(whole, sizes, rank), {}
    for problem in PROBLEMS:
        for ambiguity in SETS:
            model, states = wrap(Scorer(), wrapping), states_of(ambiguity)
            for step in range(2):
                model.zero_grad()
                value, weights = risk_of(problem, ambiguity, model, part, states, dist.group.WORLD)
                value.backward()
                state = [b for s in states.values() for b in s.buffers()]
                found[problem, ambiguity, step] = (
                    value.detach(),
                    weights,
                    gradients(model),
                    *(b.clone() for b in state),
                )
    return found


def wrap(model, wrapping):
    if wrapping == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    fully_shard(model.first, mesh=mesh)
    return fully_shard(model, mesh=mesh)


@pytest.mark.parametrize(("world", "wrapping"), [(2, "ddp"), (3, "ddp"), (2, "fsdp2")])
def test_equals_one_process(two_ranks, world, wrapping):
    if world == 2:
        found = two_ranks[solve_everything, wrapping]
    else:
        found = on_ranks(world, solve_everything, wrapping)
    assert all(isinstance(f, dict) for f in found), found
    whole = batch(sum(SIZES[world]))
    for problem in PROBLEMS:
        for ambiguity in SETS:
            model, states = Scorer(), states_of(ambiguity)
            for step in range(2):
                model.zero_grad()
                value, weights = risk_of(problem, ambiguity, model, whole, states)
                value.backward()
                state = [b for s in states.values() for b in s.buffers()]
                expected = gradients(model)
                assert expected.isfinite().all() and expected.abs().max() > 1e-3
                for rank, ours in enumerate(f[problem, ambiguity, step] for f in found):
                    label = f"{problem} {ambiguity} rank {rank} step {step}: "
                    for got, want in zip(
                        ours,
                        (
                            value.detach(),
                            slice_of({"q": weights}, SIZES[world], rank)["q"],
                            expected,
                            *state,
                        ),
                        strict=True,
                    ):
                        torch.testing.assert_close(
                            got, want, **EXACT, msg=lambda m, label=label: label + m
                        )


def whole_and_parts(rank):
    """Everything masked, nothing anywhere, a NaN on one rank, and float32 and bfloat16 losses."""
    group, found = dist.group.WORLD, {}
    l = torch.randn(4, requires_grad=True)
    for name, losses, nominal in (
        ("masked", l, torch.zeros(4)),
        ("empty", l[:0], None),
        ("nan", l * torch.tensor(float("nan") if rank == 1 else 1.0), None),
        ("bfloat16", l.bfloat16(), None),
    ):
        l.grad = None
        out = dr.robust_risk(losses, "cvar:0.5", nominal=nominal, process_group=group)
        out.value.backward()
        found[name] = (out.value.detach(), out.weights, l.grad)
    return found


def test_edges(two_ranks):
    found = two_ranks[whole_and_parts,]
    for rank, edge in enumerate(found):
        for name in ("masked", "empty"):
            value, weights, grad = edge[name]
            assert value == 0 and not weights.any() and not grad.any(), (rank, name)
        value, weights, grad = edge["nan"]
        assert not value.isfinite() and weights.isnan().all() and grad.isnan().all(), rank
        value, weights, grad = edge["bfloat16"]
        assert value == found[0]["bfloat16"][0] and weights.dtype == torch.float32
        torch.testing.assert_close(grad, 2 * weights, rtol=1e-2, atol=1e-3)


# ------------------------------------------------------------- ranks that differ, or are gone


def other_set(rank):
    dr.robust_risk(torch.ones(2), f"tv:0.{rank + 1}", process_group=dist.group.WORLD)


def other_dtype(rank):
    losses = torch.ones(2, dtype=(torch.float32, torch.float64)[rank])
    dr.robust_risk(losses, "tv:0.1", process_group=dist.group.WORLD)


def other_state(rank):
    state = dr.GroupState(2)
    if rank:
        state.weights.copy_(torch.tensor([0.25, 0.75]))
    groups = torch.tensor([0, 1])
    dr.robust_risk(
        torch.ones(2), "group:2", groups=groups, group_state=state, process_group=dist.group.WORLD
    )


def nominal_on_one(rank):
    nominal = torch.ones(3) if rank else None
    dr.preference_loss(
        *torch.ones(4, 3), ambiguity="tv:0.1", nominal=nominal, process_group=dist.group.WORLD
    )


def wrong_length(rank):
    nominal = torch.ones(3 + rank)  # rank 1 disagrees with itself about n
    dr.reward_loss(
        *torch.ones(2, 3), ambiguity="tv:0.1", nominal=nominal, process_group=dist.group.WORLD
    )


def not_finite(rank):
    losses = torch.ones(2)
    if rank:
        losses[1] = torch.inf
    dr.robust_risk(losses, "tv:0.1", check_finite=True, process_group=dist.group.WORLD)


# What two ranks are asked, in one start of their processes, which takes seconds.
ASKED = [
    (solve_everything, "ddp"),
    (solve_everything, "fsdp2"),
    (whole_and_parts,),
    (other_set,),
    (other_dtype,),
    (other_state,),
    (nominal_on_one,),
    (wrong_length,),
    (not_finite,),
]


@pytest.fixture(scope="module")
def two_ranks():
    """What each of two ranks gave by what it was asked."""
    ranks = on_ranks(2, in_turn, ASKED)
    return dict(zip(ASKED, zip(*ranks, strict=True), strict=True))


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (other_set, "agree on the ambiguity set, got rank 0 tv:0.1, rank 1 tv:0.2"),
        (other_dtype, "agree on the dtype of the losses, got rank 0 torch.float32"),
        (other_state, r"agree on the group weights"),
        (nominal_on_one, "agree on the nominal weights, got rank 0 none, rank 1 torch.float32"),
        (not_finite, "got inf at index 1 of rank 1"),
    ],
)
def test_ranks_that_disagree_all_stop(two_ranks, function, words):
    for kind, message, _ in two_ranks[function,]:
        assert words in message, (kind, message)


def test_a_rank_that_refuses_stops_the_others_with_its_words(two_ranks):
    (waiting, quoted, _), (refusing, own, _) = two_ranks[wrong_length,]
    assert refusing == "ValueError" and own.startswith("nominal: expected shape (3,)")
    assert waiting == "RuntimeError" and "rank 1: ValueError: nominal: expected" in quoted


def one_dies(rank, answered):
    group = dist.new_group(timeout=datetime.timedelta(seconds=60))
    if rank == 0:
        open(f"{answered}.connected", "w").close()
        return waited(group, answered)
    there(f"{answered}.connected")  # one that dies while they connect is not what is meant
    os._exit(9)


def one_hangs(rank, answered):
    group = dist.new_group(timeout=datetime.timedelta(seconds=1))
    if rank == 0:
        return waited(group, answered)
    there(answered)
    return None


def there(path):
    """Wait for a file, a minute at most."""
    end = time.monotonic() + 60
    while not os.path.exists(path) and time.monotonic() < end:
        time.sleep(0.05)


def waited(group, answered):
    """How long rank 0 waits for rank 1, which does not come, and what it is told."""
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="a rank died") as caught:
        dr.robust_risk(torch.ones(2), "tv:0.1", process_group=group)
    seconds = time.monotonic() - start
    open(answered, "w").close()
    return seconds, str(caught.value)


@pytest.mark.parametrize("function", [one_dies, one_hangs])
def test_a_rank_that_is_gone_ends_the_others_in_time(function, tmp_path):
    """At once where it died; within the group's timeout, which gloo may wait twice, where not."""
    seconds, message = on_ranks(2, function, str(tmp_path / "answered"))[0]
    assert seconds < 20 and "rank 0 of 2" in message
