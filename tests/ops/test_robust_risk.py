"""The worst case against independent convex solvers, its certificates, limits and traps."""

from __future__ import annotations

import math

import numpy as np
import pytest
import scipy.sparse as sp
import torch
from problems import Problem, random_problem, trimmed
from scipy.optimize import minimize_scalar
from three_ways import BACKENDS, SLOW, assert_refused

import drrlhf as dr
from drrlhf import backends

SETS = [
    "erm",
    "tv:0.1",
    "tv:0.7",
    "kl:0.1",
    "kl:2",
    "kl:temperature=0.3",
    "kl:temperature=-0.5",
    "chi2:0.5",
    "chi2:20",
    "chi2:penalty=0.7",
    "cvar:0.3",
    "cvar:0.3,temperature=0.4",
    "tv:0.2,trim=0.15",
    "kl:0.4,trim=0.3",
    "chi2:0.3,trim=0.07",
    "cvar:0.4,trim=0.25",
]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with backends.use(request.param):
        yield request.param


def solve(problem: Problem, ambiguity, dtype=torch.float64):
    losses, nominal = problem.tensors(dtype)
    return dr.robust_risk(losses, ambiguity, nominal=nominal)


# ------------------------------------------------------------------ against convex solvers

FAMILIES = ["kl", "kl_temperature", "tv", "chi2", "chi2_penalty", "cvar", "cvar_temperature"]


def draw_set(family: str, rng: np.random.Generator, span: float) -> dr.AmbiguitySet:
    """A set of the family with random parameters; penalties scale with the losses."""
    trim = float(rng.choice([0.0, 0.0, rng.uniform(0.01, 0.5)]))
    unit = 10 ** rng.uniform(-1.5, 1) * (span or 1.0)
    if family == "kl":
        return dr.KL(radius=10 ** rng.uniform(-3, 0.7), trim=trim)
    if family == "kl_temperature":
        return dr.KL(temperature=unit, trim=trim)
    if family == "tv":
        return dr.TV(radius=rng.uniform(0, 1), trim=trim)
    if family == "chi2":
        return dr.ChiSquare(radius=10 ** rng.uniform(-3, 1.5), trim=trim)
    if family == "chi2_penalty":
        return dr.ChiSquare(penalty=unit, trim=trim)
    if family == "cvar":
        return dr.CVaR(alpha=rng.uniform(0.01, 1), trim=trim)
    return dr.CVaR(alpha=rng.uniform(0.01, 1), temperature=unit, trim=trim)


def conic_values(family: str, problems: list, sets: list) -> np.ndarray:
    """The values of many problems by one conic solve: disjoint variables, summed objectives.

    Losses enter as (l - min) / span, which every set is equivariant to.
    """
    rows, p_all, d_all, spans, bottoms = [], [], [], [], []
    for k, (problem, ambiguity) in enumerate(zip(problems, sets)):
        p = trimmed(problem.p, problem.losses, ambiguity.trim)
        p, l = p[p > 0], problem.losses[p > 0]
        span = np.ptp(l) or np.abs(l).max() or 1.0
        rows += [k] * len(l)
        p_all.append(p)
        d_all.append((l - l.min()) / span)
        spans.append(span)
        bottoms.append(l.min())
    p, d = np.concatenate(p_all), np.concatenate(d_all)
    spans, bottoms = np.array(spans), np.array(bottoms)
    total = sp.csr_matrix((np.ones(len(rows)), (rows, range(len(rows)))))
    cp = pytest.importorskip("cvxpy")  # a machine that lends its GPU may have none
    ratio = cp.Variable(len(rows))  # q / p
    constraints = [total @ cp.multiply(p, ratio) == 1, ratio >= 0]
    gain, c = (p * d) @ ratio, np.zeros(len(sets))
    if family == "tv":
        radii = np.array([s.radius for s in sets])
        constraints.append(total @ cp.multiply(p, cp.abs(ratio - 1)) <= 2 * radii)
    elif family == "chi2_penalty":
        c = np.array([s.penalty for s in sets]) / spans
        gain = gain - cp.sum(cp.multiply(0.5 * c[rows] * p, cp.square(ratio - 1)))
    else:
        constraints.append(ratio <= 1 / np.array([s.alpha for s in sets])[rows])
    cp.Problem(cp.Maximize(gain), constraints).solve(solver=cp.CLARABEL)
    assert ratio.value is not None
    values = total @ (p * ratio.value * d) - 0.5 * c * (total @ (p * (ratio.value - 1) ** 2))
    return bottoms + spans * values


def log_mean_exp(z, p):
    """Of z that are at most 0, one of which is: scipy's own takes ten times as long."""
    return math.log((p * np.exp(z)).sum())


def scalar_value(problem: Problem, ambiguity) -> float:
    """The value as the minimum of the convex dual in one variable."""
    p = trimmed(problem.p, problem.losses, ambiguity.trim)
    l, p = problem.losses[p > 0], p[p > 0]
    span = np.ptp(l) or np.abs(l).max() or 1.0
    d, t = (l - l.max()) / span, (getattr(ambiguity, "temperature", None) or 0.0) / span
    if isinstance(ambiguity, dr.KL) and t:
        return l.max() + span * t * log_mean_exp(d / t, p)
    if isinstance(ambiguity, dr.KL):
        dual = lambda u: math.exp(u) * (ambiguity.radius + log_mean_exp(d / math.exp(u), p))  # noqa: E731
        best = minimize_scalar(dual, bounds=(-30, 15), method="bounded", options={"xatol": 1e-10})
        return l.max() + span * min(best.fun, 0.0)
    if isinstance(ambiguity, dr.ChiSquare):
        spread = 1 + 2 * ambiguity.radius
        dual = lambda eta: eta + math.sqrt(spread * (p * np.maximum(d - eta, 0) ** 2).sum())  # noqa: E731
        bounds = (-2 - 1 / math.sqrt(ambiguity.radius), 0)
        best = minimize_scalar(dual, bounds=bounds, method="bounded", options={"xatol": 1e-12})
        return l.max() + span * best.fun
    cap = -math.log(ambiguity.alpha)

    def dual(eta: float) -> float:
        z = np.minimum((d - eta) / t, cap)
        return eta - t + (p * np.exp(z) * (d - eta + t - t * z)).sum()

    # Not above eta = 0: the dual is convex there and its slope is positive.
    low = -1 - t * cap - 1
    best = minimize_scalar(dual, bounds=(low, 0), method="bounded", options={"xatol": 1e-12})
    return l.max() + span * best.fun


@pytest.mark.mathematics
@pytest.mark.parametrize("family", FAMILIES)
def test_value_equals_a_convex_solver(backend, family):
    """1000 random problems a set: 1e-6 relative in float64, 1e-5 in float32."""
    rng = np.random.default_rng(FAMILIES.index(family))
    for _ in range(1 if SLOW else 20):
        problems = [random_problem(rng) for _ in range(50)]
        sets = [draw_set(family, rng, float(np.ptp(p.losses[p.p > 0]))) for p in problems]
        if family in ("kl", "kl_temperature", "cvar_temperature", "chi2"):
            expected = [scalar_value(p, s) for p, s in zip(problems, sets)]
        else:
            expected = conic_values(family, problems, sets)
        for problem, ambiguity, value in zip(problems, sets, expected):
            size = np.abs(problem.losses[problem.p > 0]).max() or 1.0
            risk = solve(problem, ambiguity)
            assert abs(risk.value.item() - value) <= 1e-6 * size, (ambiguity, problem)
            assert abs(risk.weights.sum().item() - 1) <= 1e-6
            single = solve(problem, ambiguity, torch.float32)
            assert abs(single.value.item() - value) <= 1e-5 * size, ambiguity
            assert abs(single.weights.sum().item() - 1) <= 1e-6


# ------------------------------------------------------------------ certificates


def primal(ambiguity, q, l, p):
    """Objective at q, and by how much q leaves the set."""
    p = trimmed(p, l, ambiguity.trim)
    ratio = np.where(p > 0, q / np.where(p > 0, p, 1), 0)
    log_ratio = np.log(np.maximum(ratio, 1e-300))
    kl, chi = (q * log_ratio).sum(), 0.5 * (p * (ratio - 1) ** 2).sum()
    outside = q[p == 0].sum() if (p == 0).any() else 0.0
    gain = (q[p > 0] * l[p > 0]).sum()
    match ambiguity:
        case dr.KL(radius=None):
            gain -= ambiguity.temperature * kl
        case dr.KL():
            outside = max(outside, kl - ambiguity.radius)
        case dr.ChiSquare(radius=None):
            gain -= ambiguity.penalty * chi
        case dr.ChiSquare():
            outside = max(outside, (chi - ambiguity.radius) / (1 + ambiguity.radius))
        case dr.TV():
            outside = max(outside, 0.5 * np.abs(q - p).sum() - ambiguity.radius)
        case dr.CVaR():
            outside = max(outside, (ratio - 1 / ambiguity.alpha).max() * ambiguity.alpha)
            if ambiguity.temperature is not None:
                gain -= ambiguity.temperature * kl
    return gain, outside


def dual_objective(ambiguity, dual, l, p):
    """An upper bound on the value for every admissible `dual`; equal to it at the right one."""
    p = trimmed(p, l, ambiguity.trim)
    l, p = l[p > 0], p[p > 0]
    top, mean = l.max(), (p * l).sum()

    def log_mean_exp(t):
        return top + t * np.log((p * np.exp((l - top) / t)).sum())

    match ambiguity:
        case dr.ERM():
            return mean
        case dr.KL(radius=None):
            if dual > 0:
                return log_mean_exp(dual)
            return l.min() + dual * np.log((p * np.exp((l - l.min()) / dual)).sum())
        case dr.KL():
            return top if dual == 0 else dual * ambiguity.radius + log_mean_exp(dual)
        case dr.TV():
            above = np.maximum(l - dual, 0)
            return ambiguity.radius * (top - dual) + (p * above).sum() + dual
        case dr.ChiSquare(radius=None):
            w, c = np.maximum(l - dual, 0), ambiguity.penalty
            return dual + c / 2 + (p * w**2).sum() / (2 * c)
        case dr.ChiSquare():
            w = np.maximum(l - dual, 0)
            return dual + np.sqrt((1 + 2 * ambiguity.radius) * (p * w**2).sum())
        case dr.CVaR(temperature=None):
            return dual + (p * np.maximum(l - dual, 0)).sum() / ambiguity.alpha
        case dr.CVaR():
            t, cap = ambiguity.temperature, -math.log(ambiguity.alpha)
            x = (l - dual) / t
            z = np.minimum(x, cap)
            return dual - t + (p * np.exp(z) * (l - dual + t - t * z)).sum()
    raise AssertionError(ambiguity)


@pytest.mark.mathematics
@pytest.mark.parametrize("text", SETS)
def test_primal_equals_dual(backend, text):
    """q is feasible and reaches the value; the dual variable bounds the value from above."""
    rng = np.random.default_rng(7)
    ambiguity = dr.parse_ambiguity(text)
    for _ in range(20 if SLOW else 60):
        problem = random_problem(rng)
        l, p = problem.losses, problem.p
        if max(np.abs(l)) > 1e3 and "e=" in text:
            continue  # np.exp of the naive formulas above has no digits there
        risk = solve(problem, ambiguity)
        value, q, size = risk.value.item(), risk.weights.cpu().numpy(), np.abs(l).max() or 1.0
        gain, outside = primal(ambiguity, q, l, p)
        assert (q >= 0).all() and abs(q.sum() - 1) < 1e-12
        assert outside < 1e-9, (problem, q)
        assert abs(gain - value) <= 1e-9 * size
        if math.isfinite(risk.dual.item()):
            bound = dual_objective(ambiguity, risk.dual.item(), l, p)
            assert abs(bound - value) <= 1e-7 * size, (problem, risk)


# ------------------------------------------------------------------ gradients and symmetry


@pytest.mark.mathematics
@pytest.mark.parametrize("text", [*SETS, "group:3,step_size=0.4"])
def test_gradient_is_the_weights(backend, text):
    rng = np.random.default_rng(3)
    l = torch.tensor(rng.standard_normal(9), requires_grad=True)
    groups = torch.tensor([0, 1, 2] * 3)
    risk = dr.robust_risk(l, text, groups=groups)
    (3 * risk.value).backward()
    assert torch.equal(l.grad, 3 * risk.weights)
    assert not risk.weights.requires_grad and not risk.dual.requires_grad
    if "group" not in text:  # a group's own weights are stepped, not maximised
        assert torch.autograd.gradcheck(lambda x: dr.robust_risk(x, text).value, (l,), atol=1e-6)


@pytest.mark.mathematics
@pytest.mark.parametrize("text", [*SETS, "group:3,step_size=0.4"])
def test_permuting_the_batch_permutes_the_weights(backend, text):
    rng = np.random.default_rng(5)
    for problem in (random_problem(rng) for _ in range(20)):
        l, nominal = problem.tensors()
        n, order = len(l), torch.tensor(rng.permutation(len(l)))
        groups = torch.tensor(rng.integers(0, 3, n))
        one = dr.robust_risk(l, text, nominal=nominal, groups=groups)
        moved = None if nominal is None else nominal[order]
        two = dr.robust_risk(l[order], text, nominal=moved, groups=groups[order])
        torch.testing.assert_close(two.weights, one.weights[order], atol=1e-9, rtol=0)
        torch.testing.assert_close(two.value, one.value, atol=1e-9 * l.abs().max(), rtol=0)


@pytest.mark.mathematics
@pytest.mark.parametrize("text", SETS)
def test_ties_share_in_proportion_to_p(backend, text):
    l = torch.tensor([1.0, 2, 2, 2, 0, 0, 1], dtype=torch.float64)
    p = torch.tensor([1.0, 2, 1, 3, 1, 2, 2], dtype=torch.float64)
    q = dr.robust_risk(l, text, nominal=p).weights
    for level in l.unique():
        ratio = (q / p)[l == level]
        torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio), atol=1e-12, rtol=1e-9)


@pytest.mark.mathematics
@pytest.mark.parametrize("text", [s for s in SETS if "temperature" not in s and "pen" not in s])
@pytest.mark.parametrize("shift,scale", [(1e4, 1.0), (-1e4, 1.0), (0.0, 1e-6), (0.0, 1e4)])
def test_shift_and_scale(backend, text, shift, scale):
    l = torch.tensor([0.3, -1.2, 2.0, 0.1, 0.7], dtype=torch.float64)
    base, moved = dr.robust_risk(l, text), dr.robust_risk(l * scale + shift, text)
    torch.testing.assert_close(moved.weights, base.weights, atol=1e-7, rtol=0)
    torch.testing.assert_close(moved.value, base.value * scale + shift, atol=0, rtol=1e-6)


# ------------------------------------------------------------------ limits named in docstrings

L = torch.tensor([0.5, -1.0, 3.0, 0.2, 3.0, -7.0], dtype=torch.float64)
P = torch.tensor([1.0, 2.0, 0.5, 1.0, 1.0, 0.5], dtype=torch.float64) / 6
MEAN, MAX, MIN = (P * L).sum(), L.max(), L.min()
AT_TOP = P[L == MAX].sum().item()


@pytest.mark.mathematics
@pytest.mark.parametrize(
    "text,limit",
    [
        ("kl:0", MEAN),
        ("tv:0", MEAN),
        ("chi2:0", MEAN),
        ("cvar:1", MEAN),
        ("erm", MEAN),
        (f"kl:{-math.log(AT_TOP) + 1e-9}", MAX),
        ("kl:50", MAX),
        (f"tv:{1 - AT_TOP + 1e-9}", MAX),
        ("tv:1", MAX),
        (f"chi2:{(1 / AT_TOP - 1) / 2 + 1e-9}", MAX),
        ("chi2:1e6", MAX),
        (f"cvar:{AT_TOP - 1e-9}", MAX),
        ("cvar:1e-9", MAX),
        ("kl:temperature=1e9", MEAN),
        ("kl:temperature=1e-4", MAX),
        ("kl:temperature=-1e9", MEAN),
        ("kl:temperature=-1e-4", MIN),
        ("chi2:penalty=1e12", MEAN),
        ("chi2:penalty=1e-9", MAX),
        ("cvar:1,temperature=1e9", MEAN),
        ("cvar:0.4,temperature=1e10", MEAN),
        ("group:1", MEAN),
    ],
)
def test_limits(backend, text, limit):
    groups = torch.zeros(6, dtype=torch.long)
    risk = dr.robust_risk(L, text, nominal=P, groups=groups)
    tolerance = 2e-3 if "1e-4" in text else 1e-6
    torch.testing.assert_close(risk.value, limit, atol=tolerance, rtol=0)
    if limit is MAX and "temperature" not in text:
        expected = torch.where(L == MAX, P / AT_TOP, 0)
        torch.testing.assert_close(risk.weights, expected, atol=1e-6, rtol=0)


@pytest.mark.mathematics
def test_cvar_with_temperature_between_its_limits(backend):
    cold = dr.robust_risk(L, "cvar:0.4,temperature=1e-6", nominal=P)
    sharp = dr.robust_risk(L, "cvar:0.4", nominal=P)
    torch.testing.assert_close(cold.value, sharp.value, atol=2e-6, rtol=0)
    free = dr.robust_risk(L, "cvar:1e-12,temperature=0.8", nominal=P)
    soft = dr.robust_risk(L, "kl:temperature=0.8", nominal=P)
    torch.testing.assert_close(free.value, soft.value)
    torch.testing.assert_close(free.weights, soft.weights)


@pytest.mark.mathematics
@pytest.mark.parametrize("text", ["kl:temperature=1e10", "cvar:0.5,temperature=1e10"])
def test_large_temperatures_keep_their_digits(backend, text):
    """t log sum p exp(l/t) multiplies the rounding of the logarithm by t, unless it is log1p."""
    value = dr.robust_risk(L, text, nominal=P).value
    torch.testing.assert_close(value, MEAN, atol=1e-8, rtol=0)


@pytest.mark.mathematics
def test_optimistic_kl_gives_high_losses_less_weight(backend):
    q = dr.robust_risk(L, "kl:temperature=-1", nominal=P).weights / P
    order = torch.argsort(L)
    assert (q[order].diff() <= 1e-12).all() and q[order][0] > 1 > q[order][-1]


@pytest.mark.mathematics
def test_trim_is_fractional(backend):
    l = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=torch.float64)
    risk = dr.robust_risk(l, "erm:trim=0.3")  # all of the 4 and a fifth of the 3
    torch.testing.assert_close(risk.weights, torch.tensor([0.25, 0.25, 0.2, 0.0]).double() / 0.7)
    whole = dr.robust_risk(l, "tv:0.5,trim=0.25")  # nothing of the 4 is left to find
    assert whole.weights[3] == 0
    torch.testing.assert_close(whole.weights[:3], torch.tensor([0, 1, 5]).double() / 6)


@pytest.mark.mathematics
def test_trim_leaves_no_rounding_behind(backend):
    """k of n is what trim = k/n means, though k/n is not exact in binary: a loss of which 1e-17 is
    left would draw all that the TV adversary moves."""
    for n in (7, 10, 49, 100, 200, 331):
        l = torch.arange(n, dtype=torch.float64)
        for k in {1, n // 3, n // 2, n - 2}:
            q = dr.robust_risk(l, dr.TV(radius=0.2, trim=k / n)).weights
            assert (q[n - k :] == 0).all() and q[n - k - 1] > 0.2, (n, k)


# ------------------------------------------------------------------ masks, emptiness, non-finite


@pytest.mark.mathematics
@pytest.mark.parametrize("text", [*SETS, "group:2"])
def test_masked_entries_never_matter(backend, text):
    l = torch.tensor([0.5, math.nan, 2.0, -1.0, math.inf], dtype=torch.float64, requires_grad=True)
    p = torch.tensor([1.0, 0.0, 1.0, 2.0, 0.0], dtype=torch.float64)
    groups, keep = torch.tensor([0, 1, 0, 1, 1]), torch.tensor([0, 2, 3])
    risk = dr.robust_risk(l, text, nominal=p, groups=groups)
    alone = dr.robust_risk(l.detach()[keep], text, nominal=p[keep], groups=groups[keep])
    torch.testing.assert_close(risk.value.detach(), alone.value)
    torch.testing.assert_close(risk.weights[keep], alone.weights)
    risk.value.backward()
    assert (l.grad[[1, 4]] == 0).all()


@pytest.mark.mathematics
@pytest.mark.parametrize("text", [*SETS, "group:2"])
@pytest.mark.parametrize("n", [0, 3])
def test_nothing_unmasked_gives_zero_connected(backend, text, n):
    l = torch.full((n,), math.nan, requires_grad=True)
    state = dr.GroupState(2)
    groups = torch.zeros(n, dtype=torch.long)
    risk = dr.robust_risk(l, text, nominal=torch.zeros(n), groups=groups, group_state=state)
    assert risk.value.item() == 0.0 and (risk.weights == 0).all()
    risk.value.backward()
    assert l.grad.shape == (n,) and (l.grad == 0).all()
    assert torch.equal(state.weights, dr.GroupState(2).weights)


@pytest.mark.pairwise
@pytest.mark.parametrize("text", [*SETS, "group:2"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_non_finite_loss_is_seen(backend, text, bad):
    l = torch.tensor([0.5, bad, 2.0])
    groups, state = torch.tensor([0, 1, 0]), dr.GroupState(2)
    risk = dr.robust_risk(l, text, groups=groups, group_state=state)
    assert not torch.isfinite(risk.value) and torch.isnan(risk.weights).all()
    assert torch.equal(state.weights, dr.GroupState(2).weights)  # not poisoned for good
    with pytest.raises(ValueError, match="index 1"):
        dr.robust_risk(l, text, groups=groups, check_finite=True)


# Legal parameters beyond what float64 masses can tell apart, and the limit that they are.
NEXT_TO_ONE = 1 - 2.0**-53
EXTREME = [
    (dr.CVaR(1e-15), "largest"),
    (dr.CVaR(5e-324), "largest"),
    (dr.CVaR(0.3, trim=NEXT_TO_ONE), "smallest"),
    (dr.ERM(trim=1 - 1e-15), "smallest"),
    (dr.TV(0.1, trim=NEXT_TO_ONE), "smallest"),
    (dr.TV(NEXT_TO_ONE), "largest"),
    (dr.TV(1e-17), "all"),
    (dr.ChiSquare(radius=1e-17), "all"),
    (dr.ChiSquare(radius=1e-14), "all"),
    (dr.ChiSquare(radius=5e-324), "all"),
    (dr.KL(radius=5e-324), "all"),
]


@pytest.mark.parametrize("ambiguity, limit", EXTREME, ids=[f"{a}, {b}" for a, b in EXTREME])
@pytest.mark.parametrize("n", [1, 7, 300])
def test_extreme_parameters_are_their_limits(backend, ambiguity, limit, n):
    l = torch.randn(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    expected = torch.full_like(l, 1 / n)
    if limit != "all":
        expected = torch.zeros_like(l)
        expected[l.argmax() if limit == "largest" else l.argmin()] = 1
    risk = dr.robust_risk(l, ambiguity)
    torch.testing.assert_close(risk.weights, expected, rtol=1e-6, atol=1e-9)
    torch.testing.assert_close(risk.value, (expected * l).sum(), rtol=1e-6, atol=1e-6)


BEYOND_FLOAT32 = {
    "kl:1e-300": "mean",
    "kl:1e39": "max",
    "kl:temperature=3.41e38": "mean",
    "kl:temperature=1e300": "mean",
    "kl:temperature=-1e39": "mean",
    "kl:temperature=1e-300": "max",
    "chi2:1e39": "max",
    "chi2:penalty=1e300": "mean",
    "cvar:1,temperature=1e39": "mean",
}


@pytest.mark.parametrize("text, limit", BEYOND_FLOAT32.items())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_beyond_float32_are_limits_too(backend, text, limit, dtype):
    """A dual that no float32 holds is infinite, and no error."""
    losses = torch.tensor([1.0, 2.0, 4.0], dtype=dtype)
    out = dr.robust_risk(losses, text)
    torch.testing.assert_close(out.value, losses.mean() if limit == "mean" else losses.max())
    q = [1 / 3] * 3 if limit == "mean" else [0.0, 0.0, 1.0]
    torch.testing.assert_close(out.weights, torch.tensor(q, dtype=dtype))
    assert not out.dual.isnan()


@pytest.mark.parametrize("temperature", [1e-14, 1e-17, 1e-50, 5e-324])
def test_next_to_no_temperature_is_none(backend, temperature):
    """The worst half of three: the largest loss, and half of the next one."""
    for dtype in (torch.float32, torch.float64):
        losses = torch.tensor([1.0, 4.0, 2.0], dtype=dtype)
        out = dr.robust_risk(losses, dr.CVaR(alpha=0.5, temperature=temperature))
        torch.testing.assert_close(out.value, torch.tensor(10 / 3, dtype=dtype))
        torch.testing.assert_close(out.weights, torch.tensor([0.0, 2 / 3, 1 / 3], dtype=dtype))


@pytest.mark.mathematics
@pytest.mark.parametrize("radius", [1e-13, 1e-10, 1e-6])
def test_small_chi_square_balls_of_many_losses(backend, radius):
    """No weight reaches 0 there: the mean and sqrt(2 r) deviations."""
    l = torch.randn(20_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    risk = dr.robust_risk(l, dr.ChiSquare(radius=radius))
    above = math.sqrt(2 * radius) * l.std(correction=0)
    torch.testing.assert_close(risk.value - l.mean(), above, rtol=1e-3, atol=0)
    assert risk.weights.sum().item() == pytest.approx(1)


@pytest.mark.mathematics
@pytest.mark.parametrize("text", SETS)
@pytest.mark.parametrize("n", [1, 5])
def test_all_equal_losses(backend, text, n):
    for level in (0.0, 1e4, -1e4, 1e-6):
        risk = dr.robust_risk(torch.full((n,), level, dtype=torch.float64), text)
        assert abs(risk.value.item() - level) <= 1e-12 * max(1.0, abs(level))
        torch.testing.assert_close(risk.weights, torch.full((n,), 1 / n, dtype=torch.float64))


@pytest.mark.mathematics
@pytest.mark.parametrize("text", ["kl:temperature=1e-3", "cvar:0.3,temperature=1e-3", "kl:0.5"])
@pytest.mark.parametrize("sign", [1, -1])
def test_exponentials_do_not_underflow(backend, text, sign):
    """Every l/t below -104, where exp in float32 is 0: research code divides 0 by 0 there."""
    l = sign * torch.tensor([1000.0, 1000.0005, 1007.0, 999.0], dtype=torch.float64)
    risk = dr.robust_risk(l, text)
    assert torch.isfinite(risk.value) and abs(risk.weights.sum().item() - 1) < 1e-12
    assert l.min() <= risk.value <= l.max()


@pytest.mark.mathematics
@pytest.mark.parametrize("text", SETS)
def test_half_precision_losses(backend, text):
    l = torch.tensor([0.5, -1.0, 3.0, 0.25])
    exact = dr.robust_risk(l, text)
    for dtype in (torch.bfloat16, torch.float16):
        x = l.to(dtype).requires_grad_()
        risk = dr.robust_risk(x, text)
        assert risk.value.dtype == risk.weights.dtype == torch.float32
        torch.testing.assert_close(risk.weights, exact.weights)
        risk.value.backward()
        assert x.grad.dtype == dtype


# ------------------------------------------------------------------ groups


@pytest.mark.mathematics
def test_group_step_by_hand(backend):
    state = dr.GroupState(3)
    l, groups = torch.tensor([1.0, 3.0, 5.0], dtype=torch.float64), torch.tensor([0, 0, 2])
    risk = dr.robust_risk(l, dr.Group(3, step_size=0.5), groups=groups, group_state=state)
    a, b = math.exp(0.5 * 2), math.exp(0.5 * 5)
    w0, w2 = a / (a + b) * 2 / 3, b / (a + b) * 2 / 3
    torch.testing.assert_close(state.weights, torch.tensor([w0, 1 / 3, w2], dtype=torch.float64))
    assert state.weights[1].item() == 1 / 3  # absent: exactly as it was
    share = w0 / (w0 + w2)
    expected = torch.tensor([share / 2, share / 2, 1 - share], dtype=torch.float64)
    torch.testing.assert_close(risk.weights, expected)
    assert abs(state.weights.sum().item() - 1) < 1e-12


@pytest.mark.mathematics
def test_groups_are_weighed_after_trimming(backend):
    """The 9 goes first, with a third of the 5, and group means and masses are of what is left."""
    l, groups = torch.tensor([1.0, 2.0, 9.0, 5.0]).double(), torch.tensor([0, 0, 1, 1])
    p = torch.tensor([2.0, 4.0, 1.0, 3.0]).double()
    risk = dr.robust_risk(l, dr.Group(2, 0.5, trim=0.2), nominal=p, groups=groups)
    a, b = math.exp(0.5 * (2 * 1 + 4 * 2) / 6), math.exp(0.5 * 5)
    share = a / (a + b)
    expected = torch.tensor([share / 3, 2 * share / 3, 0, 1 - share]).double()
    torch.testing.assert_close(risk.weights, expected)


@pytest.mark.mathematics
def test_group_without_update_leaves_the_state(backend):
    state = dr.GroupState(2)
    state.weights.copy_(torch.tensor([0.2, 0.8], dtype=torch.float64))
    l, groups = torch.tensor([1.0, 2.0]), torch.tensor([0, 1])
    risk = dr.robust_risk(l, dr.Group(2, 5.0), groups=groups, group_state=state, update=False)
    torch.testing.assert_close(risk.weights, torch.tensor([0.2, 0.8]))
    assert state.weights.tolist() == [0.2, 0.8]


@pytest.mark.mathematics
def test_group_survives_huge_losses(backend):
    """exp(step_size * L) overflows long before the losses do; weights may not die either."""
    state = dr.GroupState(2)
    ambiguity, groups = dr.Group(2, step_size=1.0), torch.tensor([0, 1])
    for _ in range(5):
        dr.robust_risk(torch.tensor([1e4, -1e4]), ambiguity, groups=groups, group_state=state)
    assert torch.isfinite(state.weights).all() and (state.weights > 0).all()
    for _ in range(5):
        dr.robust_risk(torch.tensor([-1e4, 1e4]), ambiguity, groups=groups, group_state=state)
    assert state.weights[1] > 0.99


CASTS = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.to(torch.bfloat16),
    "float": lambda module: module.float(),
    "half and to another device": lambda module: module.to("cpu", torch.float16),
}


@pytest.mark.usual
@pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)
def test_casts_of_a_module_do_not_round_its_states(cast):
    module = torch.nn.ModuleList(
        [torch.nn.Linear(2, 2), dr.GroupState(3), dr.NormaliserState(), dr.GroupState(3)]
    )
    module[2].log_normaliser.fill_(1e300)
    rare = [1 - 1e-9, 1e-9, 0.0]  # float16 has no 1e-9: the group would be lost for good
    module[3].weights.copy_(torch.tensor(rare, dtype=torch.float64))
    assert cast(module)[0].weight.dtype != torch.float64
    assert module[1].weights.tolist() == [1 / 3, 1 / 3, 1 / 3]
    assert module[2].log_normaliser.item() == 1e300
    assert module[3].weights.tolist() == rare


@pytest.mark.usual
def test_states_follow_to_meta_and_to_empty():
    module = torch.nn.ModuleList([dr.GroupState(3), dr.NormaliserState()]).to("meta", torch.float16)
    for device in ("meta", "cpu"):
        module.to_empty(device=device)
        for buffer in module.buffers():
            assert (buffer.dtype, buffer.device.type) == (torch.float64, device)


# ------------------------------------------------------------------ bad input

X = torch.randn(3)
BAD_CALLS = [
    (lambda: dr.robust_risk(torch.randn(2, 2)), r"losses: expected shape \(n,\), got \(2, 2\)"),
    (lambda: dr.robust_risk([1.0]), "losses: expected a torch.Tensor"),
    (lambda: dr.robust_risk(torch.arange(3)), "losses: expected a floating dtype.*int64"),
    (lambda: dr.robust_risk(X, nominal=torch.ones(2)), r"nominal: expected shape \(3,\)"),
    (lambda: dr.robust_risk(X, nominal=torch.tensor([1.0, -1, 1])), "nominal.*-1.*index 1"),
    (lambda: dr.robust_risk(X, nominal=torch.tensor([1.0, 1, math.inf])), "nominal.*inf.*index 2"),
    (lambda: dr.robust_risk(X, "group:2"), "groups: group:2 needs the group id"),
    (lambda: dr.robust_risk(X, "group:2", groups=torch.tensor([0, 1, 2])), "got 2 at index 2"),
    (lambda: dr.robust_risk(X, "group:2", groups=torch.tensor([0, -1, 1])), "got -1 at index 1"),
    (lambda: dr.robust_risk(X, "group:2", groups=torch.ones(3)), "groups: expected an integer"),
    (
        lambda: dr.robust_risk(
            X, "group:2", groups=torch.tensor([0, 1, 1]), group_state=dr.GroupState(3)
        ),
        "group_state: expected 2 groups",
    ),
    (lambda: dr.robust_risk(X, "tvv:0.1"), "did you mean 'tv'"),
    (lambda: dr.GroupState(0), "num_groups"),
]


@pytest.mark.parametrize("call,message", BAD_CALLS)
def test_bad_input(backend, call, message):
    assert_refused(call, message, backend)


# ------------------------------------------------------------------ as a torch op


@pytest.mark.usual
@pytest.mark.parametrize("text", ["tv:0.2", "kl:0.3", "group:2"])
def test_compiles_without_graph_breaks(backend, text):
    torch._dynamo.reset()
    state = dr.GroupState(2)
    groups = torch.tensor([0, 1, 1, 0])

    def step(x):
        return dr.robust_risk(x.square(), text, groups=groups, group_state=state).value

    x = torch.randn(4, requires_grad=True)
    expected = dr.robust_risk(x.detach().square(), text, groups=groups)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    value = compiled(x)
    value.backward()
    torch.testing.assert_close(value.detach(), expected.value)
    torch.testing.assert_close(x.grad, 2 * x.detach() * expected.weights)
    if text.startswith("group"):
        assert not torch.equal(state.weights, dr.GroupState(2).weights)


@pytest.mark.usual
@pytest.mark.parametrize("encoded", [("tv", 0.2, 0.0, 0.0, True), ("group", 0.1, 0.0, 0.0, True)])
def test_opcheck(backend, encoded):
    losses = torch.randn(5, requires_grad=True)
    grouped = (torch.tensor([0, 1, 1, 0, 1]), torch.full((2,), 0.5, dtype=torch.float64))
    extra = grouped if encoded[0] == "group" else (None, None)
    arguments = (losses, torch.rand(5), *extra, *encoded)
    torch.library.opcheck(torch.ops.drrlhf.robust_risk.default, arguments)


@pytest.mark.usual
def test_many_entries(backend):
    """A million losses: the searches stay exact, whatever the scale and the ties."""
    g = torch.Generator().manual_seed(0)
    n = 50_000 if SLOW else 1_000_000
    l = torch.randn(n, generator=g, dtype=torch.float64).exp()
    for text in ("tv:0.1", "cvar:0.3"):
        risk = dr.robust_risk(l, text)
        ordered = l.sort(descending=True).values
        a = 0.3 if text.startswith("cvar") else 0.9
        tail = ordered[: round(a * len(l))].mean()
        expected = tail if text.startswith("cvar") else 0.1 * ordered[0] + 0.9 * tail
        torch.testing.assert_close(risk.value, expected, rtol=1e-9, atol=0)


@pytest.mark.skipif(BACKENDS == ["reference"], reason="the C++ extension is not built here")
@pytest.mark.parametrize("text", [*SETS, "cvar:0.3,temperature=1e-8", "group:3,step_size=0.4"])
def test_backends_agree_to_rounding(text):
    """Searching by reductions and sorting are two solutions: they meet at 1e-10 of the losses."""
    rng = np.random.default_rng(11)
    for problem in (random_problem(rng) for _ in range(6 if SLOW else 100)):
        l, nominal = problem.tensors()
        groups = torch.tensor(rng.integers(0, 3, len(l)))
        with backends.use("reference"):
            one = dr.robust_risk(l, text, nominal=nominal, groups=groups)
        with backends.use(BACKENDS[-1]):
            two = dr.robust_risk(l, text, nominal=nominal, groups=groups)
        size = np.abs(problem.losses).max() or 1.0
        assert abs(one.value.item() - two.value.item()) <= 1e-10 * size, problem
        torch.testing.assert_close(one.weights, two.weights, atol=1e-9, rtol=0)


@pytest.mark.mathematics
@pytest.mark.parametrize("ambiguity", ["erm", "tv:0.2", "kl:0.5", "cvar:0.3,temperature=0.5"])
def test_weights_whose_sum_overflows(backend, ambiguity):
    """Only ratios matter: also of weights whose sum is no float64, or that are subnormal."""
    losses, ratios = (
        torch.tensor([0.5, -1.0, 2.0, 0.0]),
        torch.tensor([1.0, 2.0, 0.0, 2.0]).double(),
    )
    wanted = dr.robust_risk(losses, ambiguity, nominal=ratios)
    for size in (2.0**1022, 2.0**-1070):
        found = dr.robust_risk(losses, ambiguity, nominal=ratios * size)
        assert torch.equal(found.weights, wanted.weights) and found.value == wanted.value
