"""Trainer callbacks of ``drrlhf train``: metrics on disk, a progress bar, an orderly Ctrl-C.

They work with any ``transformers.Trainer``.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState

from drrlhf.files import json_lines, write_text


class MetricsCallback(TrainerCallback):
    """Appends one JSON line per log event to `path`: step, epoch, seconds, event and the metrics.

    ``event`` is ``"train"`` or ``"eval"``. ``seconds`` is training time and ``num_tokens`` a total,
    both counted on across resumes. A value that is not finite is written as null. When training
    starts at step k > 0, lines after step k, which that checkpoint does not know, are removed
    first, so that a step never appears twice. A log is forced at every checkpoint: no line averages
    over steps on both sides of one, and a resumed run writes the lines of an uninterrupted one.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self.summary: dict[str, Any] = {}
        self._seconds_before = 0.0
        self._tokens_before = 0.0
        self._start = 0.0

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()
        lines = [line for line in json_lines(self.path) if line["step"] <= state.global_step]
        if lines:
            self._seconds_before = lines[-1]["seconds"]
            tokens = [line["num_tokens"] for line in lines if "num_tokens" in line]
            # Less what the trainer's state brings along: of that the trainer itself counts on.
            self._tokens_before = (tokens[-1] if tokens else 0.0) - state.num_input_tokens_seen
        if state.is_world_process_zero:
            write_text(self.path, "".join(map(_json_line, lines)))

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        if control.should_save:
            control.should_log = True
        return control

    def on_log(self, args: Any, state: TrainerState, *_: Any, logs: Any = None, **__: Any) -> None:
        logs = dict(logs or {})
        if "train_runtime" in logs:  # the closing summary of this call, not a step of the run
            self.summary = logs
            return
        event = "eval" if any(name.startswith("eval_") for name in logs) else "train"
        for name in ("num_tokens", "eval_num_tokens"):
            if name in logs:
                logs[name] += self._tokens_before
        logs.pop("epoch", None)
        seconds = self._seconds_before + time.perf_counter() - self._start
        line = {"step": state.global_step, "epoch": state.epoch, "seconds": round(seconds, 3)}
        if state.is_world_process_zero:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(_json_line(line | {"event": event} | logs))


def _json_line(record: dict[str, Any]) -> str:
    def finite(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps({name: finite(value) for name, value in record.items()}) + "\n"


class InterruptCallback(TrainerCallback):
    """Turns the first Ctrl-C (or SIGTERM) into "finish this step, save, stop"; a second stops now.

    Use ``with callback.installed(): trainer.train()``. Afterwards ``signum`` is the signal that
    stopped the run, or None. Outside the main thread no handler is installed. Several processes
    stop after the same step, whichever of them a signal has reached: one that goes on alone would
    wait for the others for good.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.signum: int | None = None
        self._told = False  # whether a signal has reached this process

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Handle the signals inside the block and restore the earlier handlers after it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.signal(signum, self._handle) for signum in self.SIGNALS}
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, frame: Any) -> None:
        if self._told:
            raise KeyboardInterrupt
        self._told, self.signum = True, signum
        # os.write: the handler may run in the middle of a buffered write, which print() forbids.
        os.write(2, b"\nStopping after this step and saving a checkpoint; again to stop at once.\n")

    def on_step_end(
        self, args: Any, state: TrainerState, control: TrainerControl, **_: Any
    ) -> TrainerControl:
        heard = self.signum or 0
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            of_all = torch.tensor(heard, device=args.device)
            dist.all_reduce(of_all, dist.ReduceOp.MAX)
            heard = int(of_all)
        if heard:
            self.signum = heard
            control.should_save = control.should_training_stop = True
        return control


class ProgressCallback(TrainerCallback):
    """One rich progress bar over optimizer steps with the last loss; evaluation gets its own line.

    Call :meth:`stop` in a ``finally``: an exception in training skips ``on_train_end``, and the
    bar would keep the terminal's cursor hidden.
    """

    def __init__(self, console: Console, title: str = "training") -> None:
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._title = title
        self._steps: Any = None
        self._evaluation: Any = None

    def on_train_begin(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        if state.is_world_process_zero:
            self._steps = self._progress.add_task(
                self._title, total=state.max_steps, completed=state.global_step, note=""
            )
            self._progress.start()

    def on_step_end(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        if self._steps is not None:
            self._progress.update(self._steps, completed=state.global_step)

    def on_log(self, args: Any, state: TrainerState, *_: Any, logs: Any = None, **__: Any) -> None:
        if self._steps is not None and logs and "loss" in logs:
            self._progress.update(self._steps, note=f"loss {logs['loss']:.4f}")

    def on_prediction_step(self, *_: Any, eval_dataloader: Any = None, **__: Any) -> None:
        if self._steps is None:
            return
        if self._evaluation is None:
            self._evaluation = self._progress.add_task(
                "evaluating", total=len(eval_dataloader), note=""
            )
        self._progress.advance(self._evaluation)

    def on_evaluate(self, args: Any, state: TrainerState, *_: Any, **__: Any) -> None:
        if self._evaluation is not None:
            self._progress.remove_task(self._evaluation)
            self._evaluation = None

    def stop(self) -> None:
        """Take the bar down; may be called twice."""
        self._progress.stop()
