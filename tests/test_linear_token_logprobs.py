"""`linear_token_logprobs` is `token_logprobs` of logits that were never rounded."""

from __future__ import annotations

import pytest
import torch

import drrlhf as dr


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.5}, {"softcap": 4.0}, {"logit_scale": 0.25}]
)
def test_value_and_gradients(bias, options):
    g = torch.Generator().manual_seed(2)
    hidden = torch.randn(2, 5, 6, generator=g, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, generator=g, dtype=torch.float64, requires_grad=True)
    b = torch.randn(11, generator=g, dtype=torch.float64, requires_grad=True) if bias else None
    labels = torch.randint(0, 11, (2, 5), generator=g)
    labels[0, 1] = -100
    options = dict(options)
    scale = options.get("logit_scale", 1.0)
    logits = scale * (hidden @ weight.T + (b if bias else 0.0))
    rest = {k: v for k, v in options.items() if k != "logit_scale"}
    expected = dr.token_logprobs(logits, labels, **rest)
    ours = dr.linear_token_logprobs(hidden, weight, labels, bias=b, **options)
    torch.testing.assert_close(ours, expected)
    upstream = torch.randn(2, 5, generator=g, dtype=torch.float64)
    inputs = [hidden, weight] + ([b] if bias else [])
    for a, e in zip(*(torch.autograd.grad(x, inputs, upstream) for x in (ours, expected))):
        torch.testing.assert_close(a, e)
    assert torch.autograd.gradcheck(
        lambda h, w: dr.linear_token_logprobs(h, w, labels, bias=b, **options), (hidden, weight)
    )


def test_bf16_logits_are_not_rounded():
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(64, 128, generator=g).bfloat16()
    weight = torch.randn(500, 128, generator=g).bfloat16()
    labels = torch.randint(0, 500, (64,), generator=g)
    truth = (hidden.double() @ weight.double().T).log_softmax(-1)
    truth = truth.gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    rounded = dr.token_logprobs(hidden @ weight.T, labels)
    ours = dr.linear_token_logprobs(hidden, weight, labels)
    assert (ours - truth).abs().max() < 0.01 * (rounded - truth).abs().max()


def test_autocast_takes_its_dtype_and_keeps_float32_logits():
    hidden, weight = torch.randn(8, 16), torch.randn(33, 16)
    labels = torch.randint(0, 33, (8,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = dr.linear_token_logprobs(hidden, weight, labels)
    expected = dr.linear_token_logprobs(hidden.bfloat16(), weight.bfloat16(), labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize(
    "call,message",
    [
        (lambda h, w, y: dr.linear_token_logprobs(h, w[:, :3], y), r"\(V, D\) with D = 4"),
        (lambda h, w, y: dr.linear_token_logprobs(h, w.double(), y), "expected torch.float32"),
        (
            lambda h, w, y: dr.linear_token_logprobs(h, w, y + 9),
            r"labels: expected values in \[0, 5",
        ),
        (lambda h, w, y: dr.linear_token_logprobs(h, w, y, bias=y.float()), "bias: expected shape"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.randn(2, 4), torch.randn(5, 4), torch.tensor([0, 1]))


def test_compiles():
    torch._dynamo.reset()
    hidden, weight = torch.randn(3, 4, requires_grad=True), torch.randn(7, 4)
    labels = torch.tensor([0, -100, 6])
    step = lambda h: dr.linear_token_logprobs(h, weight, labels).sum()  # noqa: E731
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(hidden)
    torch.testing.assert_close(compiled, step(hidden))
