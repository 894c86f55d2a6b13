"""Which implementation serves which op on which device, and why.

Backends, best first where several can serve: ``cuda`` (CUDA C++), ``triton``, ``cpp`` (C++ on the
CPU), ``reference`` (plain PyTorch); for the ops of the output head ``triton`` comes first. The
choice is automatic and visible: `explain` tells it, ``drrlhf doctor`` prints it, and each op that
falls through to a slower backend logs the reason once. A backend asked for by name, with `use` or
the environment variable DRRLHF_BACKEND, serves or raises `BackendError` with the reason; it never
falls through.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from drrlhf.conventions import FUSED_PAIR_LOSS

logger = logging.getLogger(__name__)

NAMES = ("cuda", "triton", "cpp", "reference")
OPS = (
    "robust_risk",
    "row_worst_case",
    "sequence_preference_loss",
    "sequence_logprobs",
    "sequence_logprobs_backward",
    "token_logprobs",
    "token_logprobs_backward",
    "token_logprobs_backward_",
    "linear_token_logprobs",
    "linear_token_logprobs_backward",
    "policy_loss",
    "policy_loss_backward",
)
DEVICES = {"cuda": ("cuda",), "triton": ("cuda", "xpu"), "cpp": ("cpu",)}
SERVED: dict[str, frozenset[str]] = {
    "cpp": frozenset(OPS),
    "triton": frozenset(OPS),
    "cuda": frozenset(op for op in OPS if not op.startswith(("policy_", "row_"))),
    "reference": frozenset(OPS),
}
# What is one product after another Triton does best: there the softmax is part of the product. On
# an H100 (2026-11-26, frozen head, in products) it took 2.3 against 2.4 of CUDA's chunks; with a
# trained head 5.8 against 4.8, before its kernels became those of `head_products`, of which the
# parts measured add up to 4.2. Rows of logits are CUDA's: 2493 GB/s against 1819, and a call of the
# pair losses takes 70 to 110 µs against 185 to 300.
TRITON_FIRST = frozenset(op for op in OPS if op.startswith("linear_"))
# The folder that has a file for each op and its backward, or the torch.library that holds the ops.
FOLDERS = {"triton": "kernels", "reference": "reference"}
LIBRARIES = {"cpp": "drrlhf_cpp", "cuda": "drrlhf_cpp"}
# What a row of `explain` adds to the choice.
NOTES = {
    "sequence_preference_loss": (
        f"for loss_type {FUSED_PAIR_LOSS!r}; the others are sequence_logprobs, pair losses in "
        "plain PyTorch and robust_risk"
    )
}
# Ops over the vocabulary: fast in the dtypes of models, and float64 is for checking them.
NO_FLOAT64 = frozenset(op for op in OPS if "token_logprobs" in op)


class BackendError(RuntimeError):
    """A backend asked for by name cannot serve."""


class Choice(NamedTuple):
    """One row of `explain`: may `backend` serve `op` on `device`, is it chosen, and why (not)."""

    op: str
    device: str
    backend: str
    chosen: bool
    reason: str


def _load_extension() -> tuple[ModuleType | None, str]:
    try:
        return importlib.import_module("drrlhf._C"), ""
    except ImportError as error:  # not built, or built against another torch: the reason is kept
        if not isinstance(error, ModuleNotFoundError):
            return None, f"the C++ extension does not load: {error}"
        unknown = "the C++ extension is not built here, and no build is on record"
        return None, build_record().get("reason") or unknown


def build_record() -> dict[str, Any]:
    """What setup.py wrote about its build; empty when it never ran here."""
    path = Path(__file__).with_name("_build.json")
    return json.loads(path.read_text()) if path.exists() else {}


_EXTENSION, _NO_EXTENSION = _load_extension()


def build_info() -> dict[str, Any]:
    """What was built: built, mode, compiler, torch_version, isa; reason where nothing was."""
    found = {"mode": "none"} if _EXTENSION is None else _EXTENSION.build_info()
    return {"built": _EXTENSION is not None, "reason": _NO_EXTENSION, **found}


OLDEST_TRITON = (3, 6)
OLDEST_CAPABILITY = (8, 0)  # of an NVIDIA GPU


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def _no_triton(index: int | None = None) -> str:
    """Why Triton kernels cannot run on a GPU, the current one unless told; empty when they can."""
    try:
        # As it is imported, whatever the distribution is called that brought it.
        version = str(importlib.import_module("triton").__version__)
    except ModuleNotFoundError:
        return "triton is not installed; a GPU build of torch brings it, as pip install triton does"
    except ImportError as error:
        return f"triton does not load: {error}"
    if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < OLDEST_TRITON:
        return f"triton {version} is too old; install triton>={_dotted(OLDEST_TRITON)}"
    if torch.cuda.is_available() and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(index)
        if capability < OLDEST_CAPABILITY:
            oldest, own = _dotted(OLDEST_CAPABILITY), _dotted(capability)
            return f"needs compute capability {oldest}, this GPU has {own}"
    return ""


def _runs_on(capability: tuple[int, int], architectures: Sequence[str]) -> bool:
    """Whether code built for architectures such as "8.0", "9.0a", "10.0+PTX" runs on a GPU.

    What "9.0a" may use no other capability has, and what "10.0f" may use no other family: neither
    has PTX that goes further.
    """
    for architecture in architectures:
        number, _, ptx = architecture.partition("+")
        letter = number.lstrip("0123456789.")
        major, minor = (int(part) for part in number.removesuffix(letter).split("."))
        if letter == "a":
            runs = capability == (major, minor)
        else:
            runs = capability[0] == major and capability[1] >= minor
        if runs or (ptx and not letter and capability >= (major, minor)):
            return True
    return False


def _no_cuda(index: int | None = None) -> str:
    """Why CUDA C++ kernels cannot run on a GPU, the current one unless told; empty if they can."""
    if _EXTENSION is None:
        return _NO_EXTENSION
    info = _EXTENSION.build_info()
    if not info["cuda"]:
        reason = build_record().get("cuda_reason") or "no reason is on record"
        return (
            f"the extension was built without CUDA kernels ({reason}); DRRLHF_BUILD=cuda pip "
            "install --no-build-isolation builds them"
        )
    if torch.cuda.is_available():
        capability, built = torch.cuda.get_device_capability(index), info["cuda_architectures"]
        if not _runs_on(capability, built):
            own = _dotted(capability)
            return (
                f"has kernels for compute capability {', '.join(built)}, this GPU has {own}; "
                f"rebuild with TORCH_CUDA_ARCH_LIST={own}"
            )
    return ""


def interprets() -> bool:
    """Whether Triton kernels run in its interpreter (TRITON_INTERPRET=1), on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") not in ("", "0")


def _obstacle(
    op: str, backend: str, device: str, float64: bool = False, index: int | None = None
) -> str:
    """Why `backend` cannot serve `op` on `device`; empty when it can."""
    if op not in SERVED[backend]:
        return f"has no {op} kernel in this version"
    # Interpreted kernels are for those who ask for them by name: they take seconds.
    interpreted = backend == "triton" and device == "cpu" and _forced == "triton" and interprets()
    if backend in DEVICES and device not in DEVICES[backend] and not interpreted:
        asked = "; TRITON_INTERPRET=1 beside DRRLHF_BACKEND=triton interprets it, for tests"
        hint = asked if backend == "triton" else ""
        return f"runs on {'/'.join(DEVICES[backend])} tensors, not on {device}{hint}"
    if backend == "triton" and (reason := _no_triton(index)):
        return reason
    if backend == "cuda" and (reason := _no_cuda(index)):
        return reason
    if backend == "cpp" and _EXTENSION is None:
        return _NO_EXTENSION
    if float64 and op in NO_FLOAT64 and backend != "reference":
        return "takes float32, bfloat16 and float16; float64 is the reference's"
    return ""


def _implementation(op: str, backend: str) -> Callable[..., Any]:
    if backend in FOLDERS:
        file = op.split("_backward")[0]
        return getattr(importlib.import_module(f"drrlhf.{FOLDERS[backend]}.{file}"), op)
    return getattr(getattr(torch.ops, LIBRARIES[backend]), op).default


def _checked(name: str | None, argument: str = "backend") -> str | None:
    if name in (None, "", "auto"):
        return None
    if name not in NAMES:
        raise ValueError(f"{argument}: expected one of {', '.join(NAMES)} or 'auto', got {name!r}")
    return name


_VARIABLE = "DRRLHF_BACKEND"
_forced: str | None = _checked(os.environ.get(_VARIABLE), f"environment variable {_VARIABLE}")
_cache: dict[tuple[str, str, int | None, bool], Callable[..., Any]] = {}


def _force(name: str | None) -> None:
    global _forced
    _forced = name
    _cache.clear()


class use:
    """Serve every op by the backend `name` ("auto" ends that). A call or a context manager.

    Raises:
        ValueError: no such backend.
        BackendError: from the op that it cannot serve, when that op runs.
    """

    def __init__(self, name: str | None) -> None:
        self._previous = _forced
        _force(_checked(name))

    def __enter__(self) -> use:
        return self

    def __exit__(self, *_: object) -> None:
        _force(self._previous)


def _order(op: str) -> tuple[str, ...]:
    """Backends, best first."""
    if op in TRITON_FIRST:
        return tuple(sorted(NAMES, key=lambda name: name != "triton"))
    return NAMES


def _choose(
    op: str, device: str, float64: bool = False, index: int | None = None
) -> tuple[str, dict[str, str]]:
    """The serving backend and the obstacles of those that would come first."""
    obstacles: dict[str, str] = {}
    for backend in _order(op) if _forced is None else (_forced,):
        obstacle = _obstacle(op, backend, device, float64, index)
        if not obstacle:
            return backend, obstacles
        obstacles[backend] = obstacle
    serving = next(b for b in _order(op) if not _obstacle(op, b, device, float64, index))
    raise BackendError(
        f"backend {_forced!r} was asked for by name but cannot serve {op} on {device}: "
        f"{obstacles[str(_forced)]}; {serving} would: see `drrlhf doctor`, or use 'auto'"
    )


def serving(op: str, device: str) -> str:
    """The name of the backend that serves `op` on `device`."""
    return _choose(op, device)[0]


def kernel(
    op: str, device: str, dtype: torch.dtype = torch.float32, index: int | None = None
) -> Callable[..., Any]:
    """The function that serves `op` for tensors of `dtype` on `device` ("cpu", "cuda", ...).

    index: which GPU, for several may differ; ops name it. None asks about the current one, once.
    """
    float64 = dtype == torch.float64
    found = _cache.get((op, device, index, float64))
    if found is None:
        backend, obstacles = _choose(op, device, float64, index)
        missed = {
            b: why for b, why in obstacles.items() if device in DEVICES[b] and op in SERVED[b]
        }
        if backend == "reference" and missed and not (float64 and op in NO_FLOAT64):
            reasons = "; ".join(f"{b}: {why}" for b, why in missed.items())
            logger.warning("%s on %s is served by plain PyTorch (%s)", op, device, reasons)
        found = _cache[(op, device, index, float64)] = _implementation(op, backend)
    return found


def explain() -> list[Choice]:
    """Every op, device and backend: which one serves, and why the others do not."""
    rows = []
    for op in OPS:
        for device in ("cpu", "cuda"):
            try:
                chosen, why_none = _choose(op, device)[0], ""
            except BackendError:
                chosen, why_none = "", f"DRRLHF_BACKEND or use() asks for {_forced!r} alone"
            for backend in NAMES:
                reason = _obstacle(op, backend, device)
                if not reason:
                    reason = NOTES.get(op, "")
                    if backend != chosen:
                        reason = why_none or f"{chosen} comes first"
                rows.append(Choice(op, device, backend, backend == chosen, reason))
    return rows
