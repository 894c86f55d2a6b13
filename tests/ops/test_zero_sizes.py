"""Sizes of 0: no tokens, no sequences, no pairs, no entries of the vocabulary, on every backend.

An integer that divides by one of them ends the process, so these run what kernels are given, too.
"""

from __future__ import annotations

import pytest
import torch
from three_ways import BACKENDS

import drrlhf as dr
from drrlhf import backends
from drrlhf.conventions import Keep

SETS = [
    "erm",
    "kl:0.1",
    "kl:temperature=1",
    "tv:0.1",
    "chi2:0.5",
    "chi2:penalty=1",
    "cvar:0.3",
    "cvar:alpha=0.3,temperature=1",
    "group:num_groups=2,step_size=0.1",
    "tv:0.1,trim=0.1",
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with backends.use(request.param):
        yield request.param


def leaf(*shape):
    return torch.zeros(shape, requires_grad=True)


def longs(*values):
    return torch.tensor(values, dtype=torch.long)


def hold_nothing(loss, *leaves):
    """A loss of exactly 0, connected to leaves whose gradients are all 0."""
    assert loss.shape == () and loss.item() == 0
    loss.backward()
    for x in leaves:
        assert x.grad.shape == x.shape and (x.grad == 0).all()


@pytest.mark.parametrize("ambiguity", SETS)
def test_no_pairs(backend, ambiguity):
    groups = longs() if ambiguity.startswith("group") else None
    options = {"ambiguity": ambiguity, "groups": groups}
    a, b, c, d = (leaf(0) for _ in range(4))
    for nominal in (None, torch.zeros(0)):
        risk = dr.robust_risk(a, nominal=nominal, **options)
        assert risk.weights.shape == (0,)
        hold_nothing(risk.value, a)
        out = dr.preference_loss(a, b, c, d, nominal=nominal, **options)
        assert out.weights.shape == out.losses.shape == out.chosen_rewards.shape == (0,)
        hold_nothing(out.loss, a, b)
        out = dr.reward_loss(a, b, nominal=nominal, **options)
        hold_nothing(out.loss, a, b)


def test_a_group_set_of_no_groups_is_refused():
    with pytest.raises(ValueError, match="num_groups"):
        dr.Group(num_groups=0, step_size=0.1)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "sigmoid_norm", "simpo"])
def test_sequences_without_tokens_have_length_0(backend, loss_type):
    """What is divided by a length is then divided by 1: finite, and no gradient from no token."""
    references = torch.zeros(4) if loss_type != "simpo" else None
    hidden, weight = leaf(4, 3, 16), leaf(5, 16)
    labels = torch.full((4, 3), -100)
    out = dr.linear_preference_loss(hidden, weight, labels, references, loss_type=loss_type)
    assert out.loss.isfinite() and (out.logps == 0).all()
    out.loss.backward()
    assert (hidden.grad == 0).all() and (weight.grad == 0).all()


@pytest.mark.pairwise
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("sequences", [0, 4])
def test_no_tokens(backend, packed, sequences):
    """No sequences at all, and sequences of no tokens; padded (S, 0), or packed (0,)."""
    shape = (0,) if packed else (sequences, 0)
    cu_seqlens = torch.zeros(sequences + 1, dtype=torch.long) if packed else None
    labels = torch.zeros(shape, dtype=torch.long)
    for reduction in ("sum", "mean"):
        logps = leaf(*shape)
        sums = dr.sequence_logprobs(logps, labels, cu_seqlens=cu_seqlens, reduction=reduction)
        assert sums.tolist() == [0.0] * sequences
        hold_nothing(sums.sum(), logps)
    hidden, weight = leaf(*shape, 16), leaf(5, 16)
    out = dr.linear_preference_loss(
        hidden, weight, labels, torch.zeros(sequences), cu_seqlens=cu_seqlens, ambiguity="tv:0.1"
    )
    assert out.weights.shape == (sequences // 2,) and out.logps.tolist() == [0.0] * sequences
    torch.testing.assert_close(
        out.loss.item(), 0.6931472 if sequences else 0.0
    )  # log 2: a margin 0
    out.loss.backward()
    assert (weight.grad == 0).all() and hidden.grad.shape == hidden.shape


@pytest.mark.pairwise
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)])
@pytest.mark.parametrize("outputs", [(), ("entropy", "is_top1")])
def test_no_rows_of_logits(backend, shape, outputs):
    labels = torch.zeros(shape, dtype=torch.long)
    logits, hidden, weight, bias = leaf(*shape, 7), leaf(*shape, 16), leaf(7, 16), leaf(7)
    for found, leaves in (
        (dr.token_logprobs(logits, labels, outputs=outputs), [logits]),
        (
            dr.linear_token_logprobs(hidden, weight, labels, bias=bias, outputs=outputs),
            [hidden, weight, bias],
        ),
        (
            dr.linear_token_logprobs(hidden, weight, labels, memory_budget=0, outputs=outputs),
            [hidden, weight],
        ),
    ):
        logps = found.logps if outputs else found
        assert logps.shape == shape
        hold_nothing(logps.sum(), *leaves)


@pytest.mark.pairwise
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("size", [(0, 16), (7, 0), (0, 0)])
def test_a_head_of_no_entries_or_no_width_is_refused(backend, size, tokens):
    labels = torch.zeros(tokens, dtype=torch.long)
    with pytest.raises(ValueError, match=r"weight: expected .* V >= 1"):
        dr.linear_token_logprobs(torch.zeros(tokens, size[1]), torch.zeros(size), labels)
    if not size[0]:
        with pytest.raises(ValueError, match=r"logits: expected shape \(\.\.\., V\) with V >= 1"):
            dr.token_logprobs(torch.zeros(tokens, 0), labels)


@pytest.mark.skipif(
    not {"cpp", "cuda"} & set(BACKENDS), reason="only compiled code ends a process that way"
)
@pytest.mark.parametrize("keep", [Keep.NOTHING, Keep.HIDDEN])
def test_kernels_refuse_a_head_of_no_entries(keep):
    """Below the checks of the public functions."""
    library = "drrlhf_cpp" if "cpp" in BACKENDS else backends.LIBRARIES["cuda"]
    ops = getattr(torch.ops, library)
    labels, none = torch.full((3,), -100), torch.zeros(3)
    for hidden, weight in (((3, 16), (0, 16)), ((3, 0), (7, 0)), ((3, 0), (0, 0))):
        head = (torch.zeros(hidden), torch.zeros(weight), None, labels)
        options = (-100, 1.0, None, 1.0)
        with pytest.raises((ValueError, RuntimeError), match=r"expected"):
            ops.linear_token_logprobs(*head, *options, 0, keep, 1024)
        with pytest.raises((ValueError, RuntimeError), match=r"expected"):
            ops.linear_token_logprobs_backward(
                *head,
                none,
                None,
                none,
                none,
                none,
                none,
                torch.zeros(hidden),
                *options,
                keep,
                1024,
                True,
                True,
                False,
            )


@pytest.mark.pairwise
@pytest.mark.skipif("cuda" in BACKENDS, reason="the backend has no such kernel")
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("packed", [False, True])
def test_no_completions(backend, loss_type, packed):
    logps = leaf(0) if packed else leaf(0, 4)
    out = dr.policy_loss(
        logps,
        None,
        torch.zeros(0),
        torch.zeros(0),
        longs(),
        loss_type=loss_type,
        cu_seqlens=longs(0) if packed else None,
        max_completion_length=8,
        ambiguity="tv:0.1",
    )
    assert out.weights.shape == (0,)
    hold_nothing(out.loss, logps)


@pytest.mark.pairwise
@pytest.mark.skipif("cuda" in BACKENDS, reason="the backend has no such kernel")
@pytest.mark.parametrize("loss_type", ["grpo", "bnpo", "dr_grpo", "dapo"])
@pytest.mark.parametrize("packed", [False, True])
def test_completions_of_no_tokens(backend, loss_type, packed):
    """An error as for any prompt without tokens; 0 where weights were found elsewhere."""
    logps = leaf(0) if packed else leaf(4, 0)
    arguments = (logps, None, torch.ones(4), torch.ones(4), longs(0, 0, 1, 1))
    options = {"loss_type": loss_type, "max_completion_length": 8}
    options["cu_seqlens"] = longs(0, 0, 0, 0, 0) if packed else None
    if torch.get_default_device().type == "cpu":
        with pytest.raises(ValueError, match="expected a counted token for every prompt"):
            dr.policy_loss(*arguments, **options)
    out = dr.policy_loss(*arguments, sequence_weights=torch.ones(4), **options)
    hold_nothing(out.loss, logps)
