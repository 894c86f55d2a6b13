"""Other libraries, imported when their turn comes; what cannot be had is a reason, not an error."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from drrlhf.bench.registry import Unavailable

NOT_IN_QUICK = "left out of the quick suite: compiling takes longer than all of it"


def load(module: str, package: str) -> Any:
    """`module` of the PyPI package `package`.

    Raises:
        Unavailable: not installed (and which pip install brings it), or it does not import.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name and module.split(".")[0] == error.name.split(".")[0]:
            raise Unavailable(f"not installed: pip install {package}") from error
        raise Unavailable(
            f"does not import here: {error}; pip install {package} brings what it needs"
        ) from error
    except Exception as error:  # a peer may raise anything while it is imported
        raise Unavailable(f"does not import here: {reason(error)}") from error


def load_file(package: str, path: str) -> Any:
    """The module in the file `path` of an installed package whose ``__init__`` is not run.

    Raises:
        Unavailable: as `load`.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        raise Unavailable(f"not installed: pip install --no-deps {package}")
    file = Path(spec.origin).parent / path
    name = f"drrlhf_bench_{package}_{file.stem}"
    of_file = importlib.util.spec_from_file_location(name, file)
    try:
        assert of_file is not None and of_file.loader is not None, f"{file} is no Python file"
        module = importlib.util.module_from_spec(of_file)
        of_file.loader.exec_module(module)
    except Exception as error:  # a peer may raise anything while it is imported
        raise Unavailable(f"{path} does not import here: {reason(error)}") from error
    return module


def reason(error: BaseException) -> str:
    """An exception as one line."""
    if isinstance(error, Unavailable):
        return str(error)
    text = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def compiled(function: Callable[..., Any], suite: str) -> Callable[..., Any]:
    """`function` through torch.compile, for fixed shapes; the first call compiles.

    Raises:
        Unavailable: in the quick suite.
    """
    if suite == "quick":
        raise Unavailable(NOT_IN_QUICK)
    # Graphs of an earlier case would count towards the limit past which dynamo runs eagerly.
    torch.compiler.reset()
    return torch.compile(function, dynamic=False, fullgraph=True)
