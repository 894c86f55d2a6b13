"""Where the time of one run goes: by kernel on a GPU, by operator on a CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch.profiler import ProfilerActivity

from drrlhf.bench.registry import Work

MOST_ROWS = 25
Profile = dict[str, Any]


def of(work: Work, device: str, most: int = MOST_ROWS) -> Profile:
    """One run of `work`, after one that warms up: what took longest, and all of it together.

    Keys: by ("kernel" on a GPU, "operator" on a CPU, its own time alone), total_ms, launches (all
    of them), and rows, longest first: name, launches, ms. Profiling slows a run down; shares
    are what to read.
    """
    activity = ProfilerActivity.CUDA if device == "cuda" else ProfilerActivity.CPU
    work.once()
    work.before()
    with torch.profiler.profile(activities=[activity]) as profiled:
        work.run()
        if device == "cuda":
            torch.cuda.synchronize()
    found = []
    for event in profiled.key_averages():
        own: float = event.self_device_time_total if device == "cuda" else event.self_cpu_time_total
        # On a GPU the host's side has rows too, without any time on the device.
        if own > 0:
            found.append({"name": event.key, "launches": event.count, "ms": own / 1e3})
    found.sort(key=lambda row: -row["ms"])
    return {
        "by": "kernel" if device == "cuda" else "operator",
        "total_ms": sum(row["ms"] for row in found),
        "launches": sum(row["launches"] for row in found),
        "rows": found[:most],
    }
