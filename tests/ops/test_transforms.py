"""The public functions under `torch.func`, and on meta tensors, which have shapes alone."""

from __future__ import annotations

import pytest
import torch
from three_ways import BACKENDS, DEVICE
from torch.autograd import forward_ad
from torch.func import grad, jacrev, vjp, vmap
from torch.utils._python_dispatch import TorchDispatchMode

import drrlhf as dr
from drrlhf import backends

LABELS = torch.tensor([3, 0, -100, 6])
PROMPTS = torch.tensor([0, 0, 1, 1])
WEIGHT = torch.linspace(-2, 2, 7 * 16).sin().view(7, 16)


@pytest.fixture(params=BACKENDS)
def backend(request):
    with backends.use(request.param):
        yield request.param


def zeros(*shape, like):
    return torch.zeros(shape, dtype=torch.float32, device=like.device)


def on(like, *tensors):
    return [x.to(like.device) for x in tensors]


def robust_risk(losses):
    return dr.robust_risk(losses, "tv:0.2").value


def token_logprobs(logits):
    return dr.token_logprobs(logits, *on(logits, LABELS)).sum()


def token_logprobs_inplace(logits):
    return dr.token_logprobs(logits * 1.0, *on(logits, LABELS), inplace_backward=True).sum()


def entropy(logits):
    found = dr.token_logprobs(logits, *on(logits, LABELS), outputs=("entropy",)).entropy
    assert found is not None
    return found.sum()


def linear_token_logprobs(hidden):
    return dr.linear_token_logprobs(hidden, *on(hidden, WEIGHT, LABELS)).sum()


def linear_token_logprobs_by_the_head(weight):
    hidden = torch.linspace(-1, 1, 64, device=weight.device).cos().view(4, 16)
    return dr.linear_token_logprobs(hidden, weight, *on(weight, LABELS)).sum()


def sequence_logprobs(logps):
    labels = on(logps, LABELS)[0].view(2, 2)
    return dr.sequence_logprobs(logps, labels, reduction="mean").square().sum()


def preference_loss(logps):
    rest = [zeros(3, like=logps) for _ in range(3)]
    return dr.preference_loss(logps, *rest, ambiguity="tv:0.2").loss


def reward_loss(rewards):
    return dr.reward_loss(rewards, zeros(3, like=rewards), ambiguity="kl:0.1").loss


def linear_preference_loss(hidden):
    weight, labels = on(hidden, WEIGHT, LABELS)
    return dr.linear_preference_loss(
        hidden, weight, labels.view(4, 1), zeros(4, like=hidden), ambiguity="kl:0.1"
    ).loss


def policy_loss(logps):
    ones, prompts = zeros(4, like=logps) + 1, on(logps, PROMPTS)[0]
    return dr.policy_loss(
        logps,
        zeros(4, 3, like=logps),
        ones,
        ones.cumsum(0),
        prompts,
        num_prompts=2,
        ambiguity="tv:0.2",
    ).loss


SHAPES = {
    robust_risk: (5,),
    token_logprobs: (4, 7),
    token_logprobs_inplace: (4, 7),
    entropy: (4, 7),
    linear_token_logprobs: (4, 16),
    linear_token_logprobs_by_the_head: (7, 16),
    sequence_logprobs: (2, 2),
    preference_loss: (3,),
    reward_loss: (3,),
    linear_preference_loss: (4, 1, 16),
    policy_loss: (4, 3),
}
FUNCTIONS = [
    pytest.param(
        function,
        id=function.__name__,
        marks=pytest.mark.skipif(
            function is policy_loss and "cuda" in BACKENDS, reason="the backend has no such kernel"
        ),
    )
    for function in SHAPES
]
# What has a second derivative: of a linear op, and of Danskin's value, whose weights are constants.
TWICE = (sequence_logprobs, robust_risk, preference_loss, reward_loss)


def inputs(function):
    """An input of the function, and its gradient by autograd as everyone uses it."""
    size = torch.Size(SHAPES[function]).numel()
    x = torch.linspace(-1.3, 1.7, size).sin().mul(1.5).view(SHAPES[function])
    leaf = x.clone().requires_grad_()
    function(leaf).backward()
    return x, leaf.grad


# torch says where vmap loops over what it is given, and loops.
pytestmark = pytest.mark.filterwarnings("ignore:There is a performance drop")


@pytest.mark.usual
@pytest.mark.parametrize("function", FUNCTIONS)
def test_gradients_of_torch_func_are_those_of_autograd(backend, function):
    x, expected = inputs(function)
    assert torch.equal(grad(function)(x), expected)
    assert torch.equal(jacrev(function)(x), expected)
    value, pull = vjp(function, x)
    assert torch.equal(value, function(x))
    for factor in (1.0, -2.0):  # the same graph twice
        assert torch.equal(pull(torch.tensor(factor))[0], factor * expected)
    # An outer gradient by what the inner one does not depend on.
    outer = grad(lambda s: (s * grad(function)(x)).sum())(torch.tensor(3.0))
    torch.testing.assert_close(outer, expected.sum())


@pytest.mark.usual
def test_gradients_of_two_arguments_at_once(backend):
    hidden, weight = torch.randn(4, 16), torch.randn(7, 16)
    run = lambda h, w: dr.linear_token_logprobs(h, w, LABELS).sum()  # noqa: E731
    leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
    run(*leaves).backward()
    for ours, leaf in zip(grad(run, (0, 1))(hidden, weight), leaves):
        assert torch.equal(ours, leaf.grad)


@pytest.mark.usual
@pytest.mark.parametrize("function", FUNCTIONS)
def test_second_derivatives_of_torch_func_are_right_or_refused(backend, function):
    x, _ = inputs(function)
    scaled = lambda s: grad(lambda v: s * function(v))(x).sum()  # noqa: E731
    again = lambda v: grad(function)(v).sum()  # noqa: E731
    if function in TWICE:
        leaf = x.clone().requires_grad_()
        (first,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
        # robust_risk's first derivative is a constant, without a graph.
        second = torch.zeros_like(x)
        if first.requires_grad and function is not robust_risk:
            (second,) = torch.autograd.grad(first.sum(), leaf)
        assert torch.equal(grad(again)(x), second)
        torch.testing.assert_close(grad(scaled)(torch.tensor(3.0)), first.sum().detach())
        return
    for outer, at in ((again, x), (scaled, torch.tensor(3.0))):
        with pytest.raises(RuntimeError, match="no double backward"):
            grad(outer)(at)


@pytest.mark.usual
def test_a_second_derivative_by_hand(backend):
    """(l_1)^2 + (l_2)^2 over means of 2 and 1 tokens: the Hessian's rows sum to 1, 1, 2 and 0."""
    x = torch.tensor([[0.3, -0.4], [0.5, 2.0]])
    labels = torch.tensor([[1, 2], [3, -100]])
    run = lambda v: dr.sequence_logprobs(v, labels, reduction="mean").square().sum()  # noqa: E731
    found = grad(lambda v: grad(run)(v).sum())(x)
    torch.testing.assert_close(found, torch.tensor([[1.0, 1.0], [2.0, 0.0]]))


@pytest.mark.usual
@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("function", [robust_risk, token_logprobs])
def test_tangents_are_refused_and_never_lost(backend, function, learns):
    """no_grad leaves forward-mode derivatives on."""
    x, _ = inputs(function)
    with torch.set_grad_enabled(learns), forward_ad.dual_level():
        dual = forward_ad.make_dual(x, torch.ones_like(x))
        with pytest.raises(NotImplementedError, match="jvp"):
            function(dual)


# Prompt ids are read by the host, which vmap cannot.
@pytest.mark.usual
@pytest.mark.parametrize("function", [f for f in FUNCTIONS if f.values[0] is not policy_loss])
def test_vmap_is_a_loop(backend, function):
    x, _ = inputs(function)
    batch = torch.stack([x, 0.5 * x, -x])
    assert torch.equal(vmap(function)(batch), torch.stack([function(row) for row in batch]))
    loop = torch.stack([grad(function)(row) for row in batch])
    assert torch.equal(vmap(grad(function))(batch), loop)


SAMPLES = torch.tensor([[3, 0, -100, 6], [1, 1, 2, 5], [-100, 4, 0, 0]])


def head_by_labels(hidden, labels):
    return dr.linear_token_logprobs(hidden, WEIGHT.to(hidden.device), labels).sum()


def logits_by_labels(hidden, labels):
    return dr.token_logprobs(hidden @ WEIGHT.to(hidden.device).T, labels).sum()


@pytest.mark.usual
@pytest.mark.parametrize("function", [head_by_labels, logits_by_labels])
def test_each_sample_may_have_labels_of_its_own(backend, function):
    """As gradients by sample need it."""
    hidden = torch.linspace(-3, 3, 3 * 4 * 16).cos().view(3, 4, 16)
    loop = torch.stack([grad(function)(x, y) for x, y in zip(hidden, SAMPLES)])
    torch.testing.assert_close(vmap(grad(function))(hidden, SAMPLES), loop)
    # One dimension after another, and the samples not in front.
    values = torch.stack([function(x, y) for x, y in zip(hidden, SAMPLES)])
    by_both = vmap(vmap(function, (1, None)), (None, 0))(hidden.transpose(0, 1), SAMPLES)
    torch.testing.assert_close(by_both.diagonal(), values)


@pytest.mark.usual
@pytest.mark.skipif(DEVICE != "cpu", reason="a GPU is not read")
@pytest.mark.parametrize("function", [head_by_labels, logits_by_labels])
def test_a_wrong_label_of_one_sample_is_named(backend, function):
    hidden, wrong = torch.ones(3, 4, 16), SAMPLES.clone()
    wrong[1, 2] = 9
    message = r"labels: expected values in \[0, 7\).*got 9 at position \(2,\)"
    for transformed in (
        vmap(function),
        vmap(grad(function)),
        lambda x, y: vmap(vmap(function, (1, None)), (None, 0))(x.transpose(0, 1), y),
        lambda x, y: vmap(function, (0, 1))(x, y.T),
    ):
        with pytest.raises(ValueError, match=message):
            transformed(hidden, wrong)


@pytest.mark.usual
def test_each_sample_may_have_label_probabilities_of_its_own():
    chosen, probs = torch.linspace(-1, 2, 12).view(3, 4), torch.linspace(0, 1, 12).view(3, 4)

    def loss(chosen, probs):
        return dr.preference_loss(chosen, *[torch.zeros(4)] * 3, label_probs=probs).loss

    expected = torch.stack([loss(x, p) for x, p in zip(chosen, probs)])
    torch.testing.assert_close(vmap(loss)(chosen, probs), expected)
    probs[2, 1] = 1.5
    if DEVICE == "cpu":
        with pytest.raises(ValueError, match=r"label_probs: expected.*got \[0\.\d+, 1\.5, "):
            vmap(loss)(chosen, probs)


@pytest.mark.parametrize("function", list(SHAPES), ids=lambda f: f.__name__)
def test_meta_tensors_give_the_shapes(function):
    """Also backwards, and without a device that could compute."""
    x = torch.empty(SHAPES[function], device="meta", requires_grad=True)
    loss = function(x)
    assert loss.is_meta and loss.shape == () and loss.dtype == torch.float32
    loss.backward()
    assert x.grad is not None and x.grad.is_meta and x.grad.shape == x.shape


def test_every_field_on_meta_is_shaped_as_on_the_cpu():
    """Of every result, and of every optional output."""

    def results(device):
        make = lambda *shape: torch.zeros(shape, device=device)  # noqa: E731
        labels, prompts = (x.to(device) for x in (LABELS.clamp(min=0), PROMPTS))
        boundaries = torch.tensor([0, 1, 2, 3, 4], device=device)
        names = ("entropy", "logsumexp", "mean_logit", "is_top1", "log_sum_sq_probs")
        pairs = [make(3) for _ in range(4)]
        head = (make(4, 16).bfloat16(), make(7, 16).bfloat16(), labels)
        groups = torch.tensor([0, 1, 1], device=device)
        group = dr.Group(num_groups=2, step_size=0.1)
        yield dr.robust_risk(make(3).double(), "cvar:0.5")
        yield dr.robust_risk(make(3), group, groups=groups)
        yield dr.token_logprobs(make(4, 7), labels, outputs=names)
        yield dr.linear_token_logprobs(*head, outputs=names)
        yield dr.linear_token_logprobs(*head, bias=make(7), memory_budget=0, outputs=names)
        yield (dr.sequence_logprobs(make(4), labels, cu_seqlens=boundaries),)
        yield dr.preference_loss(*pairs, ambiguity="kl:0.1")
        yield dr.reward_loss(*pairs[:2], ambiguity="chi2:0.1")
        yield dr.linear_preference_loss(*head, make(4), cu_seqlens=boundaries)
        out = dr.policy_loss(
            make(4), make(4), make(4), make(4), prompts, cu_seqlens=boundaries, num_prompts=2
        )
        yield (*out[:-1], *out[-1])

    for here, there in zip(results("cpu"), results("meta"), strict=True):
        assert [(x.shape, x.dtype) for x in here] == [(x.shape, x.dtype) for x in there]
        assert all(x.is_meta for x in there)


class _Seen(TorchDispatchMode):
    """The names of all ops that run within."""

    def __enter__(self):
        self.names = set()
        return super().__enter__()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("learns", [True, False])
def test_a_mode_sees_the_op(learns):
    """What looks at ops, or puts others in their place, knows the library's ops by their names."""
    table = torch.randn(3, 2, requires_grad=learns)
    with _Seen() as seen:
        dr.worst_view(table)
    assert "drrlhf.row_worst_case.default" in seen.names
