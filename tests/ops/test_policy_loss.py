"""`policy_loss`: TRL's number without an adversary, prompts weighed by their rewards with one."""

from __future__ import annotations

import math

import pytest
import torch
from three_ways import (
    BACKENDS,
    DEVICE,
    ON_GPU,
    SLOW,
    assert_differentiable_once,
    assert_no_worse,
    assert_refused,
)

import drrlhf as dr
from drrlhf import backends
from drrlhf.conventions import IMPORTANCE_LEVELS, POLICY_LOSS_TYPES

SETS = ["tv:0.2", "kl:0.1", "chi2:0.5", "cvar:0.3", "kl:temperature=-1", "tv:0.2,trim=0.1"]


@pytest.fixture(params=BACKENDS, autouse=True)
def backend(request):
    if "policy_loss" not in backends.SERVED[request.param]:
        pytest.skip(f"{request.param} leaves policy_loss to others")
    with backends.use(request.param):
        yield request.param


def batch(counts=(3, 1, 4, 2), length=9, seed=0, dtype=torch.float64, distance=0.3, **change):
    """A padded batch of ragged prompts in shuffled order; some completions short, one empty."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.tensor([i for i, k in enumerate(counts) for _ in range(k)])
    ids = ids[torch.randperm(len(ids), generator=draw)]
    shape = (len(ids), length)

    def normal(*size):
        return torch.randn(*size, generator=draw, dtype=torch.float64)

    logps = -torch.rand(shape, generator=draw, dtype=torch.float64) * 3
    lengths = torch.randint(1, length + 1, (len(ids),), generator=draw)
    mask = (torch.arange(length) < lengths.unsqueeze(1)).long()
    several = ids == max(range(len(counts)), key=counts.__getitem__)
    mask[int(several.nonzero()[0])] = 0
    found = {
        "logps": logps,
        "old_logps": logps + distance * normal(shape),
        "advantages": normal(len(ids)),
        "rewards": normal(len(ids)),
        "prompt_ids": ids,
        "mask": mask,
        "ref_logps": logps + distance * normal(shape),
        "entropy": torch.rand(shape, generator=draw, dtype=torch.float64),
    } | change
    tokens = ("logps", "old_logps", "ref_logps", "entropy", "advantages", "rewards")
    for name in tokens:
        if found[name] is not None:
            found[name] = found[name].to(dtype)
    found = {k: None if x is None else x.to(DEVICE) for k, x in found.items()}
    found["logps"] = found["logps"].requires_grad_()
    return found


def packed(arguments):
    """The same batch without its padding; the tokens of a sequence that do not count go too."""
    keep = arguments["mask"].bool()
    found = dict(arguments, mask=None)
    for name in ("logps", "old_logps", "ref_logps", "entropy"):
        if found[name] is not None:
            found[name] = found[name].detach()[keep]
    found["logps"] = found["logps"].requires_grad_()
    lengths = torch.cat([keep.new_zeros(1, dtype=torch.long), keep.sum(1).cumsum(0)])
    return found | {"cu_seqlens": lengths}


def run(arguments, **options):
    out = dr.policy_loss(**arguments, **options)
    (grad,) = torch.autograd.grad(out.loss, arguments["logps"])
    return out, grad


OPTIONS = {"max_completion_length": 11, "clip_low": 0.1, "clip_high": 0.28}


@pytest.mark.mathematics
@pytest.mark.pairwise
@pytest.mark.parametrize("correct_kl", [True, False])
@pytest.mark.parametrize("kl_beta", [0.0, 0.05])
@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
@pytest.mark.parametrize("loss_type", POLICY_LOSS_TYPES)
def test_erm_is_trl(loss_type, level, kl_beta, correct_kl):
    trl_policy = pytest.importorskip("drrlhf.bench.trl_policy")
    pytest.importorskip("trl")
    x = batch()
    if not correct_kl and not kl_beta:
        return
    options = OPTIONS | {
        "loss_type": loss_type,
        "importance_level": level,
        "kl_beta": kl_beta,
        "correct_kl": correct_kl,
    }
    out, grad = run(x, **options)
    theirs = {k: v for k, v in x.items() if k not in ("rewards", "prompt_ids")}
    loss, metrics = trl_policy.trl_policy_loss(**theirs, **options)
    (expected,) = torch.autograd.grad(loss, x["logps"])
    torch.testing.assert_close(out.loss, loss, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(grad, expected, rtol=1e-11, atol=1e-14)
    assert out.entropy.item() == pytest.approx(metrics["entropy"], rel=1e-6)
    if kl_beta:
        assert out.kl.item() == pytest.approx(metrics["kl"], rel=1e-6)
    if level == "token":
        assert out.clip_fraction.item() == pytest.approx(metrics["clip_ratio/region_mean"])
        assert out.clip_fraction.item() > 0.1  # the clip was at work


@pytest.mark.mathematics
@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
def test_without_old_log_probs_the_ratio_is_one(level):
    """And a gradient flows nonetheless, as in TRL with its detached copy."""
    x = batch()
    out, grad = run(x | {"old_logps": None}, importance_level=level)
    same, expected = run(x | {"old_logps": x["logps"].detach()}, importance_level=level)
    torch.testing.assert_close(out.loss, same.loss)
    torch.testing.assert_close(grad, expected)
    assert grad.abs().sum() > 0 and out.ratio.item() == 1


@pytest.mark.mathematics
@pytest.mark.parametrize("ambiguity", SETS)
@pytest.mark.parametrize("loss_type", POLICY_LOSS_TYPES)
def test_weighted_sum_of_the_prompts_contributions(loss_type, ambiguity):
    """loss = sum m q_i c_i with q of the losses -V_i; c_i by the difference that prompt i makes."""
    x = batch()
    options = OPTIONS | {"loss_type": loss_type, "kl_beta": 0.05}
    out, grad = run(x, ambiguity=ambiguity, **options)
    m = int(x["prompt_ids"].max()) + 1
    values = torch.stack([x["rewards"][x["prompt_ids"] == i].mean() for i in range(m)])
    risk = dr.robust_risk(-values, ambiguity)
    torch.testing.assert_close(out.weights, risk.weights)
    torch.testing.assert_close(out.losses, -values)
    torch.testing.assert_close(out.risk, risk.value)
    _, whole_grad = run(x, **options)
    factor = (m * risk.weights)[x["prompt_ids"]]
    torch.testing.assert_close(grad, factor.unsqueeze(1) * whole_grad)
    expected = 0
    for i in range(m):
        mine = (x["prompt_ids"] == i).double()
        expected = expected + m * risk.weights[i] * run(x, sequence_weights=mine, **options)[0].loss
    torch.testing.assert_close(out.loss, expected)


@pytest.mark.mathematics
def test_weights_come_from_rewards_alone_and_are_constants():
    x = batch()
    x["rewards"] = x["rewards"].requires_grad_()
    x["advantages"] = x["advantages"].requires_grad_()
    out = dr.policy_loss(**x, ambiguity="kl:0.2")
    out.loss.backward()
    assert x["rewards"].grad is None and x["advantages"].grad is None
    again = dr.policy_loss(**(x | {"advantages": -3 * x["advantages"]}), ambiguity="kl:0.2")
    assert torch.equal(out.weights, again.weights)
    assert not any(t.requires_grad for t in (out.weights, out.losses, out.risk, out.dual))
    shifted = dr.policy_loss(**(x | {"rewards": x["rewards"] + 7}), ambiguity="kl:0.2")
    torch.testing.assert_close(shifted.weights, out.weights)


@pytest.mark.mathematics
def test_worse_prompts_weigh_more():
    x = batch(counts=(2, 2, 2))
    x["rewards"] = x["prompt_ids"].to(x["rewards"])  # prompt 0 is the worst
    weights = dr.policy_loss(**x, ambiguity="kl:0.1").weights
    assert weights[0] > weights[1] > weights[2]


@pytest.mark.mathematics
@pytest.mark.pairwise
@pytest.mark.parametrize("loss_type", POLICY_LOSS_TYPES)
@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
@pytest.mark.parametrize("ambiguity", ["erm", "tv:0.3"])
def test_packed_is_padded(loss_type, level, ambiguity):
    x = batch()
    options = OPTIONS | {
        "loss_type": loss_type,
        "importance_level": level,
        "kl_beta": 0.1,
        "ambiguity": ambiguity,
    }
    out, grad = run(x, **options)
    p = packed(x)
    found, packed_grad = run(p, **options)
    torch.testing.assert_close(found.loss, out.loss)
    torch.testing.assert_close(packed_grad, grad[x["mask"].bool()])
    for ours, theirs in zip(found.sequences, out.sequences, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.mathematics
def test_a_packed_batch_may_have_a_mask_too():
    x = batch()
    p = packed(x)
    tools = torch.rand(p["logps"].shape, generator=torch.Generator().manual_seed(1)) < 0.7
    p["mask"] = tools.to(DEVICE)
    masked = x["mask"].clone().bool()
    masked[x["mask"].bool()] = p["mask"]
    out, grad = run(p, ambiguity="tv:0.1")
    same, expected = run(x | {"mask": masked}, ambiguity="tv:0.1")
    torch.testing.assert_close(out.loss, same.loss)
    torch.testing.assert_close(grad, expected[x["mask"].bool()])


@pytest.mark.accuracy
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
def test_as_exact_as_the_dtype_allows(dtype, level):
    """Against float64 on the same, already rounded numbers; plain PyTorch in the dtype beside."""
    trl_policy = pytest.importorskip("drrlhf.bench.trl_policy")
    pytest.importorskip("trl")
    x = batch(counts=(4,) * 8, length=8 if SLOW else 64, dtype=dtype)
    options = {"importance_level": level, "kl_beta": 0.05, "loss_type": "grpo"}
    out, grad = run(x, **options)
    theirs = {k: v for k, v in x.items() if k not in ("rewards", "prompt_ids")}
    loss, _ = trl_policy.trl_policy_loss(**theirs, **options)
    (plain,) = torch.autograd.grad(loss, x["logps"])
    exact = {k: v.double().detach() if v.is_floating_point() else v for k, v in theirs.items()}
    exact["logps"].requires_grad_()
    truth, _ = trl_policy.trl_policy_loss(**exact, **options)
    (true_grad,) = torch.autograd.grad(truth, exact["logps"])
    assert out.loss.dtype == torch.float32 and grad.dtype == dtype
    torch.testing.assert_close(out.loss.double(), truth, rtol=2e-6, atol=1e-7)
    assert_no_worse(grad, plain, true_grad)


@pytest.mark.mathematics
def test_gradient_scales_with_what_comes_from_above():
    x = batch()
    _, grad = run(x, ambiguity="tv:0.3")
    (scaled,) = torch.autograd.grad(-2.5 * dr.policy_loss(**x, ambiguity="tv:0.3").loss, x["logps"])
    torch.testing.assert_close(scaled, -2.5 * grad)


@pytest.mark.mathematics
def test_small_divergences_keep_their_digits():
    """exp(d) - d - 1 as written loses everything below the square root of the rounding."""
    d = torch.tensor([[1e-3, -1e-4, 1e-6, 3e-8]])
    logps = torch.full((1, 4), -1.0, dtype=torch.float64)
    ref = logps + d.double()
    out = dr.policy_loss(
        logps.to(DEVICE),
        None,
        torch.zeros(1, device=DEVICE),
        torch.zeros(1, device=DEVICE),
        torch.zeros(1, dtype=torch.long, device=DEVICE),
        ref_logps=ref.to(DEVICE),
        kl_beta=1.0,
    )
    difference = ref - logps
    expected = (difference**2 / 2 + difference**3 / 6 + difference**4 / 24).sum()
    assert out.sequences.kl.item() == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.mathematics
def test_all_rewards_equal_and_advantages_zero():
    x = batch()
    x |= {"advantages": torch.zeros_like(x["advantages"]), "rewards": 0 * x["rewards"] + 2}
    for ambiguity in ("erm", *SETS):
        out, grad = run(x, ambiguity=ambiguity)
        assert out.loss == 0 and not grad.any() and torch.isfinite(out.weights).all()
        torch.testing.assert_close(out.weights, torch.full_like(out.weights, 1 / 4))


@pytest.mark.mathematics
def test_one_prompt_of_one_completion():
    x = batch(counts=(1,), mask=torch.ones(1, 9, dtype=torch.long))
    plain, plain_grad = run(x)
    for ambiguity in SETS[:-1]:
        out, grad = run(x, ambiguity=ambiguity)
        torch.testing.assert_close(out.loss, plain.loss)
        torch.testing.assert_close(grad, plain_grad)


@pytest.mark.mathematics
def test_groups_of_prompts_take_a_step():
    x = batch()
    state = dr.GroupState(2).to(DEVICE)
    groups = torch.tensor([0, 1, 0, 1], device=DEVICE)
    out = dr.policy_loss(
        **x, ambiguity=dr.Group(2, step_size=0.5), groups=groups, group_state=state
    )
    expected = dr.GroupState(2).to(DEVICE)
    risk = dr.robust_risk(
        out.losses, dr.Group(2, step_size=0.5), groups=groups, group_state=expected
    )
    torch.testing.assert_close(out.weights, risk.weights)
    torch.testing.assert_close(state.weights, expected.weights)
    assert not torch.equal(state.weights, dr.GroupState(2).weights.to(DEVICE))


@pytest.mark.mathematics
def test_running_normaliser_scales_loss_and_weights():
    x, state = batch(), dr.NormaliserState().to(DEVICE)
    dr.policy_loss(**x, ambiguity="kl:temperature=1,momentum=0.5", normaliser_state=state)
    y = batch(seed=5)
    out = dr.policy_loss(**y, ambiguity="kl:temperature=1,momentum=0.5", normaliser_state=state)
    alone = dr.policy_loss(**y, ambiguity="kl:temperature=1")
    factor = out.weights.sum()
    assert abs(factor.item() - 1) > 1e-3
    torch.testing.assert_close(out.loss, alone.loss * factor)
    assert out.risk.item() == pytest.approx(state.log_normaliser.item())


@pytest.mark.mathematics
@pytest.mark.parametrize("loss_type", POLICY_LOSS_TYPES)
def test_a_masked_prompt_is_absent(loss_type):
    """Nominal weight 0: NaN in its rewards and tokens does not matter, and it is not counted."""
    x = batch()
    nominal = torch.tensor([1.0, 1.0, 0.0, 1.0], device=DEVICE)
    gone = x["prompt_ids"] == 2
    y = dict(x, rewards=x["rewards"].masked_fill(gone, math.nan), nominal=nominal)
    y["logps"] = x["logps"].detach().masked_fill(gone.unsqueeze(1), math.nan).requires_grad_()
    options = OPTIONS | {"loss_type": loss_type, "kl_beta": 0.1, "ambiguity": "tv:0.3"}
    out, grad = run(y, **options)
    rest = {k: v if v is None else v[~gone] for k, v in x.items()}
    rest["prompt_ids"] = rest["prompt_ids"] - (rest["prompt_ids"] > 2).long()
    rest["logps"] = rest["logps"].detach().requires_grad_()
    expected, rest_grad = run(rest, **options)
    torch.testing.assert_close(out.loss, expected.loss)
    torch.testing.assert_close(grad[~gone], rest_grad)
    assert not grad[gone].any() and out.weights[2] == 0


@pytest.mark.mathematics
@pytest.mark.parametrize("loss_type", POLICY_LOSS_TYPES)
def test_nothing_unmasked_gives_zero_connected(loss_type):
    x = batch((2, 2), mask=None)
    for rewards in (x["rewards"], torch.full_like(x["rewards"], math.nan)):
        changed = x | {"rewards": rewards, "nominal": torch.zeros(2)}
        out, grad = run(changed, loss_type=loss_type, max_completion_length=11)
        assert out.loss.item() == 0 and (grad == 0).all() and (out.weights == 0).all()


@pytest.mark.mathematics
def test_a_prompt_without_weight_is_worth_nothing_whatever_it_holds():
    x = batch(counts=(2, 2, 2), mask=None)
    x["rewards"] = -x["prompt_ids"].to(x["rewards"])
    best = x["prompt_ids"] == 0
    bad = x["logps"].detach().clone()
    bad[best] = math.nan
    out, grad = run(x | {"logps": bad.requires_grad_()}, ambiguity="cvar:0.3")
    assert torch.isfinite(out.loss) and not grad[best].any() and torch.isfinite(grad).all()


@pytest.mark.mathematics
def test_nan_log_probs_are_seen():
    x = batch(mask=None)
    bad = x["logps"].detach().clone()
    bad[3, 2] = math.nan
    for advantages in (x["advantages"], torch.zeros_like(x["advantages"])):
        out, _ = run(x | {"logps": bad.requires_grad_(), "advantages": advantages})
        assert torch.isnan(out.loss)


@pytest.mark.mathematics
@pytest.mark.parametrize("correct_kl", [True, False])
@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
def test_a_reference_without_coefficient_is_only_looked_at(level, correct_kl):
    """TRL adds no divergence to the loss then: 0 times infinity would be NaN."""
    x = batch(mask=None)
    x["ref_logps"][0, 1] = -math.inf
    options = {"importance_level": level, "kl_beta": 0.0}
    out, grad = run(x, correct_kl=correct_kl, **options)
    alone, expected = run(x | {"ref_logps": None}, **options)
    assert torch.isfinite(out.loss) and torch.equal(out.loss, alone.loss)
    assert torch.isfinite(grad).all() and torch.equal(grad, expected)
    assert out.sequences.kl.isinf().tolist() == [True] + [False] * (len(grad) - 1)


@pytest.mark.mathematics
def test_overflowing_ratios_are_clamped_and_counted():
    x = batch(counts=(2, 2), mask=None, ref_logps=None)
    old = x["logps"].detach().clone()
    old[0, 0] -= 500.0
    old[1, 1] -= 39.0
    x |= {"old_logps": old, "advantages": torch.full_like(x["advantages"], -1.0)}
    out, grad = run(x)
    assert out.overflowed.item() == 1 and out.sequences.overflowed[0] == 1
    assert torch.isfinite(out.loss) and torch.isfinite(grad).all()
    assert grad[0, 0] == 0 and grad[1, 1] > 1e12
    assert out.sequences.ratio[0].item() == pytest.approx(math.exp(40), rel=1e-6)
    with_reference = dr.policy_loss(**(x | {"ref_logps": x["logps"].detach() + 400}), kl_beta=0.1)
    assert with_reference.overflowed.item() == x["logps"].numel()
    assert torch.isfinite(with_reference.loss)


@pytest.mark.mathematics
@pytest.mark.parametrize("level", IMPORTANCE_LEVELS)
def test_what_is_clamped_takes_no_gradient(level):
    """Neither the divergence through a clamped log-ratio to the reference, nor its correction
    through a clamped ratio."""
    logps = torch.tensor([[-1.0]], dtype=torch.float64, device=DEVICE).requires_grad_()
    zero = torch.zeros(1, dtype=torch.float64, device=DEVICE)

    def gradient(old, reference):
        at = logps.detach()
        out = dr.policy_loss(
            logps,
            at + old,
            zero,
            zero,
            zero.long(),
            ref_logps=at + reference,
            kl_beta=1.0,
            importance_level=level,
        )
        return torch.autograd.grad(out.loss, logps)[0].item()

    assert gradient(old=0.0, reference=41.0) == pytest.approx(math.expm1(40) - 40)  # of r alone
    assert gradient(old=-41.0, reference=0.5) == pytest.approx(-math.exp(40) * math.expm1(0.5))
    both = gradient(old=-3.0, reference=0.5)
    k3 = math.expm1(0.5) - 0.5
    assert both == pytest.approx(math.exp(3) * (k3 - math.expm1(0.5)))


def test_no_sequences():
    empty = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True, device=DEVICE)
    none = torch.zeros(0, dtype=torch.float64, device=DEVICE)
    out = dr.policy_loss(empty, None, none, none, none.long(), ambiguity="tv:0.1")
    out.loss.backward()
    assert out.loss == 0 and out.weights.shape == (0,) and empty.grad.shape == (0, 5)


def test_int32_ids_strided_inputs_and_bool_masks():
    x = batch()
    out, grad = run(x, ambiguity="tv:0.2", kl_beta=0.1)
    wide = {
        k: torch.stack([v, -v], -1)[..., 0]
        for k, v in x.items()
        if k in ("old_logps", "ref_logps", "entropy", "advantages", "rewards")
    }
    y = x | wide | {"prompt_ids": x["prompt_ids"].int(), "mask": x["mask"].bool()}
    y["logps"] = x["logps"].detach().T.contiguous().T.requires_grad_()
    same, expected = run(y, ambiguity="tv:0.2", kl_beta=0.1)
    assert torch.equal(out.loss, same.loss) and torch.equal(grad, expected)


@pytest.mark.usual
def test_opcheck():
    x = batch()
    arguments = (
        x["logps"],
        x["old_logps"],
        x["ref_logps"],
        x["entropy"],
        x["mask"],
        None,
        x["advantages"],
        False,
        0.2,
        0.2,
        0.1,
        True,
    )
    torch.library.opcheck(
        torch.ops.drrlhf.policy_loss.default,
        arguments,
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


@pytest.mark.usual
def test_one_graph_without_breaks():
    x = batch()
    logps = x.pop("logps")

    def step(logps):
        return dr.policy_loss(logps, **x, kl_beta=0.1, num_prompts=4, ambiguity="tv:0.2").loss

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(logps)
    eager = step(logps)
    assert torch.equal(compiled, eager)
    ours, theirs = (torch.autograd.grad(loss, logps)[0] for loss in (compiled, eager))
    assert torch.equal(ours, theirs)


def test_double_backward_is_refused():
    x = batch()
    assert_differentiable_once(dr.policy_loss(**x).loss, x["logps"])


def test_module_keeps_its_options_and_state():
    x = batch()
    module = dr.PolicyLossModule(dr.Group(2), loss_type="grpo", clip_high=0.3)
    module = module.to(DEVICE)
    groups = torch.tensor([0, 1, 0, 1], device=DEVICE)
    out = module(**x, groups=groups)
    torch.testing.assert_close(
        out.loss,
        dr.policy_loss(**x, loss_type="grpo", clip_high=0.3, ambiguity=dr.Group(2), groups=groups)[
            0
        ],
    )
    stepped = module.group_state.weights.clone()
    module.eval()(**x, groups=groups)
    assert torch.equal(module.group_state.weights, stepped)


# -- what is wrong with the arguments -------------------------------------------------------------

WRONG = {
    "gap": ({"prompt_ids": torch.tensor([0, 0, 2, 2])}, "none of prompt 1"),
    "negative": ({"prompt_ids": torch.tensor([0, -1, 1, 1])}, r"got -1 at index 1"),
    "no tokens": ({"mask": torch.tensor([[1], [1], [0], [0]]).expand(4, 9)}, "for prompt 1"),
    "NaN": ({"rewards": torch.tensor([0.0, 1.0, math.nan, 0.0])}, r"nan at index 2 \(prompt 1\)"),
    "inf": ({"rewards": torch.tensor([0.0, math.inf, 0.0, 0.0])}, r"inf at index 1"),
}


@pytest.mark.parametrize("change, words", WRONG.values(), ids=WRONG)
def test_wrong_values_are_named_and_change_nothing(change, words, backend):
    x = batch(
        counts=(2, 2),
        mask=None,
        prompt_ids=torch.tensor([0, 0, 1, 1]),
        **{k: v for k, v in change.items() if k not in ("mask", "prompt_ids")},
    ) | {k: v for k, v in change.items() if k in ("mask", "prompt_ids")}
    state = dr.GroupState(2)
    before = state.weights.clone()
    m = int(x["prompt_ids"].max()) + 1
    robust = {"ambiguity": dr.Group(2), "groups": torch.arange(m) % 2, "group_state": state}
    if ON_GPU:  # nothing is read there: a prompt without tokens contributes 0, the rest gives NaN
        loss = dr.policy_loss(**x, **robust).loss
        assert loss.isfinite() if "mask" in change else loss.isnan()
        with pytest.raises(ValueError, match=words):
            dr.policy_loss(**x, **robust, check_finite=True)
        return
    with pytest.raises(ValueError, match=words):
        dr.policy_loss(**x, **robust)
    assert torch.equal(state.weights, before)


SHAPES = {
    "old_logps": (lambda x: {"old_logps": x["old_logps"][:, :-1]}, r"old_logps: expected shape"),
    "mask": (lambda x: {"mask": x["mask"][1:]}, "mask: expected shape"),
    "advantages": (lambda x: {"advantages": x["advantages"][1:]}, "advantages: expected shape"),
    "rewards": (lambda x: {"rewards": x["rewards"][1:]}, r"rewards: expected shape \(10,\)"),
    "prompt_ids": (lambda x: {"prompt_ids": x["prompt_ids"][1:]}, "prompt_ids: expected shape"),
    "float ids": (lambda x: {"prompt_ids": x["rewards"]}, "prompt_ids: expected an integer"),
    "unpacked": (lambda x: {"logps": x["logps"].reshape(-1)}, "packed .T,. needs cu_seqlens"),
    "boundaries": (
        lambda x: packed(x) | {"cu_seqlens": packed(x)["cu_seqlens"] - 1},
        "cu_seqlens: expected boundaries",
    ),
    "nominal": (lambda x: {"nominal": torch.ones(3, device=DEVICE)}, r"nominal: expected shape"),
    "loss_type": (lambda x: {"loss_type": "dapoo"}, "did you mean 'dapo'"),
    "level": (lambda x: {"importance_level": "tokens"}, "did you mean 'token'"),
    "no reference": (lambda x: {"kl_beta": 0.1, "ref_logps": None}, "ref_logps: kl_beta=0.1"),
    "dr_grpo": (lambda x: {"loss_type": "dr_grpo"}, "max_completion_length: dr_grpo"),
    "clip": (lambda x: {"clip_low": 1.5}, r"clip_low: expected a number in \[0, 1\]"),
    "groups": (lambda x: {"ambiguity": "group:2"}, "groups: group:2 needs"),
}


@pytest.mark.parametrize("change, words", SHAPES.values(), ids=SHAPES)
def test_wrong_shapes_and_options_are_named(change, words, backend):
    x = batch()
    assert_refused(lambda: dr.policy_loss(**(x | change(x))), words, backend)


@pytest.mark.mathematics
def test_reference_is_its_own_definition():
    """The backward op against autograd of the formula written plainly."""
    x = batch()
    leaf = x["logps"].detach().cpu().requires_grad_()
    old, ref = x["old_logps"].cpu(), x["ref_logps"].cpu()
    advantages, mask = x["advantages"].cpu(), x["mask"].cpu()
    ratio = torch.exp(leaf - old)
    clipped = ratio.clamp(0.8, 1.2)
    a = advantages.unsqueeze(1)
    token = -torch.minimum(ratio * a, clipped * a) + 0.1 * (
        torch.exp(ref - leaf) - (ref - leaf) - 1
    )
    loss = ((token * mask).sum(1) / mask.sum(1).clamp(min=1)).mean()
    (expected,) = torch.autograd.grad(loss, leaf)
    out, grad = run(x, loss_type="grpo", kl_beta=0.1, correct_kl=False)
    torch.testing.assert_close(out.loss.cpu(), loss.detach())
    torch.testing.assert_close(grad.cpu(), expected)
