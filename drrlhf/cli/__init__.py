"""The ``drrlhf`` command. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from drrlhf.cli import bench, doctor, stress, suggest_radius, train
from drrlhf.version import __version__


class _Root(TyperGroup):
    """The commands; in ``--option=~/path`` too a ~ is the home, which shells leave as it is."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [_with_home(one) for one in args])


def _with_home(argument: str) -> str:
    name, equals, value = argument.partition("=")
    is_option = name.startswith("--") and equals
    return f"{name}={os.path.expanduser(value)}" if is_option else argument


app = typer.Typer(
    name="drrlhf",
    cls=_Root,
    help="Distributionally robust preference tuning: train, measure, see what serves each op here.",
    no_args_is_help=True,
    add_completion=False,
)
app.add_typer(train.app, name="train")
app.command("bench")(bench.bench)
app.command("stress")(stress.stress)
app.command("suggest-radius")(suggest_radius.suggest_radius)
app.command("doctor")(doctor.doctor)


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"drrlhf {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point of the ``drrlhf`` script."""
    app(prog_name="drrlhf")
