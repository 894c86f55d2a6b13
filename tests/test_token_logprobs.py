"""`token_logprobs`: three-way tolerance, saturation, masks, shapes, bad input."""

from __future__ import annotations

import math

import pytest
import torch

import drrlhf as dr


def plain(logits, labels, ignore_index=-100, temperature=1.0, softcap=None):
    """What one would write in PyTorch."""
    z = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    index = labels.clamp(min=0).long().unsqueeze(-1)
    logp = (z / temperature).log_softmax(-1).gather(-1, index).squeeze(-1)
    return torch.where(labels == ignore_index, 0, logp)


def rms(x, y):
    return (x.double() - y.double()).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 1), (63, 7), (65, 257), (2, 33, 1009)])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7}, {"softcap": 5.0, "temperature": 2.0}]
)
def test_no_less_accurate_than_plain_pytorch(dtype, shape, options):
    g = torch.Generator().manual_seed(1)
    logits = (4 * torch.randn(shape, generator=g)).to(dtype)
    labels = torch.randint(0, shape[-1], shape[:-1], generator=g)
    upstream = torch.randn(shape[:-1], generator=g)
    x, y, z = (logits.double(), logits.clone(), logits.clone())
    truth = plain(x.requires_grad_(), labels, **options)
    theirs = plain(y.requires_grad_(), labels, **options)
    ours = dr.token_logprobs(z.requires_grad_(), labels, **options)
    truth.backward(upstream.double())
    theirs.backward(upstream.to(theirs.dtype))
    ours.backward(upstream)
    assert ours.dtype == torch.float32 and z.grad.dtype == dtype
    assert rms(ours, truth) <= 2 * rms(theirs, truth) + 1e-12
    assert rms(z.grad, x.grad) <= 2 * rms(y.grad, x.grad) + 1e-12


@pytest.mark.parametrize("options", [{}, {"temperature": 0.5}, {"softcap": 3.0}])
def test_gradcheck(options):
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 8, -100, 3])
    assert torch.autograd.gradcheck(lambda x: dr.token_logprobs(x, labels, **options), logits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_true_class_at_saturation(dtype):
    """p -> 1: 1 - p is 0 in float32 from a gap of 17 on; the gradient is not."""
    logits = torch.zeros(1, 5, dtype=dtype)
    logits[0, 2] = 30.0
    logits.requires_grad_()
    logp = dr.token_logprobs(logits, torch.tensor([2]))
    expected = 4 * math.exp(-30.0)
    assert logp.item() == pytest.approx(-expected, rel=1e-5, abs=0)
    logp.sum().backward()
    assert logits.grad[0, 2].item() == pytest.approx(expected, rel=1e-2, abs=0)
    assert logits.grad[0, 0].item() == pytest.approx(-expected / 4, rel=1e-2, abs=0)


def test_ignored_rows_are_exactly_zero_even_when_nan():
    logits = torch.randn(3, 4)
    logits[1] = math.nan
    logits.requires_grad_()
    labels = torch.tensor([1, -100, 2])
    logp = dr.token_logprobs(logits, labels)
    assert logp[1].item() == 0.0
    logp.sum().backward()
    assert (logits.grad[1] == 0).all() and torch.isfinite(logits.grad).all()
    every = dr.token_logprobs(logits, torch.full((3,), -100))
    assert (every == 0).all()
    assert dr.token_logprobs(logits[:1], torch.tensor([7]), ignore_index=7).item() == 0.0


def test_minus_infinity_logits():
    logits = torch.tensor([[0.0, -math.inf, 1.0], [-math.inf, 0.0, 0.0]], requires_grad=True)
    logp = dr.token_logprobs(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(logp[0].item(), -math.log1p(math.e))
    assert logp[1].item() == -math.inf
    logp[0].backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[0, 1] == 0


def test_int32_labels_and_strided_logits():
    base = torch.randn(6, 2, 11)
    logits = base.transpose(0, 1)[:, ::2]
    labels = torch.randint(0, 11, (2, 3))
    ours = dr.token_logprobs(logits, labels.int())
    torch.testing.assert_close(ours, plain(logits, labels))
    odd = torch.randn(13)[1:].view(3, 4)
    torch.testing.assert_close(
        dr.token_logprobs(odd, torch.tensor([0, 1, 2])), plain(odd, torch.tensor([0, 1, 2]))
    )


def test_no_rows():
    logits = torch.randn(0, 5, requires_grad=True)
    dr.token_logprobs(logits, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert logits.grad.shape == (0, 5)


def test_retained_graph_gives_the_same_gradient_twice():
    logits = torch.randn(3, 5, requires_grad=True)
    logp = dr.token_logprobs(logits, torch.tensor([0, 1, 4])).sum()
    first = torch.autograd.grad(logp, logits, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(logp, logits)[0])


LOGITS = torch.randn(2, 5)
BAD_CALLS = [
    (
        lambda: dr.token_logprobs(LOGITS, torch.tensor([0, 5])),
        r"\[0, 5\).*got 5 at position \(1,\)",
    ),
    (lambda: dr.token_logprobs(LOGITS, torch.tensor([-1, 0])), r"got -1 at position \(0,\)"),
    (lambda: dr.token_logprobs(LOGITS, torch.tensor([0])), r"labels: expected shape \(2,\)"),
    (lambda: dr.token_logprobs(LOGITS, torch.tensor([0.0, 1])), "labels: expected an integer"),
    (lambda: dr.token_logprobs(LOGITS.long(), torch.tensor([0, 1])), "logits: expected a floating"),
    (lambda: dr.token_logprobs(LOGITS, torch.tensor([0, 1]), temperature=0.0), "temperature"),
    (lambda: dr.token_logprobs(LOGITS, torch.tensor([0, 1]), softcap=-1.0), "softcap"),
    (lambda: dr.token_logprobs(torch.randn(2, 0), torch.tensor([0, 1])), "V >= 1"),
]


@pytest.mark.parametrize("call,message", BAD_CALLS)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_double_backward_is_refused():
    logits = torch.randn(1, 5, requires_grad=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        logp = dr.token_logprobs(logits, torch.tensor([1])).sum()
        torch.autograd.grad(logp, logits, create_graph=True)


def test_compiles_and_opcheck():
    torch._dynamo.reset()
    logits, labels = torch.randn(3, 5, requires_grad=True), torch.tensor([0, -100, 4])
    step = lambda x: dr.token_logprobs(x, labels).sum()  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(compiled, step(logits))
    ours, eager = (torch.autograd.grad(x, logits)[0] for x in (compiled, step(logits)))
    torch.testing.assert_close(ours, eager)
    arguments = (logits, labels, -100, 1.0, None, 15)
    torch.library.opcheck(torch.ops.drrlhf.token_logprobs.default, arguments)
