"""``drrlhf bench``: the options, the progress, the exit status; the work is in drrlhf.bench."""

from __future__ import annotations

import importlib.util
import itertools
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from drrlhf.cli import _console

if TYPE_CHECKING:
    from rich.console import Console

    from drrlhf.bench.registry import Case
    from drrlhf.bench.runner import Outcome

DEFAULT_RESULTS = Path("benchmarks/results")
GATE_FAILED = 1
INTERRUPTED = 128 + signal.SIGINT


def bench(
    suite: Annotated[
        Literal["cpu", "gpu", "quick"],
        typer.Option(help="Shapes and device; quick is tiny and proves only that it works."),
    ] = "cpu",
    op: Annotated[
        list[str] | None, typer.Option(help="Only this op; give it again for more of them.")
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Rounds of each case; contenders that take long have fewer, three at least.",
            show_default="15",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(file_okay=False, help="Folder for <suite>_<device>_<date>.json."),
    ] = None,
    plot: Annotated[
        bool,
        typer.Option("--plot", help="Draw ratios and scaling, in --output or the current folder."),
    ] = False,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's own")
    ] = None,
    readme: Annotated[
        bool,
        typer.Option(
            "--readme",
            help="Measure nothing: print the README's tables from the newest results in --output "
            "or benchmarks/results.",
        ),
    ] = False,
) -> None:
    """Time every op beside plain PyTorch and other libraries, each checked against float64 first.

    Exit status 1 when a result of ours is wrong; its speed is not shown.

    Example:

        drrlhf bench --op robust_risk --op token_logprobs

        drrlhf bench --output benchmarks/results --plot
    """
    if readme:
        _print_readme(output or DEFAULT_RESULTS)
        return
    _console.hush_deprecations()
    with _console.user_errors():
        cases = _cases(suite, op or [], plot, threads)
    console = _console.console()
    outcomes: list[Outcome] = []
    interrupted = False
    try:
        _measure(cases, suite, rounds, outcomes, console)
    except KeyboardInterrupt:
        interrupted = True
        console.print(f"Interrupted after {len(outcomes)} of {len(cases)} cases.")
    finally:  # a defect of ours in the last case must not lose an hour of the others
        _keep(suite, outcomes, output, plot, console)
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


def _cases(suite: str, ops: list[str], plot: bool, threads: int | None) -> list[Case]:
    """What will be measured; whatever the caller can mend is found here."""
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib, not installed here: pip install 'drrlhf[trl]'")
    import torch

    from drrlhf.bench.registry import SUITES, select

    if SUITES[suite] == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            f"--suite {suite} needs a CUDA device, and torch {torch.__version__} finds none here; "
            "take --suite cpu"
        )
    if threads is not None:
        torch.set_num_threads(threads)
    return select(suite, ops)


def _measure(
    cases: list[Case], suite: str, rounds: int | None, outcomes: list[Outcome], console: Console
) -> None:
    """Run the cases; what each gave is printed, and added to `outcomes`, as soon as it is there."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    from drrlhf.bench import runner, table

    columns = (BarColumn(20), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(
        *columns, TextColumn("{task.description}"), console=console, transient=True,
        disable=not console.is_terminal,
    )  # fmt: skip
    with progress:
        task = progress.add_task("", total=len(cases))
        for op, group in itertools.groupby(cases, key=lambda case: case.op):
            console.print(op, style="bold")
            for case in group:
                progress.update(task, description=str(case))
                outcome = runner.run(case, suite, rounds=rounds or runner.DEFAULT_ROUNDS)
                outcomes.append(outcome)
                console.print(table.screen(outcome), highlight=False)
                progress.advance(task)
    if any(outcome.records for outcome in outcomes):
        console.print(table.LEGEND, style="dim", highlight=False)


def _keep(
    suite: str, outcomes: list[Outcome], output: Path | None, plot: bool, console: Console
) -> None:
    """Write the result file and the pictures that were asked for."""
    if not outcomes or not (output or plot):
        return
    from drrlhf.bench import results

    result = results.collect(suite, outcomes)
    written = []
    if output:
        written.append(results.write(result, output))
        result = results.read(written[0])
    if plot:
        from drrlhf.bench import plots

        written += plots.plot(result, output or Path(), results.stem(result))
    for path in written:
        console.print(str(path), soft_wrap=True, highlight=False)
