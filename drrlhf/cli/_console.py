"""What every command prints through."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

USAGE_ERROR = 2
UNBOUNDED = 100_000  # characters: wider than any table


def console(**how: Any) -> Console:
    """Standard output as it is now (tests and callers may have replaced it)."""
    return Console(**how)


def plain() -> Console:
    """A `console` for words of users: nothing in them is markup, and no number is coloured."""
    return console(markup=False, highlight=False)


def status(console: Console, words: str) -> Any:
    """What is being done, beside a spinner, while the context lasts. rich reads a string there as
    markup on any console, and a path may hold brackets."""
    return console.status(Text(words))


def print_table(
    console: Console, title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> None:
    """A table of names in the first column and numbers in the others. Where that is wider than the
    terminal, which would cut its numbers, it is turned: a column for each of the rows."""
    made = _table(title, heads, rows)
    unbounded = console.options.update(max_width=UNBOUNDED)
    if console.measure(made, options=unbounded).maximum > console.width:
        made = _table(title, *_turned(heads, rows))
    console.print(made)


def _turned(
    heads: Sequence[str], rows: Sequence[Sequence[str]]
) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    first, *others = zip(heads, *rows, strict=True)
    return first, others


def _table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    made = Table(box=box.SIMPLE_HEAD, title=title)
    for place, head in enumerate(heads):
        made.add_column(head, justify="right" if place else "left", no_wrap=True)
    for row in rows:
        made.add_row(*row)
    return made


@contextlib.contextmanager
def progress(console: Console) -> Iterator[Callable[[str, int, int], None]]:
    """A bar, gone at the end; what is yielded is told (what is done, so much, of so much)."""
    from rich import progress as of

    columns = (of.TextColumn("{task.description}"), of.BarColumn(20), of.MofNCompleteColumn())
    left = of.TimeRemainingColumn()
    with of.Progress(*columns, left, console=console, transient=True) as bars:
        task = bars.add_task("", total=None)
        yield lambda what, done, total: bars.update(
            task, description=what, completed=done, total=total
        )


def fail(message: object) -> typer.Exit:
    """Print `message` on standard error as one red line; raise what is returned."""
    text = Text("error: " + " ".join(str(message).split()), style="bold red")
    Console(stderr=True).print(text, soft_wrap=True)
    return typer.Exit(USAGE_ERROR)


def ignore_upstream_deprecations() -> None:
    """Deprecations between transformers and TRL are not for the user of a command to mend."""
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers|trl")


@contextlib.contextmanager
def user_errors(*more: type[Exception]) -> Iterator[None]:
    """Errors that the caller can mend become one line and exit status 2 instead of a traceback.

    Bad values and data, missing files and packages, and the types in `more`; anything else is a
    defect of ours and keeps its traceback.
    """
    mendable: tuple[type[Exception], ...] = (ValueError, OSError, ImportError, *more)
    try:
        yield
    except mendable as error:
        raise fail(error) from None
