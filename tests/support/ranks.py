"""Run a function on several gloo processes and collect what each rank returned or raised."""

from __future__ import annotations

import datetime
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

LIMIT = 120  # seconds for everything; a hang is a failure, not a wait


def _work(
    rank: int, world: int, folder: str, timeout: float, function: Any, arguments: Any
) -> None:
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=world,
        timeout=datetime.timedelta(seconds=timeout),
    )
    torch.save(caught(function, rank, *arguments), f"{folder}/{rank}.pt")
    # Leaving without a farewell: a rank that failed must not make this one wait for it.
    os._exit(0)


def caught(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or (type, message, traceback) of what it raises."""
    try:
        return function(*arguments)
    except Exception as error:
        return type(error).__name__, str(error), traceback.format_exc()


def in_turn(rank: int, calls: list[tuple]) -> list[Any]:
    """For `on_ranks`: several (function, *arguments), one after the other, in one start of the
    processes; what each gave."""
    return [caught(function, rank, *arguments) for function, *arguments in calls]


def on_ranks(
    world: int, function: Callable[..., Any], *arguments: Any, timeout: float = 60
) -> list[Any]:
    """What ``function(rank, *arguments)`` returns on each rank.

    An exception comes back as (type, message, traceback), and None means that the rank died.
    ``function`` must be importable; ``timeout`` is the process group's, in seconds.
    """
    context = multiprocessing.get_context("forkserver")
    # Imported once, by the server that all ranks are forked from; ranks of the ops do without trl.
    context.set_forkserver_preload(["torch", "drrlhf", *({"drrlhf.trl"} & {*sys.modules})])
    with tempfile.TemporaryDirectory() as folder:
        processes = [
            context.Process(target=_work, args=(rank, world, folder, timeout, function, arguments))
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        end = time.monotonic() + LIMIT
        for process in processes:
            process.join(max(0.0, end - time.monotonic()))
        hanging = [process for process in processes if process.is_alive()]
        for process in hanging:
            process.kill()
        assert not hanging, f"{len(hanging)} of {world} ranks hung for {LIMIT} seconds"
        files = [Path(folder) / f"{rank}.pt" for rank in range(world)]
        return [torch.load(f, weights_only=False) if f.exists() else None for f in files]
