"""Wrong ids where nothing refuses them first: NaN for what they concern, never an index.

A CPU refuses them by name (`test_bad_input` of each op). A GPU does not read them; there a
device assert would end the context of everything else in the process. Here the ops are called as on
a GPU, past their checks: the kernels, and plain PyTorch, which serves where there are none.
"""

from __future__ import annotations

import functools
import importlib
import types

import child
import pytest
import torch
from three_ways import ALL, BACKENDS, DEVICE, EMULATED, INTERPRETED, ON_GPU

import drrlhf as dr
from drrlhf import backends, checks, ops

# The kernels of the CPU refuse by themselves, and name what is wrong.
SILENT = [name for name in BACKENDS if name != "cpp"]
NONE = [-1, 7, 2**40, -(2**40)]  # of [0, 7)
BOUNDARIES = [[1, 4, 9], [0, 5, 4], [0, 4, 10], [0, -3, 9], [0, 4, 8], [0, 12, 9], [0, 2**40, 9]]
KEEPS = {"triton": (0, 1, 3), "cuda": (0, 1, 4), "reference": (0, 1, 2, 3, 4)}


@pytest.fixture(params=SILENT, autouse=True)
def backend(request, monkeypatch):
    for module in ("reference.robust_risk", "functional.policy_loss", "logprobs"):  # as on a device
        module = importlib.import_module(f"drrlhf.{module}")
        monkeypatch.setattr(module, "check_none", lambda *_, **__: None)
    with backends.use(request.param):
        yield request.param


@pytest.mark.parametrize("label", NONE)
def test_a_label_of_logits(label):
    logits, labels = torch.randn(4, 7), torch.tensor([0, 6, -100, 3])
    right = ops.token_logprobs(logits, labels, -100, 0.7, 5.0, 15)
    wrong = labels.clone()
    wrong[1] = label
    found = ops.token_logprobs(logits, wrong, -100, 0.7, 5.0, 15)
    others = [0, 2, 3]
    for a, b in zip(found, right):
        assert torch.equal(a[others], b[others])
    *numbers, top1, squares = found
    assert all(x[1].isnan() for x in (*numbers, squares)) and not top1[1]
    upstream = torch.randn(4)
    expected, d = (
        torch.ops.drrlhf.token_logprobs_backward(
            logits, y, upstream, upstream, *x[:4], ignore_index=-100, temperature=0.7, softcap=5.0
        )
        for y, x in ((labels, right), (wrong, found))
    )
    assert d[1].isnan().all() and torch.equal(d[others], expected[others])


@pytest.mark.parametrize("label", NONE)
def test_a_label_of_the_head(backend, label):
    softcap = 5.0 if label < -1 else None  # whose mean logit another kernel has
    hidden, weight = torch.randn(4, 5), torch.randn(7, 5)
    labels, wrong = torch.tensor([0, 6, -100, 3]), torch.tensor([0, label, -100, 3])
    keeps = KEEPS[backend]
    if INTERPRETED and not ALL:  # where a program takes milliseconds: another one for each label
        keeps = keeps[NONE.index(label) % len(keeps) :][:1]
    for keep in keeps:
        right, found = (
            ops.linear_token_logprobs(hidden, weight, None, y, -100, 1.0, softcap, 1.0, 15, keep, 0)
            for y in (labels, wrong)
        )
        assert all(found[i][1].isnan() for i in (0, 1, 2, 3, 4, 6)) and not found[5][1]
        for a, b in zip(found[:7], right):
            torch.testing.assert_close(a[[0, 2, 3]], b[[0, 2, 3]])
        upstream = torch.randn(4)
        d_hidden, d_weight, _ = torch.ops.drrlhf.linear_token_logprobs_backward(
            hidden,
            weight,
            None,
            wrong,
            upstream,
            None,
            *found[:4],
            found[7],
            -100,
            1.0,
            softcap,
            1.0,
            keep,
            0,
            True,
            keep != 1,
            False,
        )
        assert d_hidden[1].isnan().all() and torch.isfinite(d_hidden[[0, 2, 3]]).all()
        assert keep == 1 or d_weight.isnan().any()


@pytest.mark.parametrize("boundaries", BOUNDARIES)
@pytest.mark.parametrize("mean", [False, True])
def test_boundaries(boundaries, mean):
    cu, labels = torch.tensor(boundaries), torch.zeros(9, dtype=torch.long)
    assert ops.sequence_logprobs(torch.randn(9), labels, cu, -100, mean).isnan().any()
    d = torch.ops.drrlhf.sequence_logprobs_backward(torch.ones(2), labels, cu, -100, mean)
    assert d.shape == (9,)
    whole = torch.tensor([0, 4, 9])
    assert (
        torch.ops.drrlhf.sequence_logprobs_backward(torch.ones(2), labels, whole, -100, mean).sum()
        > 0
    )


@pytest.mark.parametrize("boundaries", BOUNDARIES)
def test_boundaries_of_pairs(boundaries):
    found = torch.ops.drrlhf.sequence_preference_loss(
        torch.randn(9),
        torch.zeros(9, dtype=torch.long),
        torch.tensor(boundaries),
        torch.zeros(2),
        None,
        None,
        None,
        -100,
        0.1,
        0.0,
        "erm",
        0.0,
        0.0,
        0.0,
        True,
    )
    assert found[0].isnan()


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("kind, a", [("tv", 0.1), ("kl_radius", 0.1), ("erm", 0.0), ("cvar", 0.4)])
def test_a_nominal_weight(kind, a, bad):
    nominal = torch.tensor([1.0, bad, 1.0])
    value, weights, *_ = ops.robust_risk(
        torch.randn(3), nominal, None, None, kind, a, 0.0, 0.0, True
    )
    assert value.isnan() and weights.isnan().any()


@pytest.mark.parametrize("group", [-1, 2, 2**40])
@pytest.mark.parametrize("trim", [0.0, 0.2])
def test_a_group(group, trim):
    state = torch.tensor([0.25, 0.75], dtype=torch.float64)
    groups = torch.tensor([0, 1, group])
    value, weights, _, after = ops.robust_risk(
        torch.randn(3), None, groups, state, "group", 0.1, 0.0, trim, True
    )
    assert value.isnan() and weights.isnan().all() and torch.equal(after, state)


BETWEEN = [[0], [0, 4], [0, 5, 3, 4], [2, 4, 9]]  # tokens in no sequence, or in none that is one


@pytest.mark.parametrize("boundaries", BETWEEN)
def test_tokens_of_no_sequence_have_no_gradient(backend, boundaries, fresh_memory_is_nan):
    """Memory that nothing wrote would be anything."""
    cu, logps = torch.tensor(boundaries), -torch.rand(9)
    sequences, labels = len(boundaries) - 1, torch.zeros(9, dtype=torch.long)
    grad = torch.ones(sequences)
    d = torch.ops.drrlhf.sequence_logprobs_backward(grad, labels, cu, -100, False)
    if sequences == 0:
        assert not d.any()
    elif backend != "cuda":  # which tells every token that the boundaries are none, by NaN
        assert d.isfinite().all()
    if backend == "cuda":
        return  # it has no policy_loss
    options = (logps - 0.1, None, None, None, cu, grad, False, 0.2, 0.2, 0.0, True)
    slopes = torch.ops.drrlhf.policy_loss(logps, *options)[1]
    assert slopes.isfinite().all()
    d = torch.ops.drrlhf.policy_loss_backward(grad, torch.ones(9), cu)
    assert d.isfinite().all() and (sequences > 0 or not d.any())


def policy(prompt_ids, prompts, logps=None, **change):
    logps = (-torch.rand(4, 5) if logps is None else logps).requires_grad_()
    out = dr.policy_loss(
        logps,
        None,
        torch.tensor([1.0, -1.0, 0.5, 2.0]),
        torch.tensor([0.0, 1.0, 2.0, 3.0]),
        torch.tensor(prompt_ids),
        num_prompts=prompts,
        loss_type="grpo",
        ambiguity="tv:0.1",
        **change,
    )
    return out, torch.autograd.grad(out.loss, logps)[0]


@pytest.mark.skipif("cuda" in SILENT, reason="the backend has no such kernel")
@pytest.mark.parametrize("bad", [-1, 2, 2**40])
def test_a_prompt(bad):
    out, d = policy([0, 1, bad, 0], 2)
    assert out.loss.isnan()
    assert d[2].isnan().all() and d[[0, 1, 3]].isfinite().all()


@pytest.mark.skipif("cuda" in SILENT, reason="the backend has no such kernel")
def test_a_prompt_without_a_sequence():
    out, _ = policy([0, 0, 2, 2], 3)
    assert out.losses.isnan().tolist() == [False, True, False]
    assert out.loss.isnan() and out.weights.isnan().all()


@pytest.mark.skipif("cuda" in SILENT, reason="the backend has no such kernel")
def test_a_prompt_without_a_token(monkeypatch):
    """It adds 0 to the loss, and is refused where the caller asks for it."""
    logps, mask = -torch.rand(4, 5), torch.tensor([[1], [1], [0], [0]]).expand(4, 5)
    out, d = policy([0, 0, 1, 1], 2, logps, mask=mask)
    assert out.loss.isfinite() and d[:2].all() and not d[2:].any()

    def as_on_a_device(bad, message, on, wanted=False):
        if wanted:
            checks.check_none(bad, message, on)

    module = importlib.import_module("drrlhf.functional.policy_loss")
    monkeypatch.setattr(module, "check_none", as_on_a_device)
    policy([0, 0, 1, 1], 2, logps, mask=mask)
    with pytest.raises(ValueError, match=r"mask: expected a counted token.*prompt 1"):
        policy([0, 0, 1, 1], 2, logps, mask=mask, check_finite=True)


@pytest.mark.skipif("cuda" in SILENT, reason="the backend has no such kernel")
def test_boundaries_of_completions():
    """Only NaN may come of them: what a sequence without tokens adds is 0."""
    for boundaries in ([0, 5, 3, 9, 20], [0, 5, 9, 14, 21], [1, 5, 9, 14, 20], [0, -5, 9, 14, 20]):
        out, d = policy([0, 0, 1, 1], 2, -torch.rand(20), cu_seqlens=torch.tensor(boundaries))
        assert out.loss.isnan() and torch.stack(out.sequences).isnan().any()
        assert d.shape == (20,)


# -- who looks at values ---------------------------------------------------------------------------


def on(device):
    return types.SimpleNamespace(device=torch.device(device))


def test_a_check_on_a_device_does_nothing_unless_it_is_wanted(monkeypatch):
    asserted = []
    monkeypatch.setattr(torch, "_assert_async", lambda holds, text: asserted.append(bool(holds)))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def check(device, wanted=False):
        checks.check_none(lambda: torch.tensor(True), lambda *_: "wrong", on(device), wanted)

    with pytest.raises(ValueError, match="wrong"):
        check("cpu")
    for device in ("cuda", "meta"):
        check(device)
    check("meta", wanted=True)  # has no values
    with pytest.raises(ValueError, match="wrong"):
        check("cuda", wanted=True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    check("cuda", wanted=True)
    assert not asserted
    monkeypatch.setattr(checks, "DEBUG", True)
    check("cuda")
    check("cuda", wanted=True)
    assert asserted == [False, False]


WRONG = {
    "labels": "dr.token_logprobs(torch.zeros(2, 3), torch.tensor([0, 3]))",
    "head": "dr.linear_token_logprobs(torch.zeros(2, 4), torch.zeros(3, 4), torch.tensor([0, -1]))",
    "boundaries": "dr.sequence_logprobs(torch.zeros(4), longs, cu_seqlens=torch.tensor([0, 5]))",
    "nominal": "dr.robust_risk(torch.zeros(2), 'tv:0.1', nominal=torch.tensor([1.0, -1.0]))",
    "groups": "dr.robust_risk(torch.zeros(2), 'group:2', groups=torch.tensor([0, 2]))",
}
CALLS = """
import torch
import drrlhf as dr
torch.set_default_device("{device}")
longs = torch.zeros(4, dtype=torch.long)
for what, call in {calls}.items():
    try:
        with dr.backends.use("{backend}"):
            print(what, "gave", eval(call))
        torch.cuda.synchronize() if "{device}" == "cuda" else None
    except Exception as error:
        text = str(error)
        try:  # a library that is called after the assert says something else
            torch.cuda.synchronize() if "{device}" == "cuda" else None
        except Exception as again:
            text = str(again)
        asserts = "assert" in text
        print(what, "raised", type(error).__name__, *([] if asserts else [text]), asserts)
"""


def calling(backend, *names):
    calls = {name: WRONG[name] for name in names}
    return CALLS.format(device=DEVICE, backend=backend, calls=calls)


@functools.cache
def debugged():
    """By backend, what a child with DRRLHF_DEBUG=1 prints of all calls."""
    cases = [(calling(backend, *WRONG), {"DRRLHF_DEBUG": "1"}, []) for backend in SILENT]
    return dict(zip(SILENT, (done.stdout.splitlines() for done in child.run_each(cases))))


@pytest.mark.xdist_group("debugged")
@pytest.mark.parametrize("what", WRONG)
def test_debug_mode_makes_it_an_error(backend, what):
    """On a device an assert, which ends the context: in a child for each, and otherwise in one."""
    if EMULATED:
        pytest.skip("a child has no emulated kernels")
    if ON_GPU:
        lines = child.run(calling(backend, what), DRRLHF_DEBUG="1").stdout.splitlines()
    else:
        lines = debugged()[backend]
    (line,) = [line for line in lines if line.startswith(f"{what} ")]
    if ON_GPU:
        assert line.startswith(f"{what} raised") and line.rstrip().endswith("True"), line
    else:
        assert line.startswith(f"{what} raised ValueError"), line
