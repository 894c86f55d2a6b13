"""Imports run one way: cli -> trl, data -> losses -> robust, logprobs -> ops -> backends."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "drrlhf"
# A module may import from its own layer and from those below it (a smaller number).
LAYERS = {
    "version": 0, "checks": 0, "batching": 0, "ambiguity": 0, "files": 0, "seeds": 0,
    "reward_inputs": 0, "models": 0, "groups": 1, "reference": 1, "_C": 1, "kernels": 1,
    "backends": 2,
    "ops": 3,
    "distributed": 3,
    "head_memory": 3,
    "robust": 4, "logprobs": 4,
    "losses": 5, "policy": 5,
    "head": 6,
    "modules": 7,
    "": 8,  # the package itself: the public names
    "data": 9, "report": 9, "callbacks": 9, "stress": 9,
    "trl": 10, "demo": 11, "bench": 11,
    "cli": 12, "__main__": 13,
}  # fmt: skip


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


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_imports_run_one_way(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    own = "" if parts[0] == "__init__" else parts[0]
    assert own in LAYERS, f"{path}: give the new module {own!r} its layer"
    for name in imported(path):
        below = layer(name)
        assert below == own or LAYERS[below] <= LAYERS[own], (
            f"{path.name} (layer {own!r}) must not import {name} (layer {below!r})"
        )
