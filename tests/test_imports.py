"""Imports run one way: cli -> trl, data -> functional -> logprobs -> ops -> backends -> reference
or kernels; and an op has one name everywhere."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import drrlhf as dr
from drrlhf import backends, logprobs
from drrlhf.bench import registry

ROOT = Path(__file__).parent.parent
PACKAGE, KERNELS = ROOT / "drrlhf", ROOT / "kernels"
# A module may import from its own layer and from those below it (a smaller number).
LAYERS = {
    "version": 0,
    "checks": 0,
    "conventions": 0,
    "precision": 0,
    "batching": 0,
    "ambiguity": 0,
    "files": 0,
    "seeds": 0,
    "threads": 0,
    "transformations": 0,
    "reward_inputs": 0,
    "models": 0,
    "groups": 1,
    "reference": 1,
    "_C": 1,
    "kernels": 1,
    "backends": 2,
    "ops": 3,
    "distributed": 3,
    "head_memory": 3,
    "layouts": 4,
    "logprobs": 4,
    "functional": 5,
    "modules": 6,
    "": 8,  # the package itself: the public names
    "data": 9,
    "report": 9,
    "callbacks": 9,
    "stress": 9,
    "trl": 10,
    "demo": 11,
    "bench": 11,
    "cli": 12,
    "__main__": 13,
}


def layer(name: str) -> str:
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported(path: Path) -> set[str]:
    """Modules of this package that the file imports, at any depth of its code."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {a.name for a in node.names if a.name.split(".")[0] == "drrlhf"}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            if node.module == "drrlhf":
                submodules = {a.name for a in node.names if a.name in LAYERS}
                names |= {f"drrlhf.{n}" for n in submodules}
                if len(submodules) < len(node.names):
                    names.add("drrlhf")
            elif node.module.startswith("drrlhf."):
                names.add(node.module)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
    return names


def own_layer(path: Path) -> str:
    if path.is_relative_to(KERNELS):
        return "kernels"
    first = path.relative_to(PACKAGE).with_suffix("").parts[0]
    return "" if first == "__init__" else first


FILES = sorted([*PACKAGE.rglob("*.py"), *KERNELS.rglob("*.py")])


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_run_one_way(path):
    own = own_layer(path)
    assert own in LAYERS, f"{path}: give the new module {own!r} its layer"
    for name in imported(path):
        below = layer(name)
        assert below == own or LAYERS[below] <= LAYERS[own], (
            f"{path.name} (layer {own!r}) must not import {name} (layer {below!r})"
        )


def test_kernels_do_not_know_the_oracle():
    for path in KERNELS.rglob("*.py"):
        assert not any(name.startswith("drrlhf.reference") for name in imported(path)), path


@pytest.mark.parametrize("op", [op for op in backends.OPS if "_backward" not in op])
def test_an_op_has_one_name(op):
    """In its schema's file, in plain PyTorch, in Triton, in its tests and in its benchmark; the
    function that users call has its file too, or stands with the other log-probs."""
    for folder in (PACKAGE / "ops", PACKAGE / "reference", KERNELS):
        assert (folder / f"{op}.py").exists(), f"{folder.name}/{op}.py"
    assert list((ROOT / "tests").rglob(f"test_{op}.py")), f"tests/test_{op}.py"
    assert op in (*registry.OPS, "sequence_logprobs"), "the benchmark measures it"
    if op in dr.__all__:
        home = PACKAGE / "functional" / f"{op}.py"
        assert home.exists() or hasattr(logprobs, op)


@pytest.mark.parametrize("name", registry.OPS)
def test_a_benchmark_is_named_as_what_it_measures(name):
    assert (PACKAGE / "bench" / f"{name}.py").exists()
    if name not in ("ceilings", "dpo_step", "trainer_step"):
        assert name in (*backends.OPS, *dr.__all__)
