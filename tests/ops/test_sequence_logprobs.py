"""`sequence_logprobs`: padded and packed agree; boundaries are checked."""

from __future__ import annotations

import math

import pytest
import torch
from three_ways import BACKENDS, assert_no_worse, assert_refused

import drrlhf as dr
from drrlhf import backends


@pytest.fixture(params=BACKENDS)
def backend(request):
    with backends.use(request.param):
        yield request.param


needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ extension is not built")


def problem(dtype=torch.float32):
    """Padded log-probs, NaN where nothing counts; labels; the tokens that lie in a sequence; and
    the boundaries of these when packed. One sequence is empty, another is ignored altogether."""
    g = torch.Generator().manual_seed(4)
    lengths = torch.tensor([3, 0, 5, 1, 0])
    inside = torch.arange(5) < lengths.unsqueeze(1)
    logps = torch.where(inside, torch.randn(5, 5, generator=g), math.nan).to(dtype)
    labels = torch.where(inside, 1, -100)
    labels[2, 1] = labels[3, 0] = -100
    logps[2, 1] = math.nan
    return logps, labels, inside, torch.tensor([0, 3, 3, 8, 9, 9])


@pytest.mark.mathematics
@pytest.mark.pairwise
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_packed_equals_padded(backend, reduction, dtype):
    logps, labels, inside, cu = problem(dtype)
    one = dr.sequence_logprobs(logps, labels, reduction=reduction)
    two = dr.sequence_logprobs(logps[inside], labels[inside], cu_seqlens=cu, reduction=reduction)
    torch.testing.assert_close(one, two)
    assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert one[[1, 3, 4]].tolist() == [0, 0, 0]
    expected = logps[2, [0, 2, 3, 4]].to(one.dtype)
    torch.testing.assert_close(one[2], getattr(expected, reduction)())


@pytest.mark.mathematics
@pytest.mark.pairwise
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradients_reach_counted_tokens_alone(backend, reduction, packed):
    logps, labels, inside, cu = problem()
    if packed:
        logps, labels = logps[inside], labels[inside]
    logps.requires_grad_()
    seq = dr.sequence_logprobs(
        logps, labels, cu_seqlens=cu if packed else None, reduction=reduction
    )
    upstream = torch.tensor([2.0, 3.0, -4.0, 5.0, 6.0])
    seq.backward(upstream)
    share = upstream / (torch.tensor([3, 1, 4, 1, 1]) if reduction == "mean" else 1)
    expected = torch.where(problem()[1] != -100, share.unsqueeze(1), 0)
    assert torch.equal(logps.grad, expected[inside] if packed else expected)


@pytest.mark.mathematics
@pytest.mark.parametrize("reduction", ["sum", "mean"])
@pytest.mark.parametrize("packed", [False, True])
def test_gradcheck_twice(backend, reduction, packed):
    """The double backward too: the op is linear."""
    _, labels, inside, cu = problem()
    labels = labels[inside] if packed else labels
    options = {"cu_seqlens": cu if packed else None, "reduction": reduction}
    logps = torch.randn(labels.shape, dtype=torch.float64, requires_grad=True)
    op = lambda x: dr.sequence_logprobs(x, labels, **options)  # noqa: E731
    assert torch.autograd.gradcheck(op, logps)
    assert torch.autograd.gradgradcheck(lambda x: op(x) ** 2, logps)
    seq = op(logps)
    (first,) = torch.autograd.grad(seq.square().sum(), logps, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), logps)
    counted, count = (labels != -100), (labels != -100).double()
    if not packed:
        n = count.sum(1)
        w = 1 / n.clamp(min=1) if reduction == "mean" else torch.ones_like(n)
        # d/dx of sum over tokens of (2 w s)^2 with s = w sum x
        expected = (8 * w**3 * n * seq.detach()).unsqueeze(1) * counted
        torch.testing.assert_close(second, expected)


@pytest.mark.accuracy
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_no_less_accurate_than_plain_pytorch(backend, reduction):
    g = torch.Generator().manual_seed(5)
    logps = -5 * torch.rand(300, 401, generator=g)
    labels = torch.ones(300, 401, dtype=torch.long)
    ours = dr.sequence_logprobs(logps, labels, reduction=reduction)
    assert_no_worse(ours, getattr(logps, reduction)(1), getattr(logps.double(), reduction)(1))


def test_shapes_without_tokens_or_sequences(backend):
    no_labels = torch.zeros(0, dtype=torch.long)
    for cu, sequences in (([0], 0), ([0, 0], 1), ([0, 0, 0], 2)):
        none = torch.zeros(0, requires_grad=True)
        for reduction in ("sum", "mean"):
            seq = dr.sequence_logprobs(
                none, no_labels, cu_seqlens=torch.tensor(cu), reduction=reduction
            )
            assert seq.tolist() == [0.0] * sequences
            seq.sum().backward()
            assert none.grad.shape == (0,)
    for shape in ((0, 3), (3, 0), (0, 0)):
        none = torch.zeros(shape, requires_grad=True)
        seq = dr.sequence_logprobs(none, torch.zeros(shape, dtype=torch.long), reduction="mean")
        seq.sum().backward()
        assert seq.tolist() == [0.0] * shape[0] and none.grad.shape == shape


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.int16])
def test_layouts_and_integers_of_any_width(backend, dtype):
    logps, labels, inside, cu = problem()
    expected = dr.sequence_logprobs(logps, labels)
    wide = torch.stack([logps, logps], -1)[..., 0]
    turned = labels.T.contiguous().T.to(dtype)
    assert torch.equal(dr.sequence_logprobs(wide, turned), expected)
    every_other = torch.stack([cu, cu + 1], 1).to(dtype)[:, 0]
    packed = dr.sequence_logprobs(wide[inside], turned[inside], cu_seqlens=every_other)
    torch.testing.assert_close(packed, expected)
    assert dr.sequence_logprobs(logps, labels, ignore_index=1).isnan().any()
    upstream = torch.ones(1).expand(5)
    wide.requires_grad_()
    (gradient,) = torch.autograd.grad(dr.sequence_logprobs(wide, turned), wide, upstream)
    assert torch.equal(gradient, (labels != -100).float())


@pytest.mark.mathematics
def test_a_nan_that_counts_is_seen(backend):
    logps, labels, inside, cu = problem()
    logps[0, 1] = math.nan
    assert dr.sequence_logprobs(logps, labels).isnan().tolist() == [True] + [False] * 4
    packed = dr.sequence_logprobs(logps[inside], labels[inside], cu_seqlens=cu)
    assert packed.isnan().tolist() == [True] + [False] * 4
    logps[0, 1] = -math.inf
    assert dr.sequence_logprobs(logps, labels)[0] == -math.inf


X, Y = torch.randn(6), torch.ones(6, dtype=torch.long)
BAD_BOUNDARIES = [
    ([1, 6], "from 0 to 6"),
    ([-1, 6], "from 0 to 6"),
    ([0, 5], "from 0 to 6"),
    ([0, 7], "from 0 to 6"),
    ([0, 2**40], "from 0 to 6"),
    ([0, 4, 2, 6], "not decreas"),
    ([0, 9, 6], "not decreas"),
    ([0, -3, 6], "not decreas"),
    ([0], "from 0 to 6"),
    ([], r"expected shape \(S\+1,\)"),
    ([[0, 6]], r"expected shape \(S\+1,\)"),
]
BAD = [
    *(
        (lambda cu=cu: dr.sequence_logprobs(X, Y, cu_seqlens=torch.tensor(cu).long()), message)
        for cu, message in BAD_BOUNDARIES
    ),
    (lambda: dr.sequence_logprobs(X, Y, cu_seqlens=torch.tensor([0.0, 6])), "integer dtype"),
    (lambda: dr.sequence_logprobs(X, Y), "packed .T,. needs cu_seqlens"),
    (
        lambda: dr.sequence_logprobs(X.view(2, 3), Y.view(2, 3), cu_seqlens=torch.tensor([0, 6])),
        "packed",
    ),
    (lambda: dr.sequence_logprobs(X, Y[:3], cu_seqlens=torch.tensor([0, 6])), "labels: expected"),
    (
        lambda: dr.sequence_logprobs(X.long(), Y, cu_seqlens=torch.tensor([0, 6])),
        "logps: expected a fl",
    ),
    (lambda: dr.sequence_logprobs(X.view(2, 3), Y.view(2, 3), reduction="avg"), "'sum' or 'mean'"),
]


@pytest.mark.parametrize("call,message", BAD)
def test_bad_input(backend, call, message):
    assert_refused(call, message, backend)


@needs_cpp
@pytest.mark.parametrize("cu,message", BAD_BOUNDARIES)
def test_the_kernels_check_boundaries_themselves(cu, message):
    """Called past the Python checks they must not read outside of the tokens."""
    cu = torch.tensor(cu).long()
    kernels = torch.ops.drrlhf_cpp
    with pytest.raises(ValueError, match=message):
        kernels.sequence_logprobs(X, Y, cu, -100, False)
    with pytest.raises(ValueError, match=message):
        kernels.sequence_logprobs_backward(torch.zeros(max(0, cu.numel() - 1)), Y, cu, -100, False)


@needs_cpp
def test_the_kernels_check_shapes_themselves():
    kernels, cu = torch.ops.drrlhf_cpp, torch.tensor([0, 2, 6])
    for labels in (Y[:5], torch.ones(7, dtype=torch.long), Y.view(2, 3)):
        with pytest.raises(ValueError, match="expected"):
            kernels.sequence_logprobs(X, labels, cu, -100, False)
    with pytest.raises(ValueError, match="needs cu_seqlens"):
        kernels.sequence_logprobs(X, Y, None, -100, False)
    for grad in (torch.zeros(1), torch.zeros(3), torch.zeros(1, 2)):
        with pytest.raises(ValueError, match=r"grad: expected shape \(2\)"):
            kernels.sequence_logprobs_backward(grad, Y, cu, -100, False)


@pytest.mark.usual
@pytest.mark.pairwise
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("mean", [False, True])
def test_opcheck(backend, packed, mean):
    _, labels, inside, cu = problem()
    labels = (labels[inside] if packed else labels).int()
    cu = cu.int() if packed else None
    arguments = (torch.randn(labels.shape, requires_grad=True), labels, cu, -100, mean)
    torch.library.opcheck(torch.ops.drrlhf.sequence_logprobs.default, arguments)
    arguments = (torch.randn(5, requires_grad=True), labels, cu, -100, mean)
    torch.library.opcheck(torch.ops.drrlhf.sequence_logprobs_backward.default, arguments)


@pytest.mark.usual
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_compiles_without_a_break(backend, reduction):
    torch._dynamo.reset()
    cu, logps = torch.tensor([0, 2, 2, 6]), X.clone().requires_grad_()
    step = lambda x: dr.sequence_logprobs(x, Y, cu_seqlens=cu, reduction=reduction)  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(logps), step(logps))
    upstream = torch.tensor([1.0, 2.0, 3.0])
    ours, eager = (torch.autograd.grad(f(logps), logps, upstream)[0] for f in (compiled, step))
    torch.testing.assert_close(ours, eager)
