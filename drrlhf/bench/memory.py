"""Peak memory of one run beyond what was held before it."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from drrlhf.bench.timing import no_collection

MIB = 1 << 20
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def obstacle(device: str) -> str:
    """Why peak memory cannot be metered on this device type here; empty when it can."""
    if device == "cuda":
        return ""
    if not sys.platform.startswith("linux"):
        return f"peak memory is read from /proc/self, which Linux has and {sys.platform} has not"
    try:
        _CLEAR.write_text("5")
    except OSError as error:
        return f"peak memory cannot be reset through {_CLEAR}: {error.strerror}"
    return ""


def peak_extra_bytes(run: Callable[[], object], device: str = "cpu") -> int:
    """Most bytes that `run` held at once beyond those held when it began.

    On a CPU: resident memory of the process, with what the allocator kept of freed blocks given
    back first; exact to about a MiB, other threads' allocations included. On CUDA: torch's own
    count.

    Raises:
        RuntimeError: it cannot be metered here, with the reason of `obstacle`.
    """
    if reason := obstacle(device):
        raise RuntimeError(reason)
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held
    ctypes.CDLL(None).malloc_trim(0)
    # A collection of garbage from before, in the middle of the run, would hide what it holds.
    with no_collection():
        _CLEAR.write_text("5")  # the peak (VmHWM) starts again from what is resident now
        held = _kib(_STATUS, "VmRSS")
        run()
    return max(0, _kib(_STATUS, "VmHWM") - held)


def available_bytes(device: str) -> int | None:
    """Bytes that can still be allocated; None where it is not told."""
    if device == "cuda":
        held_free = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + held_free
    info = Path("/proc/meminfo")
    return _kib(info, "MemAvailable") if info.exists() else None


def _kib(path: Path, field: str) -> int:
    """The bytes of a line such as ``VmRSS:   123 kB``."""
    for line in path.read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0]) * 1024
    raise RuntimeError(f"{path} has no line {field}")
