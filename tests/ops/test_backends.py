"""The backend is chosen visibly, and never falls through when asked for by name."""

from __future__ import annotations

import json

import child
import pytest
import torch

import drrlhf as dr
from drrlhf import backends
from drrlhf.reference.robust_risk import robust_risk as plain

L = torch.randn(4)


@pytest.fixture(autouse=True)
def automatic():
    with backends.use("auto"):
        yield


def test_use_is_a_call_and_a_context_manager():
    backends.use("reference")
    assert backends.kernel("robust_risk", "cpu") is plain
    with backends.use("auto"):
        expected = backends.build_info()["built"]
        served_by_reference = backends.kernel("robust_risk", "cpu") is plain
        assert served_by_reference != expected
    assert backends.kernel("robust_risk", "cpu") is plain


def test_a_named_backend_serves_or_raises():
    with backends.use("cuda"), pytest.raises(backends.BackendError, match="robust_risk"):
        dr.robust_risk(L)
    with pytest.raises(ValueError, match="expected one of"):
        backends.use("cudo")
    dr.robust_risk(L)


def test_explain_names_one_backend_for_each_op_and_a_reason_for_the_others():
    rows = backends.explain()
    for op in backends.OPS:
        for device in ("cpu", "cuda"):
            here = [r for r in rows if (r.op, r.device) == (op, device)]
            assert sum(r.chosen for r in here) == 1
            assert all(r.reason for r in here if not r.chosen)


RISK = "import torch, drrlhf as dr; print(dr.robust_risk(torch.ones(2)).value.item())"
HEAVY = ("trl", "transformers", "datasets", "matplotlib", "scipy")
CHILDREN = {
    "reference": (RISK, {"DRRLHF_BACKEND": "reference"}),
    "triton": (RISK, {"DRRLHF_BACKEND": "triton"}),
    "nonsense": (RISK, {"DRRLHF_BACKEND": "nonsense"}),
    "no extension": (
        "import sys; sys.modules['drrlhf._C'] = None\n"
        "import torch, json, drrlhf as dr\n"
        "l = torch.tensor([1.0, 2.0, 4.0])\n"
        "v = [dr.robust_risk(l, 'tv:0.5').value.item() for _ in range(3)]\n"
        "print(json.dumps([v[0], dr.backends.build_info()]))",
        {},
    ),
    "names": (
        "import drrlhf; [getattr(drrlhf, n) for n in drrlhf.__all__]; print(len(drrlhf.__all__))",
        {},
    ),
    "modules": (f"import sys, drrlhf; print([m for m in {HEAVY} if m in sys.modules])", {}),
}


@pytest.fixture(scope="module")
def children():
    """What processes that import drrlhf for the first time print."""
    found = child.run_each([(*case, []) for case in CHILDREN.values()])
    return dict(zip(CHILDREN, found, strict=True))


def test_environment_variable(children):
    assert children["reference"].stdout.strip() == "1.0"
    failed = children["triton"]
    assert failed.returncode and "'triton' was asked for by name" in failed.stderr
    failed = children["nonsense"]
    assert failed.returncode and "expected one of" in failed.stderr


def test_without_the_extension_everything_works_and_says_why(children):
    """As after DRRLHF_BUILD=none: the module is hidden, the reason is logged once."""
    done = children["no extension"]
    value, info = json.loads(done.stdout)
    assert value == pytest.approx(0.5 * 4 + 1 / 3 * 4 + 1 / 6 * 2)
    assert info["built"] is False and info["reason"]
    assert done.stderr.count("served by plain PyTorch") == 1


def test_every_public_name_is_there(children):
    assert int(children["names"].stdout) == len(dr.__all__) == len(set(dr.__all__))
    assert set(dr.__all__) <= set(dir(dr))
    with pytest.raises(AttributeError, match="no attribute 'robust_rsk'"):
        dr.robust_rsk  # noqa: B018


def test_importing_is_light(children):
    assert children["modules"].stdout.strip() == "[]"
