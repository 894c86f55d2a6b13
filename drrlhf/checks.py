"""Argument checks that stay out of the way of graphs and devices."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C import _functorch as functorch

F = TypeVar("F", bound=Callable[..., Any])

# DRRLHF_DEBUG=1: devices assert what they otherwise answer with NaN.
DEBUG = os.environ.get("DRRLHF_DEBUG", "0") not in ("", "0")


def constant_in_graphs(function: F) -> F:
    """A function of constants: compiled graphs call it once, while they are traced.

    What torch.compiler.assume_constant_result does, without its second of import time.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def check_none(
    bad: Callable[[], Tensor], message: Callable[..., str], on: Tensor, wanted: bool = False
) -> None:
    """ValueError where `bad`, a bool tensor when called, holds; `message` is told its first place,
    after a function that gives any tensor as it is there: under `torch.func.vmap` that of the first
    sample that is wrong.

    On the CPU it raises at once; a graph compiled for it asserts in the graph. On other devices
    reading the answer would synchronise, and asking costs launches: what is wrong gives NaN there,
    never a device assert, which would end the context of everything else in the process. Two
    exceptions: a check that the caller `wanted` is read and raises, where it can be read (not in a
    compiled graph, nor in a captured one); and DRRLHF_DEBUG=1 makes the device assert all of them.
    """
    cpu, compiling = on.device.type == "cpu", torch.compiler.is_compiling()
    if not compiling and (cpu or (wanted and _readable(on))):
        found, levels = _beneath_transforms(bad())
        if bool(found.any()):
            where = found.nonzero()[0].tolist()
            sample = dict(zip(levels, where))

            def read(x: Tensor) -> Tensor:
                x, own = _beneath_transforms(x)
                return x[tuple(sample.get(level, 0) for level in own)]

            raise ValueError(message(read, *where[len(levels) :]))
    elif cpu or DEBUG:
        torch._assert_async(
            ~bad().any(), "drrlhf: an argument check failed; run on the CPU for more"
        )


def _beneath_transforms(x: Tensor) -> tuple[Tensor, list[int]]:
    """The tensor that `torch.func` has wrapped, whose values may be read: the dimensions that vmap
    took away come first, and the levels of these in their order."""
    levels: list[int] = []
    while functorch.is_functorch_wrapped_tensor(x):
        inner = functorch.get_unwrapped(x)
        if functorch.is_batchedtensor(x):
            levels.insert(0, functorch.maybe_get_level(x))
            inner = inner.movedim(functorch.maybe_get_bdim(x), 0)
        x = inner
    return x, levels


def _readable(on: Tensor) -> bool:
    """Whether there are values on the tensor's device, which no graph is being captured on."""
    kind = on.device.type
    return kind != "meta" and not (kind == "cuda" and torch.cuda.is_current_stream_capturing())


def check_tensor(name: str, value: Any, shape: str = "") -> None:
    """ValueError unless `value` is a tensor; `shape` is that which it should have, in words."""
    if not isinstance(value, Tensor):
        of_shape = f" of shape {shape}" if shape else ""
        raise ValueError(f"{name}: expected a torch.Tensor{of_shape}, got {type(value).__name__}")


def check_device(name: str, value: Any, like: str, on: Tensor) -> None:
    """ValueError unless `value`, if there is one, is a tensor on the device of `like`."""
    if value is None:
        return
    check_tensor(name, value)
    if value.device != on.device:
        raise ValueError(
            f"{name}: expected it on {on.device} as {like}, got {value.device}; move it with "
            f".to({str(on.device)!r})"
        )


def check_vector(
    name: str, value: Any, n: int | None = None, like: str = "losses", on: Tensor | None = None
) -> None:
    """ValueError unless `value` is a tensor of shape (n,) as `like`, and on the device of `on`."""
    check_tensor(name, value, "(n,)")
    if value.dim() != 1:
        raise ValueError(
            f"{name}: expected shape (n,), got {tuple(value.shape)}; flatten it, one number a pair"
        )
    if n is not None and value.numel() != n:
        raise ValueError(f"{name}: expected shape ({n},) as {like}, got {tuple(value.shape)}")
    if on is not None:
        check_device(name, value, like, on)


def check_floating(name: str, value: Any) -> None:
    """ValueError unless `value` is a tensor of a floating dtype."""
    check_tensor(name, value)
    if not value.is_floating_point():
        raise ValueError(
            f"{name}: expected a floating dtype (float32, bfloat16, float16, float64), "
            f"got {value.dtype}; call .float()"
        )


def integers(name: str, value: Any) -> Tensor:
    """`value` as int64; ValueError unless it is a tensor of an integer dtype.

    Compared as it is, a narrow one would turn the other number into its own dtype: a label of
    uint8 would be ignored for being 156, and outside of a vocabulary of 256 whatever it is.
    """
    check_tensor(name, value)
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise ValueError(f"{name}: expected an integer dtype, got {value.dtype}; call .long()")
    return value.long()


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    """ValueError unless `value` is one of `choices`; the nearest one is named."""
    if value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.3)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"{name}: unknown {value!r}; {hint}expected one of {', '.join(choices)}")
