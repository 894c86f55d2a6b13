"""``drrlhf bench``: the options, the progress, the exit status; the work is in drrlhf.bench."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import signal
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import typer

from drrlhf.cli import _console
from drrlhf.cli._options import option, taken_from

if TYPE_CHECKING:
    from rich.console import Console

    from drrlhf.bench.budget import Budget
    from drrlhf.bench.registry import Case
    from drrlhf.bench.runner import Outcome

DEFAULT_RESULTS = Path("benchmarks/results")
GATE_FAILED = 1
INTERRUPTED = 128 + signal.SIGINT


@dataclasses.dataclass(frozen=True)
class Options:
    """What the command takes, in the order of its --help."""

    suite: Literal["cpu", "gpu", "quick"] = option(
        "cpu", "Shapes and device; quick is tiny and proves only that it works."
    )
    op: list[str] | None = option(None, "Only this op; give it again for more of them.")
    rounds: int | None = option(
        None,
        "Rounds of each case; implementations that take long have fewer, three at least.",
        min=1,
        show_default="15",
    )
    seconds: float | None = option(
        None,
        "Time for all cases: the most valuable first, and what it leaves out is listed.",
        show_default="no limit",
    )
    output: Path | None = option(
        None, "Folder for <suite>_<device>_<date>.json, written after every case.", file_okay=False
    )
    plot: bool = option(
        False, "Draw ratios and scaling, in --output or the current folder.", "--plot"
    )
    threads: int | None = option(None, "CPU threads.", min=1, show_default="torch's own")
    readme: bool = option(
        False,
        "Measure nothing: print the README's tables from the newest results in --output "
        "or benchmarks/results.",
        "--readme",
    )


@taken_from(Options)
def bench(options: Options) -> None:
    """Time every op beside plain PyTorch and other libraries, each checked against float64 first.

    Exit status 1 when a result of ours is wrong; its speed is not shown.

    Example:

        drrlhf bench --op robust_risk --op token_logprobs

        drrlhf bench --output benchmarks/results --plot

        drrlhf bench --suite gpu --seconds 240 --output benchmarks/results
    """
    if options.readme:
        _print_readme(options.output or DEFAULT_RESULTS)
        return
    _console.ignore_upstream_deprecations()
    with _console.user_errors():
        from drrlhf.bench.budget import Budget

        budget = Budget(options.seconds)
        cases = _cases(options)
    console = _console.console()
    outcomes: list[Outcome] = []
    interrupted = False
    keep = _Keeper(options.suite, options.output)
    try:
        _measure(cases, options, budget, outcomes, keep, console)
    except KeyboardInterrupt:
        interrupted = True
        console.print(f"Interrupted after {len(outcomes)} of {len(cases)} cases.")
    finally:  # a defect of ours in the last case must not lose an hour of the others
        for path in keep.everything(outcomes, options.plot):
            console.print(str(path), soft_wrap=True, highlight=False)
    failed = [outcome for outcome in outcomes if outcome.failures]
    for outcome in failed:
        console.print(
            f"FAILED: {outcome.case.op}, {outcome.case}", style="bold red", highlight=False
        )
    if interrupted or failed:
        raise typer.Exit(INTERRUPTED if interrupted else GATE_FAILED)


def _print_readme(folder: Path) -> None:
    from drrlhf.bench.table import readme_tables

    with _console.user_errors():
        tables = readme_tables(folder)
        if not tables:
            raise ValueError(
                f"--readme: {folder} has no result of the cpu suite; measure one with drrlhf bench "
                f"--output {folder}, or name another folder with --output"
            )
    typer.echo("\n\n".join(tables.values()))


def _cases(options: Options) -> list[Case]:
    """What will be measured; whatever the caller can mend is found here."""
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib, not installed here: pip install 'drrlhf[trl]'")
    import torch

    from drrlhf.bench.registry import SUITES, most_valuable_first, select

    if SUITES[options.suite] == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--suite {options.suite} needs a CUDA device, and torch {torch.__version__} finds "
            "none here; take --suite cpu"
        )
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    cases = select(options.suite, options.op or [])
    return cases if options.seconds is None else most_valuable_first(cases)


def _measure(
    cases: list[Case],
    options: Options,
    budget: Budget,
    outcomes: list[Outcome],
    keep: _Keeper,
    console: Console,
) -> None:
    """Run the cases; what each gave is printed, kept and added to `outcomes` when it is there."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from drrlhf.bench import runner, table
    from drrlhf.bench.budget import LEFT_OUT

    late: list[Case] = []
    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(
        *columns,
        TextColumn("{task.description}"),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    with progress:
        task = progress.add_task("", total=len(cases))
        for op, group in itertools.groupby(cases, key=lambda case: case.op):
            titled = False
            for case in group:
                progress.update(task, description=str(case))
                rounds = options.rounds or runner.DEFAULT_ROUNDS
                outcome = runner.run(case, options.suite, rounds=rounds, budget=budget)
                outcomes.append(outcome)
                progress.advance(task)
                if outcome.skipped.get("") == LEFT_OUT:
                    late.append(case)
                    continue
                keep.records(outcomes)
                if not titled:
                    console.print(op, style="bold")
                    titled = True
                console.print(table.screen(outcome), highlight=False)
    if any(outcome.records for outcome in outcomes):
        console.print(table.LEGEND, style="dim", highlight=False)
    if late:
        console.print(f"Left out for want of time, {len(late)} of {len(cases)} cases:")
        for case in late:
            console.print(f"  {case.op}, {case}", style="dim", highlight=False)


class _Keeper:
    """The result file, if one is asked for: whole after every case."""

    def __init__(self, suite: str, output: Path | None) -> None:
        from drrlhf.bench import results

        self.output = output
        # The file keeps the day that its run began on.
        self.collected = partial(results.collect, suite, taken_on=results.background(suite))

    def records(self, outcomes: list[Outcome]) -> Path | None:
        """Write what there is."""
        from drrlhf.bench import results

        if not outcomes or self.output is None:
            return None
        return results.write(self.collected(outcomes), self.output)

    def everything(self, outcomes: list[Outcome], plot: bool) -> list[Path]:
        """Write the result file and the pictures that were asked for; their paths."""
        from drrlhf.bench import results

        path = self.records(outcomes)
        written = [] if path is None else [path]
        if plot and outcomes:
            from drrlhf.bench import plots

            result = self.collected(outcomes) if path is None else results.read(path)
            written += plots.plot(result, self.output or Path(), results.stem(result))
        return written
