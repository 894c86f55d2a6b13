"""`preference_loss`: every loss type by TRL's own lines of mathematics, gradients, traps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from three_ways import BACKENDS

import drrlhf as dr
from drrlhf import backends
from drrlhf.reference.pair_losses import F_DIVERGENCES, PAIR_LOSSES

CASES = [
    (name, divergence)
    for name, loss in PAIR_LOSSES.items()
    for divergence in (F_DIVERGENCES if loss.divergences else ("reverse_kl",))
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with backends.use(request.param):
        yield request.param


def arguments(loss_type, n=7, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    logps = [(-5 * torch.rand(n, generator=g, dtype=torch.float64) - 1).to(dtype) for _ in range(4)]
    if loss_type == "simpo":
        logps[2:] = [None, None]
    lengths = [torch.randint(1, 9, (n,), generator=g) for _ in range(2)]
    options = {"chosen_lengths": lengths[0], "rejected_lengths": lengths[1], "loss_type": loss_type}
    if PAIR_LOSSES[loss_type].smoothing:
        options["label_smoothing"] = 0.2
    return logps, options


@pytest.mark.mathematics
def test_sigmoid_by_hand(backend):
    c, r = torch.tensor([-1.0, -2.0]), torch.tensor([-3.0, -2.5])
    rc, rr = torch.tensor([-1.5, -1.0]), torch.tensor([-2.0, -2.0])
    out = dr.preference_loss(c, r, rc, rr, beta=0.5, label_smoothing=0.1)
    h = 0.5 * ((c - rc) - (r - rr))
    expected = -0.9 * F.logsigmoid(h) - 0.1 * F.logsigmoid(-h)
    torch.testing.assert_close(out.losses, expected)
    torch.testing.assert_close(out.loss, expected.mean())
    torch.testing.assert_close(out.chosen_rewards, 0.5 * (c - rc))
    torch.testing.assert_close(out.rejected_rewards, 0.5 * (r - rr))
    assert not out.losses.requires_grad


@pytest.mark.mathematics
def test_simpo_by_hand(backend):
    c, r = torch.tensor([-4.0]), torch.tensor([-9.0])
    lengths = {"chosen_lengths": torch.tensor([2]), "rejected_lengths": torch.tensor([3])}
    out = dr.preference_loss(c, r, loss_type="simpo", beta=2.0, simpo_gamma=0.3, **lengths)
    torch.testing.assert_close(out.loss.item(), math.log1p(math.exp(-(2 * (-2 + 3) - 0.3))))


@pytest.mark.mathematics
@pytest.mark.parametrize("loss_type,f_divergence", CASES)
def test_op_equals_definition_with_gradients(backend, loss_type, f_divergence):
    """The op's closed-form derivatives against autograd through the definition."""
    for seed, size in enumerate((1.0, 30.0)):
        logps, options = arguments(loss_type, seed=seed)
        logps = [None if x is None else (size * x).requires_grad_() for x in logps]
        options |= {"f_divergence": f_divergence, "beta": 0.3}
        expected = dr.pair_losses(*logps, **options)
        q = torch.linspace(0.1, 1, len(expected), dtype=torch.float64)
        inputs = [x for x in logps if x is not None]
        grads = torch.autograd.grad((expected * q / q.sum()).sum(), inputs)
        out = dr.preference_loss(*logps, **options, nominal=q)
        torch.testing.assert_close(out.losses, expected.detach(), rtol=1e-9, atol=1e-12)
        for ours, theirs in zip(torch.autograd.grad(out.loss, inputs), grads):
            torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.mathematics
@pytest.mark.parametrize("loss_type,f_divergence", CASES)
def test_gradcheck(backend, loss_type, f_divergence):
    logps, options = arguments(loss_type)
    inputs = tuple(x.requires_grad_() for x in logps if x is not None)
    refs = [None, None] if len(inputs) == 2 else []
    assert torch.autograd.gradcheck(
        lambda *x: (
            dr.preference_loss(
                *x, *refs, **options, f_divergence=f_divergence, ambiguity="kl:0.2"
            ).loss
        ),
        inputs,
    )


@pytest.mark.mathematics
@pytest.mark.parametrize("ambiguity", ["tv:0.3", "cvar:0.4", "kl:0.2", "group:2"])
def test_equals_losses_then_robust_risk(backend, ambiguity):
    logps, options = arguments("sigmoid", n=12)
    logps = [x.requires_grad_() for x in logps]
    extra = {"groups": torch.arange(12) % 2, "nominal": torch.rand(12, dtype=torch.float64)}
    risk = dr.robust_risk(dr.pair_losses(*logps, **options), ambiguity, **extra)
    out = dr.preference_loss(*logps, **options, ambiguity=ambiguity, **extra)
    torch.testing.assert_close(out.loss, risk.value)
    torch.testing.assert_close(out.weights, risk.weights)
    torch.testing.assert_close(out.dual, risk.dual)
    for a, b in zip(*(torch.autograd.grad(x, logps) for x in (out.loss, risk.value))):
        torch.testing.assert_close(a, b)


@pytest.mark.mathematics
def test_upstream_gradient_is_applied_and_graph_can_be_kept(backend):
    logps, options = arguments("sigmoid")
    chosen = logps[0].requires_grad_()
    loss = dr.preference_loss(*logps, **options, ambiguity="tv:0.2").loss
    (first,) = torch.autograd.grad(loss, chosen, torch.tensor(-2.5).double(), retain_graph=True)
    (again,) = torch.autograd.grad(loss, chosen, torch.tensor(-2.5).double(), retain_graph=True)
    (unit,) = torch.autograd.grad(loss, chosen)
    assert torch.equal(first, again)
    torch.testing.assert_close(first, -2.5 * unit)


@pytest.mark.mathematics
def test_weights_are_not_differentiated_through(backend):
    """A softmax weight that is not detached gives easy pairs a negative weight."""
    logps, options = arguments("sigmoid", n=30)
    chosen = logps[0].requires_grad_()
    for ambiguity in ("kl:temperature=0.05", "kl:1.0"):
        out = dr.preference_loss(*logps, **options | {"label_smoothing": 0}, ambiguity=ambiguity)
        (grad,) = torch.autograd.grad(out.loss, chosen)
        assert (out.weights >= 0).all() and (grad <= 0).all()


@pytest.mark.mathematics
def test_second_derivatives_are_those_of_the_weighted_losses(backend):
    """The weights are constants there too."""
    logps, options = arguments("sigmoid")
    chosen = logps[0].requires_grad_()
    out = dr.preference_loss(*logps, **options, ambiguity="kl:0.3")
    losses = dr.pair_losses(*logps, **options)
    found = []
    for loss in (out.loss, (out.weights * losses).sum()):
        (grad,) = torch.autograd.grad(loss, chosen, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), chosen)[0])
    assert found[0].abs().min() > 0
    torch.testing.assert_close(*found)


@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_accurate_than_plain_pytorch(backend, dtype):
    logps, options = arguments("sigmoid", n=257)
    exact = [x.to(dtype).double().requires_grad_() for x in logps]
    truth = dr.pair_losses(*exact, **options)
    truth_grad = torch.autograd.grad(truth.mean(), exact)[0]
    plain = [x.to(dtype).requires_grad_() for x in logps]
    theirs = dr.pair_losses(*plain, **options)
    theirs_grad = torch.autograd.grad(theirs.mean(), plain)[0]
    ours = [x.to(dtype).requires_grad_() for x in logps]
    out = dr.preference_loss(*ours, **options)
    out_grad = torch.autograd.grad(out.loss, ours)[0]
    assert out_grad.dtype == dtype and out.losses.dtype == torch.float32

    def rms(x, y):
        return (x.double() - y.double()).square().mean().sqrt().item()

    assert rms(out.losses, truth) <= 2 * rms(theirs, truth)
    assert rms(out_grad, truth_grad) <= 2 * rms(theirs_grad, truth_grad) + 1e-12


@pytest.mark.mathematics
def test_robust_dpo_losses_may_be_negative(backend):
    """rDPO's loss goes below 0; solvers that assume l >= 0 break on it."""
    logps, options = arguments("robust", n=50)
    logps[0] = logps[0] + 60
    out = dr.preference_loss(*logps, **options, ambiguity="chi2:0.5")
    assert out.losses.min() < 0
    risk = dr.robust_risk(out.losses, "chi2:0.5")
    torch.testing.assert_close(out.weights, risk.weights)


@pytest.mark.mathematics
@pytest.mark.parametrize("n", [0, 1])
def test_smallest_batches(backend, n):
    c = torch.randn(n, requires_grad=True)
    z = torch.zeros(n)
    for ambiguity in ("erm", "tv:0.2", "kl:0.5", "chi2:1", "cvar:0.2", "group:2"):
        groups = torch.zeros(n, dtype=torch.long)
        out = dr.preference_loss(c, z, z, z, ambiguity=ambiguity, groups=groups)
        (grad,) = torch.autograd.grad(out.loss, c)
        assert grad.shape == (n,)
        expected = -F.logsigmoid(0.1 * c).detach().sum()
        torch.testing.assert_close(out.loss.detach(), expected)


@pytest.mark.mathematics
def test_masked_nan_pair_contributes_nothing(backend):
    c = torch.tensor([1.0, math.nan, 0.5], requires_grad=True)
    z = torch.zeros(3)
    out = dr.preference_loss(c, z, z, z, nominal=torch.tensor([1.0, 0, 1]), ambiguity="tv:0.1")
    (grad,) = torch.autograd.grad(out.loss, c)
    assert torch.isfinite(out.loss) and grad[1] == 0 and torch.isfinite(grad).all()


@pytest.mark.mathematics
def test_zero_weight_pairs_get_exactly_zero_gradient(backend):
    c = torch.tensor([9.0, -4.0, 3.0, 1.0], requires_grad=True)
    z = torch.zeros(4)
    out = dr.preference_loss(c, z, z, z, ambiguity="cvar:0.25")
    (grad,) = torch.autograd.grad(out.loss, c)
    assert (grad != 0).tolist() == [False, True, False, False]


N3, Z3 = torch.randn(3), torch.zeros(3)
BAD_CALLS = [
    (lambda: dr.preference_loss(N3, torch.randn(4), Z3, Z3), r"rejected_logps: .*\(3,\).*\(4,\)"),
    (lambda: dr.preference_loss(N3.view(3, 1), N3, Z3, Z3), "chosen_logps: expected shape"),
    (lambda: dr.preference_loss(N3.long(), N3, Z3, Z3), "chosen_logps: expected a floating"),
    (lambda: dr.preference_loss(N3, N3), "sigmoid needs both"),
    (lambda: dr.preference_loss(N3, N3, Z3), "got one"),
    (lambda: dr.preference_loss(N3, N3, Z3, Z3, loss_type="sigmiod"), "did you mean 'sigmoid'"),
    (lambda: dr.preference_loss(N3, N3, Z3, Z3, loss_type="ipo"), "ipo divides by the number"),
    (
        lambda: dr.preference_loss(N3, N3, Z3, Z3, loss_type="hinge", label_smoothing=0.1),
        "takes no",
    ),
    (lambda: dr.preference_loss(N3, N3, Z3, Z3, label_smoothing=0.5), r"\[0, 0.5\)"),
    (lambda: dr.preference_loss(N3, N3, Z3, Z3, loss_type="exo_pair"), r"\(0, 1\)"),
    (lambda: dr.preference_loss(N3, N3, Z3, Z3, beta=0.0), "beta: expected a number > 0"),
    (
        lambda: dr.preference_loss(N3, N3, Z3, Z3, loss_type="apo_zero", f_divergence="forward_kl"),
        "holds only for losses of the reward difference",
    ),
    (lambda: dr.preference_loss(N3, N3, Z3, Z3, loss_type="simpo"), "simpo has no reference"),
    (
        lambda: dr.preference_loss(N3 * math.nan, N3, Z3, Z3, check_finite=True),
        "losses: expected finite",
    ),
]


@pytest.mark.parametrize("call,message", BAD_CALLS)
def test_bad_input(backend, call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.usual
def test_compiles(backend):
    torch._dynamo.reset()
    logps, options = arguments("ipo", n=5)
    logps = [x.requires_grad_() for x in logps]

    def step(*x):
        return dr.preference_loss(*x, **options, ambiguity="cvar:0.4").loss

    ours = torch.compile(step, fullgraph=True, backend="aot_eager")(*logps)
    eager = step(*logps)
    torch.testing.assert_close(ours, eager)
    for a, b in zip(torch.autograd.grad(ours, logps), torch.autograd.grad(eager, logps)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ("loss_type", "smoothing", "limit"),
    [("sigmoid", 0, 0), ("hinge", 0, 0), ("discopop", 0, 0), ("exo_pair", 0.1, -math.log(0.9))],
)
def test_a_rejected_answer_far_below_the_reference_has_no_gradient_under_forward_kl(
    loss_type, smoothing, limit
):
    """exp(120) is beyond float32: the pair's loss is at its limit and its derivatives are 0, not
    NaN; the other pair's are those that it has alone."""
    zeros = torch.zeros(2)
    options = {"loss_type": loss_type, "f_divergence": "forward_kl", "beta": 0.1}
    options["label_smoothing"] = smoothing
    chosen = torch.tensor([1.0, 1.0], requires_grad=True)
    rejected = torch.tensor([-120.0, -1.0], requires_grad=True)
    out = dr.preference_loss(chosen, rejected, zeros, zeros, **options)
    out.loss.backward()
    alone = [torch.tensor([x], requires_grad=True) for x in (1.0, -1.0)]
    dr.preference_loss(*alone, zeros[:1], zeros[:1], **options).loss.backward()
    assert out.losses[0].item() == pytest.approx(limit)
    assert chosen.grad[0] == rejected.grad[0] == 0
    assert chosen.grad[1].item() == pytest.approx(alone[0].grad.item() / 2)
    assert rejected.grad[1].item() == pytest.approx(alone[1].grad.item() / 2)
