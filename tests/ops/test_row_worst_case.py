"""`worst_view` and `robust_reward`: rows against a convex solver, gradients, what is masked."""

from __future__ import annotations

import importlib
import math

import numpy as np
import pytest
import torch
from three_ways import BACKENDS, SLOW, assert_refused

import drrlhf as dr
from drrlhf import backends
from drrlhf.functional.worst_view import worst_views

SETS = (
    "max",
    "mean",
    "kl:temperature=0.3",
    "kl:temperature=5",
    "cvar:0.4",
    "cvar:1",
    "tv:0.3",
    "tv:0",
)
ROWS, VIEWS = 250, 5


def problems(seed, ties=False):
    """Losses, and which of them count: at least one of each row."""
    draw = np.random.default_rng(seed)
    losses = draw.normal(size=(ROWS, VIEWS)) * draw.choice([0.1, 1.0, 10.0], size=(ROWS, 1))
    if ties:
        losses = losses.round()
    mask = draw.random((ROWS, VIEWS)) < 0.7
    mask[np.arange(ROWS), draw.integers(VIEWS, size=ROWS)] = True
    return losses, mask


def solved(losses, p, text):
    """The worst case of every row by a convex solver, all rows in one problem."""
    cp = pytest.importorskip("cvxpy")  # a machine that lends its GPU may have none
    name, _, number = text.rpartition(":")
    name, number = (name, float(number.split("=")[-1])) if name else (text, 0.0)
    q = cp.Variable(losses.shape, nonneg=True)
    gain = cp.sum(cp.multiply(q, losses), axis=1)
    # What does not count has no weight.
    limits = [cp.sum(q, axis=1) == 1, cp.multiply(q, p == 0) == 0]
    if name == "mean":
        limits.append(q == p)
    elif name == "cvar":
        limits.append(q <= p / number)
    elif name == "tv":
        limits.append(cp.sum(cp.abs(q - p), axis=1) <= 2 * number)
    elif name == "kl":
        kept = np.where(p > 0, p, 1.0)
        gain = gain - number * cp.sum(cp.kl_div(q, kept) + q - kept, axis=1)
    cp.Problem(cp.Maximize(cp.sum(gain)), limits).solve(solver=cp.CLARABEL)
    return gain.value


def close(a, b, sizes):
    assert np.all(np.abs(a - b) <= 2e-6 * np.maximum(1.0, sizes))


@pytest.mark.mathematics
@pytest.mark.parametrize("text", SETS)
@pytest.mark.parametrize("ties", [False, True])
def test_views_equal_a_convex_solver(text, ties):
    losses, mask = problems(0, ties)
    p = mask / mask.sum(1, keepdims=True)
    found = worst_views(torch.tensor(losses), text, torch.tensor(mask))
    sizes = np.abs(losses).max(1)
    if text.startswith("kl"):  # it subtracts q log(q / p) + p - q of what counts: sums of 1 cancel
        sizes = sizes + 1
    close(found.values.cpu().numpy(), solved(losses, p, text), sizes)
    weights = found.weights.cpu().numpy()
    assert np.all(weights[~mask] == 0) and np.allclose(weights.sum(1), 1)
    torch.testing.assert_close(
        dr.worst_view(torch.tensor(losses), text, torch.tensor(mask)), found.values
    )


@pytest.mark.mathematics
@pytest.mark.parametrize("text", ["min", *SETS[1:]])
def test_rewards_equal_a_convex_solver(text):
    rewards, mask = problems(1)
    nominal = np.random.default_rng(2).uniform(0.1, 3.0, size=VIEWS)
    w = np.where(mask, nominal, 0.0)
    held = w.sum(1)
    # Only TRL's own sum loses the weight of who did not score.
    total = held if text == "mean" else np.full(ROWS, nominal.sum())
    expected = -total * solved(-rewards, w / held[:, None], "max" if text == "min" else text)
    given = torch.tensor(np.where(mask, rewards, np.nan))
    found = dr.robust_reward(given, text, torch.tensor(nominal)).cpu().numpy()
    close(found, expected, total * (1 + np.abs(rewards).max(1)))


@pytest.mark.mathematics
def test_the_mean_is_trls_reward_and_uwo_takes_the_spread_off():
    rewards = torch.tensor([[1.0, 2.0, math.nan], [0.5, -1.0, 4.0]])
    weights = torch.tensor([1.0, 2.0, 0.5])
    mean = dr.robust_reward(rewards, "mean", weights)
    torch.testing.assert_close(mean, (rewards * weights).nansum(1))
    p = weights / weights.sum()
    spread = (p * (rewards[1] - (p * rewards[1]).sum()) ** 2).sum()
    found = dr.robust_reward(rewards, "uwo:0.7", weights)
    torch.testing.assert_close(found[1], mean[1] - weights.sum() * 0.7 * spread)
    torch.testing.assert_close(dr.robust_reward(rewards, "uwo:0", weights)[1], mean[1])
    # Without the third the mean is 5/3, and it has the weight of all.
    torch.testing.assert_close(
        dr.robust_reward(rewards, "uwo:0", weights)[0], torch.tensor(3.5 * 5 / 3)
    )


@pytest.mark.parametrize("text", ["min", "tv:1", "cvar:0.3", "kl:temperature=1e-3"])
def test_equal_worst_rewards_are_equal_whoever_scored(text):
    rewards = torch.tensor([[6, math.nan, -6], [6, 1, -6], [math.nan, math.nan, -6]])
    found = dr.robust_reward(rewards, text)
    torch.testing.assert_close(found, torch.full((3,), -18.0), rtol=0, atol=4e-3)


@pytest.mark.parametrize("text", ["min", "mean", "tv:0.3", "uwo:0.5"])
@pytest.mark.parametrize("bad", [-1.0, math.nan, math.inf])
def test_what_is_no_weight_is_nan_where_nothing_refuses_it(monkeypatch, text, bad):
    """A GPU does not read the values; left out, such a weight changed the reward silently."""
    module = importlib.import_module("drrlhf.functional.robust_reward")
    monkeypatch.setattr(module, "check_none", lambda *_: None)
    found = dr.robust_reward(torch.ones(2, 3), text, torch.tensor([1.0, bad, 2.0]))
    assert found.isnan().all()


@pytest.mark.mathematics
@pytest.mark.parametrize("text", SETS)
@pytest.mark.parametrize("ties", [False, True])
def test_reductions_of_pytorch_are_the_closed_forms(text, ties):
    """Where one does it, with a mask and without."""
    losses, mask = (torch.tensor(x) for x in problems(5, ties))
    mask[3] = False
    for some in (None, mask):
        x = losses.clone().requires_grad_()
        values, expected = dr.worst_view(x, text, some), worst_views(losses, text, some)
        torch.testing.assert_close(values, expected.values)
        values.sum().backward()
        torch.testing.assert_close(x.grad, expected.weights)


@pytest.mark.mathematics
@pytest.mark.parametrize("text", SETS)
def test_gradients_are_the_weights(text):
    losses, mask = (torch.tensor(x[:20]) for x in problems(3))
    x = losses.clone().requires_grad_()
    values = dr.worst_view(x, text, mask)
    upstream = torch.linspace(-1.0, 2.0, 20, dtype=torch.float64)
    values.backward(upstream)
    torch.testing.assert_close(x.grad, upstream[:, None] * worst_views(losses, text, mask).weights)
    # Away from ties the worst case is smooth.
    assert torch.autograd.gradcheck(lambda x: dr.worst_view(x, text, mask), losses.requires_grad_())


@pytest.mark.parametrize("text", SETS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_masked_never_matters(text, bad):
    losses = torch.tensor([[1.0, bad, 3.0], [bad, bad, bad], [2.0, 0.0, bad]], requires_grad=True)
    mask = torch.tensor([[True, False, True], [False] * 3, [True, True, False]])
    found = worst_views(losses, text, mask)
    rest = [worst_views(torch.tensor([row]), text) for row in ([1.0, 3.0], [2.0, 0.0])]
    torch.testing.assert_close(found.values[[0, 2]], torch.cat([r.values for r in rest]))
    assert found.values[1] == 0 and (found.weights[1] == 0).all()
    (gradient,) = torch.autograd.grad(found.values.sum(), losses)
    assert (gradient[~mask] == 0).all() and gradient[mask].isfinite().all()


@pytest.mark.parametrize("text", SETS)
def test_nan_that_counts_is_never_hidden(text):
    losses = torch.tensor([[1.0, math.nan], [1.0, 2.0]])
    found = dr.worst_view(losses, text)
    assert found[0].isnan() and found[1].isfinite()


@pytest.mark.parametrize("text", SETS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_one_view_and_no_pair(text, dtype):
    one = torch.tensor([[1.5], [-2.0]], dtype=dtype)
    found = dr.worst_view(one, text)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(found, one[:, 0].to(found.dtype))
    assert dr.worst_view(torch.zeros(0, 3, dtype=dtype), text).shape == (0,)
    assert torch.equal(
        dr.worst_view(torch.zeros(2, 0, dtype=dtype), text), torch.zeros(2).to(found)
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_shares_that_are_no_binary_fraction_leave_nothing_behind(backend):
    """The worst m of K losses are 1 to m, and the others -inf: of which 1e-17 would be seen."""
    if "row_worst_case" not in backends.SERVED[backend]:
        pytest.skip(f"{backend} leaves row_worst_case to others")
    for width in (10, 13) if SLOW else range(2, 30):
        for m in range(1, width):
            table = torch.arange(1.0, width + 1).unsqueeze(0)
            table[:, m:] = -math.inf
            with backends.use(backend):
                worst = dr.worst_view(table, dr.CVaR(m / width)).item()
                moved = dr.worst_view(table, dr.TV((width - m) / width)).item()
            assert worst == pytest.approx((m + 1) / 2), (m, width)
            mean = (m * (m + 1) / 2 + (width - m) * m) / width
            assert moved == pytest.approx(mean), (m, width)


def test_an_infinite_view_is_the_worst():
    losses = torch.tensor([[1.0, math.inf], [-math.inf, 2.0], [-math.inf, -math.inf]])
    found = worst_views(losses)
    assert found.values.tolist() == [math.inf, 2.0, -math.inf]
    assert found.weights.tolist() == [[0, 1], [0, 1], [0.5, 0.5]]


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: dr.worst_view(x[0]), r"losses: expected shape \(n, K\).*got \(3,\)"),
        (lambda x: dr.worst_view(x.long()), "losses: expected a floating"),
        (lambda x: dr.worst_view(x, "chi2:0.1"), "ambiguity: expected 'max'.*got 'chi2:0.1'"),
        (lambda x: dr.worst_view(x, "cvar:0.5,trim=0.1"), "without trim"),
        (lambda x: dr.worst_view(x, "cvar:0.5,temperature=1"), "no closed form"),
        (lambda x: dr.worst_view(x, "maxx"), "ambiguity: unknown ambiguity 'maxx'"),
        (lambda x: dr.worst_view(x, dr.TV(0.1, trim=0.1)), "without trim"),
        (lambda x: dr.worst_view(x, "kl:temperature=1,momentum=0.9"), "without trim or momentum"),
        (
            lambda x: dr.robust_reward(x, dr.KL(temperature=1, momentum=0)),
            "ambiguity: expected 'min'.*without trim or momentum",
        ),
        # The worst of losses and the worst of rewards are not each other.
        (lambda x: dr.worst_view(x, "min"), "ambiguity: expected 'max'.*got 'min'"),
        (lambda x: dr.robust_reward(x, "max"), "ambiguity: expected 'min'.*got 'max'"),
        (lambda x: dr.robust_reward(x, dr.ChiSquare(radius=1)), "ambiguity: expected 'min'"),
        (lambda x: dr.worst_view(x, mask=x), r"mask: expected bool of shape \(2, 3\)"),
        (lambda x: dr.robust_reward(x, weights=x[0][:2]), r"weights: expected shape \(3,\)"),
        (lambda x: dr.robust_reward(x, weights=-x[0]), "weights: expected numbers >= 0"),
        (lambda x: dr.robust_reward(x, "uwo:-1"), "finite c >= 0"),
        (lambda x: dr.robust_reward(x, "uwo"), "finite c >= 0"),
        (lambda x: dr.robust_reward(x[0]), r"rewards: expected shape \(n, K\)"),
    ],
)
def test_wrong_arguments(call, message):
    assert_refused(lambda: call(torch.ones(2, 3)), message, "reference")


@pytest.mark.parametrize("one", [dr.TV(radius=0.3), dr.CVaR(alpha=0.4), dr.KL(temperature=0.5)])
def test_a_set_is_what_its_string_names(one):
    table = torch.tensor(problems(5)[0])
    assert torch.equal(dr.worst_view(table, one), dr.worst_view(table, str(one)))
    assert torch.equal(dr.robust_reward(table, one), dr.robust_reward(table, str(one)))


@pytest.mark.parametrize("text", ["min", *SETS[1:], "uwo:0.5"])
@pytest.mark.parametrize("bad", [math.inf, -math.inf])
def test_a_reward_without_weight_never_matters(text, bad):
    rewards = torch.tensor([[1.0, 2.0, bad], [0.5, math.nan, bad]], requires_grad=True)
    kept = rewards.detach()[:, :2].clone().requires_grad_()
    weights = torch.tensor([1.0, 3.0, 0.0])
    found, expected = (
        dr.robust_reward(rewards, text, weights),
        dr.robust_reward(kept, text, weights[:2]),
    )
    torch.testing.assert_close(found, expected)
    (ours,) = torch.autograd.grad(found.sum(), rewards)
    (theirs,) = torch.autograd.grad(expected.sum(), kept)
    assert torch.isfinite(found).all() and torch.equal(ours[:, :2], theirs)
    assert not ours[:, 2].any()


def test_autocast_does_not_round_the_sum_of_weights():
    rewards = torch.ones(3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        found = dr.robust_reward(rewards, "mean", torch.tensor([0.7, 1.003]))
    torch.testing.assert_close(found, torch.full((3,), 1.703))


def test_completions_that_nothing_scored():
    rewards = torch.tensor([[math.nan, math.nan], [1.0, math.nan]])
    assert dr.robust_reward(rewards).isnan().tolist() == [True, False]
    assert dr.robust_reward(rewards, weights=torch.tensor([0.0, 1.0])).isnan().all()


def test_views_compile():
    losses, mask = (torch.tensor(x[:8]) for x in problems(4))
    for text in ("max", "kl:temperature=1", "cvar:0.4", dr.CVaR(alpha=0.4)):
        step = torch.compile(
            lambda x, text=text: dr.worst_view(x, text, mask).sum(),
            fullgraph=True,
            backend="aot_eager",
        )
        torch.testing.assert_close(step(losses), dr.worst_view(losses, text, mask).sum())


@pytest.mark.mathematics
@pytest.mark.parametrize("temperature", [1e3, 1e9, 1e15, -1e12])
def test_a_temperature_far_beyond_the_losses_is_the_mean(temperature):
    losses = torch.tensor([[0.0, 1.0, 2.0], [5.0, 5.0, 6.5]], dtype=torch.float64)
    # mean + variance / (2 t) + ...
    second = losses.var(1, correction=0) / (2 * temperature)
    found = dr.worst_view(losses, f"kl:temperature={temperature}")
    torch.testing.assert_close(found, losses.mean(1) + second, rtol=1e-12, atol=1 / temperature**2)


def test_the_second_derivative_is_refused_and_weights_are_constants():
    x = torch.randn(3, 4, dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(dr.worst_view(x, "kl:temperature=1").sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no double backward"):
        first.square().sum().backward()
    weights = torch.ones(4, dtype=torch.float64, requires_grad=True)
    found = dr.robust_reward(x, "min", weights)
    (gradient,) = torch.autograd.grad(found.sum(), weights, allow_unused=True)
    assert gradient is None
