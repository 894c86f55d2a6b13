"""`sequence_logprobs`: padded and packed agree."""

from __future__ import annotations

import math

import pytest
import torch

import drrlhf as dr


@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_packed_equals_padded(reduction):
    g = torch.Generator().manual_seed(4)
    lengths = [3, 0, 5, 1]
    padded = torch.full((4, 5), math.nan)
    labels = torch.full((4, 5), -100)
    for row, n in enumerate(lengths):
        padded[row, :n] = torch.randn(n, generator=g)
        labels[row, :n] = 1
    labels[2, 1] = -100
    keep = torch.arange(5) < torch.tensor(lengths).unsqueeze(1)
    cu = torch.tensor([0, 3, 3, 8, 9])
    one = dr.sequence_logprobs(padded, labels, reduction=reduction)
    two = dr.sequence_logprobs(padded[keep], labels[keep], cu_seqlens=cu, reduction=reduction)
    torch.testing.assert_close(one, two)
    assert one[1].item() == 0.0
    expected = padded[2, [0, 2, 3, 4]]
    torch.testing.assert_close(one[2], getattr(expected, reduction)())


def test_gradients_reach_counted_tokens_alone():
    logps = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[1, 1, -100], [-100, -100, -100]])
    dr.sequence_logprobs(logps, labels, reduction="mean").sum().backward()
    assert logps.grad.tolist() == [[0.5, 0.5, 0.0], [0.0, 0.0, 0.0]]
    cu = torch.tensor([0, 2, 6], dtype=torch.int32)
    assert torch.autograd.gradcheck(
        lambda x: dr.sequence_logprobs(x.view(-1), labels.view(-1), cu_seqlens=cu), logps
    )


X, Y = torch.randn(6), torch.ones(6, dtype=torch.long)
BAD = [
    (lambda: dr.sequence_logprobs(X, Y), "packed .T,. needs cu_seqlens"),
    (lambda: dr.sequence_logprobs(X, Y[:3], cu_seqlens=torch.tensor([0, 6])), "labels: expected"),
    (lambda: dr.sequence_logprobs(X, Y, cu_seqlens=torch.tensor([1, 6])), "from 0 to 6"),
    (lambda: dr.sequence_logprobs(X, Y, cu_seqlens=torch.tensor([0, 5])), "from 0 to 6"),
    (lambda: dr.sequence_logprobs(X, Y, cu_seqlens=torch.tensor([0, 4, 2, 6])), "not decreasing"),
    (lambda: dr.sequence_logprobs(X, Y, cu_seqlens=torch.tensor([0.0, 6])), "integer dtype"),
    (lambda: dr.sequence_logprobs(X.view(2, 3), Y.view(2, 3), reduction="avg"), "'sum' or 'mean'"),
]


@pytest.mark.parametrize("call,message", BAD)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_compiles():
    torch._dynamo.reset()
    cu = torch.tensor([0, 2, 6])
    step = lambda x: dr.sequence_logprobs(x, Y, cu_seqlens=cu)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(X), step(X))
