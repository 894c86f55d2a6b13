"""`token_logprobs`: three-way tolerance, saturation, non-finite logits, options, bad input."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from three_ways import (
    BACKENDS,
    DEVICE,
    LAYOUTS,
    ON_GPU,
    OUTPUTS,
    SLOW,
    allocated,
    assert_differentiable_once,
    assert_no_worse,
    assert_refused,
    in_turn,
    plain,
    plain_outputs,
)

import drrlhf as dr
from drrlhf import backends, ops

INFINITY, LEAST = math.inf, torch.finfo(torch.float32).min
OPTIONS = [
    {},
    {"temperature": 0.7},
    {"softcap": 30.0},
    {"softcap": 5.0, "temperature": 2.0},
]
# Either side of the vectors of 4, 8 and 16 entries, the unrolled 64 and the chunks of 2048.
SIZES = [1, 2, 3, 7, 15, 16, 17, 33, 63, 64, 65, 127, 257, 2047, 2048, 2049, 2051, 4096, 4099]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with backends.use(request.param):
        yield request.param


def some_for_the_reference(sizes):
    """The reference has no blocks whose edges need a look."""
    return [(b, v) for b in BACKENDS for v in sizes if b != "reference" or v in (2, 65, 2049)]


def rows_for(vocabulary):
    """Enough for the ratios of errors to settle; the interpreter takes a program for each row."""
    if SLOW and vocabulary > 1000:
        return 31
    return 301 if vocabulary < 1000 else 131


needs_cpp = pytest.mark.skipif("cpp" not in BACKENDS, reason="the C++ extension is not built")


def problem(rows, vocabulary, dtype=torch.float32, size=4.0, offset=0.0, seed=1):
    """Logits, labels of which some are ignored, and upstream gradients of which some are 0."""
    g = torch.Generator().manual_seed(seed)
    logits = (offset + size * torch.randn(rows, vocabulary, generator=g)).to(dtype)
    labels = torch.randint(0, vocabulary, (rows,), generator=g)
    upstream = torch.randn(rows, generator=g)
    labels[::7], upstream[::5] = -100, 0.0
    return logits, labels, upstream


def hold(logits, labels, upstream, what="", **options):
    """The three-way tolerance, of values and of gradients.

    The truth is the definition in float64, for plain PyTorch loses 1 - p there too.
    """
    values, gradients = [], []
    for name, function, x in (
        (None, dr.token_logprobs, logits),
        (None, plain, logits),
        ("reference", dr.token_logprobs, logits.double()),
    ):
        with backends.use(name) if name else contextlib.nullcontext():
            x = x.clone().requires_grad_()
            value = function(x, labels, **options)
            value.backward(upstream.to(value.dtype))
        values.append(value)
        gradients.append(x.grad)
    assert values[0].dtype == torch.float32 and gradients[0].dtype == logits.dtype
    assert_no_worse(*values, f"log-probs {what}")
    assert_no_worse(*gradients, f"gradients {what}")


@pytest.mark.accuracy
@pytest.mark.parametrize(
    ("on", "dtype"),
    in_turn(some_for_the_reference(SIZES), [torch.float32, torch.bfloat16, torch.float16]),
)
def test_no_less_accurate_than_plain_pytorch(on, dtype):
    backend, vocabulary = on
    with backends.use(backend):
        for options in OPTIONS:
            hold(*problem(rows_for(vocabulary), vocabulary, dtype), str(options), **options)


@pytest.mark.accuracy
@pytest.mark.parametrize("softcap,size", [(5.0, 20.0), (0.5, 4.0), (30.0, 0.01), (30.0, 100.0)])
@pytest.mark.parametrize("vocabulary", [2, 17, 257, 2049])
def test_softcap_of_small_and_large_arguments(backend, softcap, size, vocabulary):
    """Capped logits hardly move: 1 - tanh^2 is a difference of neighbours there."""
    for temperature in (1.0, 0.3):
        data = problem(rows_for(vocabulary), vocabulary, size=size)
        hold(*data, f"temperature {temperature}", softcap=softcap, temperature=temperature)


def rising(rows, vocabulary):
    """The largest logit comes last: what was summed before must be taken down, many times."""
    return torch.linspace(-60, 60, vocabulary) + torch.rand(rows, vocabulary)


def stepping(rows, vocabulary):
    """A larger level now and then, in the middle of vectors and of chunks."""
    level = torch.div(torch.arange(vocabulary), 37, rounding_mode="floor").float()
    return level + torch.rand(rows, vocabulary)


def confident(rows, vocabulary):
    """One logit far above the others."""
    logits = torch.randn(rows, vocabulary)
    logits[torch.arange(rows), torch.arange(rows) % vocabulary] += 25.0
    return logits


HARD = {
    "rising": rising,
    "falling": lambda rows, vocabulary: rising(rows, vocabulary).flip(-1),
    "stepping": stepping,
    "confident": confident,
    "near 1e4": lambda rows, vocabulary: 1e4 + torch.randn(rows, vocabulary),
    "near 9e3": lambda rows, vocabulary: 9e3 + torch.randn(rows, vocabulary),
    "near -1e4": lambda rows, vocabulary: -1e4 + torch.randn(rows, vocabulary),
    "wide": lambda rows, vocabulary: 60 * torch.randn(rows, vocabulary),
}


@pytest.mark.accuracy
@pytest.mark.parametrize(
    ("backend", "vocabulary"), some_for_the_reference([3, 65, 2049, 4500]), indirect=["backend"]
)
@pytest.mark.parametrize("name", HARD)
def test_hard_rows(backend, name, vocabulary):
    torch.manual_seed(3)
    rows = rows_for(vocabulary)
    _, labels, upstream = problem(rows, vocabulary)
    logits = HARD[name](rows, vocabulary)
    hold(logits, labels, upstream)
    # And with the label where the largest logit is.
    hold(logits, logits.argmax(-1), upstream)


@pytest.mark.mathematics
@pytest.mark.parametrize("vocabulary", [2, 64, 2049])
def test_equal_logits(backend, vocabulary):
    for level in (0.0, 9e3, -9e3, 1e4, -1e4, 1e6, -1e7, 1e9, 1e30, -1e30):
        logits = torch.full((3, vocabulary), level, requires_grad=True)
        labels = torch.tensor([0, vocabulary // 2, vocabulary - 1])
        logp = dr.token_logprobs(logits, labels)
        torch.testing.assert_close(logp, torch.full((3,), -math.log(vocabulary)))
        logp.sum().backward()
        expected = torch.nn.functional.one_hot(labels, vocabulary) - 1 / vocabulary
        torch.testing.assert_close(logits.grad, expected.float())


@pytest.mark.mathematics
def test_one_entry(backend):
    logits = torch.tensor([[3.0], [-1e4], [0.0]], requires_grad=True)
    found = dr.token_logprobs(logits, torch.tensor([0, 0, -100]), outputs=OUTPUTS)
    assert found.logps.tolist() == found.entropy.tolist() == [0, 0, 0]
    assert found.log_sum_sq_probs.tolist() == [0, 0, 0]
    assert found.logsumexp.tolist() == found.mean_logit.tolist() == [3, -1e4, 0]
    assert found.is_top1.tolist() == [True, True, False]
    (found.logps + found.entropy).sum().backward()
    assert logits.grad.tolist() == [[0], [0], [0]]


@pytest.mark.mathematics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_true_class_at_saturation(backend, dtype):
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


# --------------------------------------------------------------------------- not finite


def assert_same_kind(ours, theirs, what):
    """NaN where theirs is NaN, infinite where theirs is infinite, close elsewhere."""
    torch.testing.assert_close(
        ours.float(),
        theirs.float(),
        rtol=2e-5,
        atol=1e-6,
        equal_nan=True,
        msg=lambda text: f"{what}\n{text}",
    )


SPECIAL = {
    "-inf": [-INFINITY],
    "+inf": [INFINITY],
    "NaN": [math.nan],
    "both infinities": [INFINITY, -INFINITY],
    "two +inf": [INFINITY, INFINITY],
    "NaN and -inf": [math.nan, -INFINITY],
    "1e4": [1e4],
    "-1e4": [-1e4],
    "1e30": [1e30],
    "-1e30": [-1e30],
    "finfo.min": [LEAST],
    "finfo.min twice": [LEAST, LEAST],
    "finfo.max": [-LEAST],
}


@pytest.mark.mathematics
@pytest.mark.parametrize("vocabulary", [1, 2, 5, 70, 2051])
@pytest.mark.parametrize("name", SPECIAL)
def test_special_logits_give_what_plain_pytorch_gives(backend, name, vocabulary):
    """Above all, NaN is never hidden."""
    for label in {0, vocabulary // 2, vocabulary - 1}:
        for place in {0, label, vocabulary // 3, vocabulary - 1}:
            for options in ({}, {"temperature": 0.5}, {"softcap": 2.0}):
                ours = torch.randn(1, vocabulary)
                for k, value in enumerate(SPECIAL[name]):
                    ours[0, (place + k) % vocabulary] = value
                theirs, y = ours.clone().requires_grad_(), torch.tensor([label])
                what = f"label {label}, {name} at {place}, {options}"
                found = dr.token_logprobs(
                    ours.requires_grad_(), y, outputs=("entropy", "log_sum_sq_probs"), **options
                )
                expected = plain(theirs, y, **options)
                assert_same_kind(found.logps.detach(), expected.detach(), what)
                if expected.isnan():
                    assert found.entropy.isnan() and found.log_sum_sq_probs.isnan(), what
                expected.sum().backward()
                found.logps.sum().backward()
                assert_same_kind(ours.grad, theirs.grad, what)


@pytest.mark.mathematics
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("vocabulary", [2, 70, 2051])
def test_rows_of_a_mask_alone(backend, dtype, vocabulary):
    for level in (-INFINITY, torch.finfo(dtype).min, -1e4):
        logits = torch.full((1, vocabulary), level, dtype=dtype)
        theirs, ours = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        labels = torch.tensor([vocabulary - 1])
        plain(theirs.float(), labels).sum().backward()
        logp = dr.token_logprobs(ours, labels)
        logp.sum().backward()
        expected = math.nan if level == -INFINITY else -math.log(vocabulary)
        torch.testing.assert_close(logp, torch.tensor([expected]), equal_nan=True)
        torch.testing.assert_close(ours.grad, theirs.grad, equal_nan=True)


@pytest.mark.mathematics
def test_a_masked_label_and_masked_others(backend):
    logits = torch.tensor([[0.0, -INFINITY, 1.0], [-INFINITY, 0.0, 0.0]], requires_grad=True)
    logp = dr.token_logprobs(logits, torch.tensor([0, 0]))
    torch.testing.assert_close(logp[0].item(), -math.log1p(math.e))
    assert logp[1].item() == -INFINITY
    logp[0].backward()
    assert torch.isfinite(logits.grad).all() and logits.grad[0, 1] == 0


@pytest.mark.mathematics
def test_ignored_rows_are_exactly_zero_even_when_nan(backend):
    logits = torch.randn(3, 4)
    logits[1] = math.nan
    logits.requires_grad_()
    found = dr.token_logprobs(logits, torch.tensor([1, -100, 2]), outputs=OUTPUTS)
    assert all(x[1].item() == 0 for x in found)
    (found.logps + found.entropy).sum().backward()
    assert (logits.grad[1] == 0).all() and torch.isfinite(logits.grad).all()
    assert dr.token_logprobs(logits[:1], torch.tensor([2]), ignore_index=2).item() == 0.0
    every = torch.full((3,), -100)
    logps = dr.token_logprobs(logits, every)
    assert (logps == 0).all()
    assert (torch.autograd.grad(logps.sum(), logits)[0] == 0).all()


@pytest.mark.mathematics
def test_a_row_without_upstream_gradient_gets_none_even_when_nan(backend):
    logits = torch.tensor([[1.0, math.nan], [1.0, 2.0]], requires_grad=True)
    logps = dr.token_logprobs(logits, torch.tensor([0, 0]))
    assert logps[0].isnan()
    logps.backward(torch.tensor([0.0, 1.0]))
    assert (logits.grad[0] == 0).all() and torch.isfinite(logits.grad[1]).all()


# --------------------------------------------------------------------------- optional outputs


@pytest.mark.accuracy
@pytest.mark.pairwise
@pytest.mark.parametrize("offset", [0.0, 30.0, 9e3])
@pytest.mark.parametrize("size", [0.1, 4.0, 16.0])
@pytest.mark.parametrize(
    ("backend", "vocabulary"), some_for_the_reference([2, 17, 65, 2051, 4099]), indirect=["backend"]
)
def test_optional_outputs_no_less_accurate(backend, vocabulary, size, offset):
    rows = rows_for(vocabulary)
    logits, labels, upstream = problem(rows, vocabulary, size=size, offset=offset)
    found, gradients = [], []
    for kind, x in enumerate((logits, logits, logits.double())):
        x = x.clone().requires_grad_()
        if kind:
            found.append(plain_outputs(x, labels))
        else:
            found.append(dr.token_logprobs(x, labels, outputs=OUTPUTS)._asdict())
        found[-1]["entropy"].backward(upstream.to(x.dtype))
        gradients.append(x.grad)
    for name in set(OUTPUTS) - {"is_top1"}:
        assert_no_worse(*(f[name] for f in found), name)
        assert found[0][name].dtype == torch.float32
    assert_no_worse(*gradients, "the gradient of the entropy")
    assert torch.equal(found[0]["is_top1"], found[2]["is_top1"])


@pytest.mark.mathematics
def test_outputs_follow_the_options(backend):
    logits, labels, _ = problem(64, 33, torch.float64)
    for options in OPTIONS:
        found = dr.token_logprobs(logits.float(), labels, outputs=OUTPUTS, **options)
        for name, expected in plain_outputs(logits, labels, **options).items():
            ours = getattr(found, name).to(expected.dtype)
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.mathematics
@pytest.mark.parametrize("vocabulary", [5, 17, 70, 2100, 4200])
def test_is_top1_breaks_ties_as_argmax_does(backend, vocabulary):
    """The label, another entry before it, another after it, all over vectors and chunks."""
    places = sorted({0, 1, 4, 15, 16, 63, 64, 2047, 2048, vocabulary - 1} & set(range(vocabulary)))
    pairs = torch.tensor([(a, b) for a in places for b in places])
    logits = torch.randn(len(pairs), vocabulary).clamp(max=4)
    logits.scatter_(1, pairs, 5.0)
    found = dr.token_logprobs(logits, pairs[:, 0], outputs=("is_top1",))
    # torch.argmax promises no particular one of equals.
    assert torch.equal(found.is_top1, pairs[:, 0] == pairs.amin(1))
    logits.scatter_(1, pairs[:, :1], 4.9)
    found = dr.token_logprobs(logits, pairs[:, 0], outputs=("is_top1",))
    assert torch.equal(found.is_top1, pairs[:, 0] == pairs[:, 1])


@pytest.mark.usual
@pytest.mark.parametrize("name", OUTPUTS)
def test_only_what_is_asked_for(backend, name):
    logits, labels, _ = problem(9, 12)
    every = dr.token_logprobs(logits, labels, outputs=OUTPUTS)
    found = dr.token_logprobs(logits.requires_grad_(), labels, outputs=[name])
    for field, value in found._asdict().items():
        if field in ("logps", name):
            torch.testing.assert_close(value.detach(), getattr(every, field))
            assert value.requires_grad == (field in ("logps", "entropy"))
        else:
            assert value is None


@pytest.mark.accuracy
@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_of_logp_and_entropy_together(backend, options):
    logits, labels, upstream = problem(301, 67, size=2.0)
    gradients = []
    for kind, x in enumerate((logits, logits, logits.double())):
        x = x.clone().requires_grad_()
        if kind:
            both = plain(x, labels, **options), plain_outputs(x, labels, **options)["entropy"]
        else:
            both = dr.token_logprobs(x, labels, outputs=("entropy",), **options)[:2]
        weights = [upstream.to(x.dtype), upstream.flip(0).to(x.dtype)]
        torch.autograd.backward(both, weights)
        gradients.append(x.grad)
    assert_no_worse(*gradients)


@pytest.mark.mathematics
@pytest.mark.parametrize("options", OPTIONS)
def test_gradcheck_of_the_reference(options):
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 8, -100, 3])
    both = lambda x: dr.token_logprobs(x, labels, outputs=("entropy",), **options)[:2]  # noqa: E731
    assert torch.autograd.gradcheck(both, logits)
    torch.testing.assert_close(both(logits)[0], plain(logits, labels, **options))


# --------------------------------------------------------------------------- layout


@pytest.mark.usual
@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_logits(backend, layout, dtype):
    x, labels, upstream = problem(13, 131, dtype)
    there = LAYOUTS[layout](x)
    dense = there.clone(memory_format=torch.contiguous_format)
    values, gradients = [], []
    for logits in (there, dense):
        logits = logits.detach().requires_grad_()
        values.append(dr.token_logprobs(logits, labels))
        gradients.append(torch.autograd.grad(values[-1], logits, upstream)[0])
    # A GPU's threads begin on whole loads, wherever the row does.
    if backend == "cuda" or (backend == "triton" and ON_GPU):
        torch.testing.assert_close(*values, rtol=2e-6, atol=0)
        torch.testing.assert_close(*gradients, rtol=2 * torch.finfo(dtype).eps + 2e-6, atol=1e-7)
    else:
        assert torch.equal(*values) and torch.equal(*gradients)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8, torch.uint8])
def test_integer_labels_of_any_width(backend, dtype):
    logits = torch.randn(2, 3, 11)
    labels = torch.randint(0, 11, (3, 2)).T
    assert torch.equal(
        dr.token_logprobs(logits, labels.to(dtype)), dr.token_logprobs(logits, labels)
    )


def test_shapes_without_rows(backend):
    logits = torch.randn(0, 5, requires_grad=True)
    dr.token_logprobs(logits, torch.zeros(0, dtype=torch.long)).sum().backward()
    assert logits.grad.shape == (0, 5)
    row = torch.randn(5, requires_grad=True)
    logp = dr.token_logprobs(row, torch.tensor(3))
    torch.testing.assert_close(logp, row.log_softmax(-1)[3])
    logp.backward()
    assert row.grad.shape == (5,)


def test_upstream_gradient_that_is_expanded(backend):
    logits, labels, _ = problem(6, 9)
    logits.requires_grad_()
    logp = dr.token_logprobs(logits, labels)
    one = torch.autograd.grad(logp, logits, torch.ones(6), retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(logp.sum(), logits)[0], one)


def test_autocast_changes_nothing(backend):
    """Log-softmax is a float32 operation under autocast, and this one always is."""
    logits, labels, upstream = problem(5, 40)
    logits.requires_grad_()
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        inside = dr.token_logprobs(logits, labels)
        (gradient,) = torch.autograd.grad(inside, logits, upstream)
    outside = dr.token_logprobs(logits, labels)
    assert inside.dtype == torch.float32 and torch.equal(inside, outside)
    assert torch.equal(gradient, torch.autograd.grad(outside, logits, upstream)[0])


# --------------------------------------------------------------------------- backward


def test_retained_graph_gives_the_same_gradient_twice(backend):
    logits, labels, upstream = problem(4, 66)
    logits.requires_grad_()
    logp = dr.token_logprobs(logits, labels)
    first = torch.autograd.grad(logp, logits, upstream, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(logp, logits, upstream)[0])


def test_double_backward_is_refused(backend):
    logits = torch.randn(1, 5, requires_grad=True)
    logp = dr.token_logprobs(logits, torch.tensor([1])).sum()
    assert_differentiable_once(logp, logits)


def test_logits_changed_after_the_forward_are_noticed(backend):
    leaf = torch.randn(2, 5, requires_grad=True)
    logits = leaf * 1.0
    logp = dr.token_logprobs(logits, torch.tensor([1, 2])).sum()
    logits.mul_(2.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.backward()


@pytest.mark.usual
@pytest.mark.pairwise
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [None, *LAYOUTS])
@pytest.mark.parametrize("entropy", [False, True])
def test_inplace_backward(backend, dtype, layout, entropy):
    """The same gradient, in the logits' own memory."""
    if layout == "one row for all":
        pytest.skip("rows that share memory cannot hold their gradients")
    x, labels, upstream = problem(13, 131, dtype)
    gradients = []
    for inplace in (False, True):
        leaf = x.clone().requires_grad_()
        logits = leaf * 1.0 if layout is None else LAYOUTS[layout](leaf)
        options = {"inplace_backward": inplace, "temperature": 0.7}
        found = dr.token_logprobs(logits, labels, outputs=("entropy",), **options)
        outputs = [found.logps, found.entropy] if entropy else [found.logps]
        torch.autograd.backward(outputs, [upstream] * len(outputs))
        gradients.append(leaf.grad)
    assert torch.equal(*gradients) and gradients[0].abs().sum() > 0
    where = logits.detach()
    torch.testing.assert_close(where[1::7][1:], gradients[0][1::7][1:], msg="not written in place")


# Parts of a batch that no view holds as rows: of many rows each, of two, of another dimension.
PARTS = {
    "but the last": lambda x: x[:, :-1],
    "but the first": lambda x: x[:, 1:],
    "every third": lambda x: x[:, ::3],
    "short ones": lambda x: x[:, :3],
    "of four dimensions": lambda x: x.unflatten(0, (1, -1))[:, :, :-1],
    "two dimensions apart": lambda x: x.unflatten(1, (2, -1))[:, :, 1:],
    "columns, too": lambda x: x[:, :-1, :-1],
    "another column at a time": lambda x: x[:, :-1, ::2],
}


@pytest.mark.parametrize("part, vocabulary", in_turn([*PARTS], [48, 4099]))
def test_parts_of_a_batch(backend, part, vocabulary):
    """As plain PyTorch has them, in place too, and what lies between stays what it was."""
    shape = (2, 36) if SLOW else (3, 40)
    x, labels, upstream = problem(math.prod(shape), vocabulary, size=1.0)
    some = PARTS[part]
    labels, upstream = (
        some(z.view(*shape, 1).expand(*shape, 4))[..., 0] for z in (labels, upstream)
    )
    leaf = x.view(*shape, -1).clone().requires_grad_()
    labels = labels.clamp(max=some(leaf).shape[-1] // 2)
    expected = plain(some(leaf), labels)
    (d_expected,) = torch.autograd.grad(expected, leaf, upstream)
    for inplace in (False, True):
        made = leaf * 1.0
        found = dr.token_logprobs(some(made), labels, inplace_backward=inplace)
        torch.testing.assert_close(found, expected)
        (d,) = torch.autograd.grad(found, leaf, upstream)
        torch.testing.assert_close(d, d_expected, atol=2e-6, rtol=2e-5)
    torch.testing.assert_close(some(made), some(d_expected), atol=2e-6, rtol=2e-5)
    some(made).detach().copy_(some(leaf))
    assert torch.equal(made, leaf)


@pytest.mark.usual
def test_parts_of_a_batch_are_not_copied(backend):
    if backend == "reference":
        pytest.skip("it makes several such tensors")
    logits = torch.randn(3, 40, 4096)[:, :-1]
    labels = torch.randint(0, 4096, (3, 39))
    size = logits.numel() * 4
    forward = allocated(lambda: dr.token_logprobs(logits, labels))
    assert forward < size / 10
    found = ops.token_logprobs(logits, labels, -100, 1.0, None, 0)
    given = (torch.ones(3, 39), None, *found[:4], -100, 1.0, None)
    in_place = torch.ops.drrlhf.token_logprobs_backward_
    assert allocated(lambda: in_place(logits, labels, *given)) < size / 10
    logits = torch.randn(3, 40, 4096)[:, :-1]
    backward = torch.ops.drrlhf.token_logprobs_backward
    assert allocated(lambda: backward(logits, labels, *given)) < 1.1 * size


SPENT = "inplace_backward: expected logits that an operation made, got a "
SHARED = "inplace_backward: expected logits whose entries have memory of their own"
NOT_SPENDABLE = {
    "leaf": (lambda leaf: leaf, SPENT + "leaf"),
    "view of a leaf": (lambda leaf: leaf.view(2, 3, 5), SPENT + "view of a leaf"),
    "part of a leaf": (lambda leaf: leaf[:, :-1], SPENT + "view of a leaf"),
    "view of a view": (lambda leaf: leaf.view(2, 3, 5)[0].mT, SPENT + "view of a leaf"),
    "one row for all": (lambda leaf: (leaf * 1.0)[:1].expand(3, 5), SHARED),
    "windows": (lambda leaf: (leaf * 1.0).view(-1).unfold(0, 5, 2), SHARED),
    "windows across": (lambda leaf: (leaf * 1.0).view(-1).unfold(0, 5, 2).mT, SHARED),
}


@pytest.mark.usual
@pytest.mark.parametrize("made, message", NOT_SPENDABLE.values(), ids=NOT_SPENDABLE)
def test_inplace_backward_refuses_logits_that_are_not_its_own(made, message):
    leaf = torch.randn(6, 5, requires_grad=True)
    logits = made(leaf)
    labels = torch.zeros(logits.shape[:-1], dtype=torch.long)
    with pytest.raises(ValueError, match=message):
        dr.token_logprobs(logits, labels, inplace_backward=True)
    with torch.no_grad():  # nothing will be written
        dr.token_logprobs(logits.detach(), labels, inplace_backward=True)


def test_inplace_backward_refuses_what_it_would_destroy(backend):
    logits, labels = torch.randn(2, 5, requires_grad=True), torch.tensor([1, 2])
    logp = dr.token_logprobs(logits * 1.0, labels, inplace_backward=True).sum()
    logp.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        logp.backward()
    logp = dr.token_logprobs(logits * 1.0, labels, inplace_backward=True).sum()
    (gradient,) = torch.autograd.grad(logp, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        torch.autograd.grad(gradient.sum(), logits)
    # Another reader of the logits must not get the gradient in their place.
    made = logits * 1.0
    square = made.square().sum()
    logp = dr.token_logprobs(made, labels, inplace_backward=True).sum()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (square + logp).backward()


# --------------------------------------------------------------------------- bad input

LOGITS, TWO = torch.randn(2, 5), torch.tensor([0, 1])
BAD_CALLS = [
    ((LOGITS, torch.tensor([0, 5])), {}, r"\[0, 5\).*got 5 at position \(1,\)"),
    ((LOGITS, torch.tensor([-1, 0])), {}, r"got -1 at position \(0,\)"),
    ((LOGITS, torch.tensor([-100, 0])), {"ignore_index": -1}, r"got -100 at position \(0,\)"),
    ((LOGITS, torch.tensor([0, 2**40])), {}, "got 1099511627776"),
    ((LOGITS, torch.tensor([0])), {}, r"labels: expected shape \(2,\)"),
    ((LOGITS, torch.tensor([[0, 1]])), {}, r"labels: expected shape \(2,\)"),
    ((LOGITS, torch.tensor([0.0, 1])), {}, "labels: expected an integer"),
    ((LOGITS, torch.tensor([True, False])), {}, "labels: expected an integer"),
    ((LOGITS.long(), TWO), {}, "logits: expected a floating"),
    ((LOGITS, TWO), {"temperature": 0.0}, "temperature: expected a finite number > 0"),
    ((LOGITS, TWO), {"temperature": math.nan}, "temperature: expected a finite number > 0"),
    ((LOGITS, TWO), {"softcap": -1.0}, "softcap: expected a finite number > 0"),
    ((LOGITS, TWO), {"outputs": ("entropi",)}, "did you mean 'entropy'"),
    ((LOGITS, TWO), {"outputs": "entropy"}, "expected a sequence of names"),
    ((torch.randn(2, 0), TWO), {}, "V >= 1"),
    ((torch.tensor(1.0), torch.tensor(0)), {}, "V >= 1"),
]


@pytest.mark.parametrize("arguments,options,message", BAD_CALLS)
def test_bad_input(backend, arguments, options, message):
    assert_refused(lambda: dr.token_logprobs(*arguments, **options), message, backend)


def backward_arguments(logits, labels):
    """What the backward op takes after the logits, by name."""
    rows = torch.randn(labels.shape)
    return {
        "labels": labels,
        "grad": rows,
        "grad_entropy": rows,
        "logp": -rows.abs(),
        "lse": rows,
        "lse_tail": 0 * rows,
        "entropy": rows.abs(),
        "ignore_index": -100,
        "temperature": 1.0,
        "softcap": None,
    }


@needs_cpp
@pytest.mark.parametrize("labels", [[0, 5], [-1, 0], [0, 2**40], [0], [0, 1, 2], [[0, 1]]])
def test_the_kernels_check_labels_themselves(labels):
    """Called past the Python checks they must not read outside of a row."""
    y = torch.tensor(labels)
    ops = torch.ops.drrlhf_cpp
    with pytest.raises(ValueError, match="labels: expected"):
        ops.token_logprobs(LOGITS, y, -100, 1.0, None, 0)
    rest = backward_arguments(LOGITS, torch.tensor([0, 1])) | {"labels": y}
    for op in (ops.token_logprobs_backward, ops.token_logprobs_backward_):
        with pytest.raises(ValueError, match="labels: expected"):
            op(LOGITS.clone(), *rest.values())


@needs_cpp
@pytest.mark.parametrize("name", ["grad", "grad_entropy", "logp", "lse", "lse_tail", "entropy"])
@pytest.mark.parametrize("size", [0, 1, 3])
def test_the_kernels_check_what_comes_by_token(name, size):
    rest = backward_arguments(LOGITS, torch.tensor([0, 1])) | {name: torch.zeros(size)}
    ops = torch.ops.drrlhf_cpp
    for op in (ops.token_logprobs_backward, ops.token_logprobs_backward_):
        with pytest.raises(ValueError, match=f"{name}: expected a CPU tensor of 2 numbers"):
            op(LOGITS.clone(), *rest.values())


@needs_cpp
def test_the_kernels_check_dtypes_and_empty_rows():
    ops = torch.ops.drrlhf_cpp
    with pytest.raises(ValueError, match="expected float32, bfloat16 or float16"):
        ops.token_logprobs(LOGITS.double(), TWO, -100, 1.0, None, 0)
    with pytest.raises(ValueError, match="labels: expected values"):
        ops.token_logprobs(torch.randn(2, 0), TWO, -100, 1.0, None, 0)
    with pytest.raises(IndexError):
        ops.token_logprobs(torch.tensor(1.0), torch.tensor(0), -100, 1.0, None, 0)
    every = torch.tensor([-100, -100])
    assert ops.token_logprobs(torch.randn(2, 0), every, -100, 1.0, None, 15)[0].tolist() == [0, 0]


# --------------------------------------------------------------------------- graphs, backends


@pytest.mark.usual
@pytest.mark.parametrize("outputs", [(), OUTPUTS])
def test_compiles_without_a_break(backend, outputs):
    torch._dynamo.reset()
    logits, labels, upstream = problem(5, 12)
    logits.requires_grad_()

    def step(x):
        found = dr.token_logprobs(x, labels, outputs=outputs, temperature=0.7)
        return (found if not outputs else found.logps + 0.1 * found.entropy) @ upstream

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(compiled, step(logits))
    ours, eager = (torch.autograd.grad(x, logits)[0] for x in (compiled, step(logits)))
    torch.testing.assert_close(ours, eager)


@pytest.mark.skipif(ON_GPU, reason="graphs for a GPU answer with NaN")
def test_a_compiled_graph_still_checks_labels():
    torch._dynamo.reset()
    step = torch.compile(dr.token_logprobs, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="argument check failed"):
        step(LOGITS, torch.tensor([0, 5]))


@pytest.mark.usual
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(backend, dtype):
    logits, labels, _ = problem(5, 12, dtype)
    labels = labels.int()
    logits.requires_grad_()
    for outputs in (0, 15):
        for softcap in (None, 5.0):
            arguments = (logits, labels, -100, 0.7, softcap, outputs)
            torch.library.opcheck(torch.ops.drrlhf.token_logprobs.default, arguments)
            if backend == "cpp":
                torch.library.opcheck(
                    torch.ops.drrlhf_cpp.token_logprobs.default, arguments, test_utils="test_schema"
                )
    rest = tuple(backward_arguments(logits, labels).values())
    for op in ("token_logprobs_backward", "token_logprobs_backward_"):
        torch.library.opcheck(getattr(torch.ops.drrlhf, op).default, (logits.detach(), *rest))


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_backward_may_follow_another_backends_forward(dtype, options):
    logits, labels, upstream = problem(33, 70, dtype)
    gradients = {}
    for forward in BACKENDS:
        for backward in BACKENDS:
            x = logits.clone().requires_grad_()
            with backends.use(forward):
                found = dr.token_logprobs(x, labels, outputs=("entropy",), **options)
            with backends.use(backward):
                torch.autograd.backward((found.logps, found.entropy), (upstream, upstream))
            gradients[forward, backward] = x.grad
    # One rounding of the narrow dtypes apart; of float32, some.
    close = {"rtol": 1e-4, "atol": 2e-6} if dtype == torch.float32 else {}
    for gradient in gradients.values():
        torch.testing.assert_close(gradient, gradients["reference", "reference"], **close)


@needs_cpp
def test_float64_is_the_references():
    logits, labels, _ = problem(3, 5, torch.float64)
    assert dr.token_logprobs(logits, labels).dtype == torch.float64
    with (
        backends.use("cpp"),
        pytest.raises(backends.BackendError, match="float64 is the reference"),
    ):
        dr.token_logprobs(logits, labels)
