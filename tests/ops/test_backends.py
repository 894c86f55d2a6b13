"""The backend is chosen visibly, and never falls through when asked for by name."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import types

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


def test_who_follows_what_is_said_of_triton_gets_it(monkeypatch):
    """On a CPU the interpreter is for those who ask for Triton by name: one word is not enough."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    (row,) = [
        r for r in backends.explain() if r[:3] == ("robust_risk", "cpu", "triton") and not r.chosen
    ]
    assert "TRITON_INTERPRET=1 beside DRRLHF_BACKEND=triton" in row.reason
    with backends.use("triton"):
        assert backends.serving("robust_risk", "cpu") == "triton"


@pytest.mark.skipif("DRRLHF_EMULATED" in os.environ, reason="there CUDA serves the CPU")
def test_two_gpus_may_have_two_backends(monkeypatch):
    """One that is too old for Triton's kernels does not decide for the one beside it."""
    monkeypatch.setattr(backends, "_EXTENSION", None)
    monkeypatch.setattr(backends, "_NO_EXTENSION", "not built")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda i: [(7, 5), (9, 0)][i or 0])
    monkeypatch.setattr(torch.version, "hip", None)
    with backends.use("auto"):
        served = [backends.kernel("robust_risk", "cuda", index=i) for i in (0, 1, 0)]
    assert served[0] is served[2] is plain and served[1].__module__ == "drrlhf.kernels.robust_risk"


@pytest.mark.parametrize(
    ("version", "reason"),
    [("3.6.0+git4d5f6", ""), ("3.10.1", ""), ("3.5.1", "too old"), (None, "not installed")],
)
def test_triton_is_known_as_it_is_imported(monkeypatch, version, reason):
    """Builds of it come in distributions of other names."""
    usual = importlib.import_module

    def found(name, *rest):
        if name != "triton":
            return usual(name, *rest)
        if version is None:
            raise ModuleNotFoundError(name=name)
        return types.SimpleNamespace(__version__=version)

    def none(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", found)
    monkeypatch.setattr("importlib.metadata.version", none)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason in (said := backends._no_triton()) and bool(said) == bool(reason)


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
    assert failed.returncode and "DRRLHF_BACKEND: expected one of" in failed.stderr


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
