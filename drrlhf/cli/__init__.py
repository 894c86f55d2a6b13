"""The ``drrlhf`` command. Heavy imports happen inside the commands, so that --help is instant."""

from __future__ import annotations

from typing import Annotated

import typer

from drrlhf.cli import bench, doctor, stress, suggest_radius, train
from drrlhf.version import __version__

app = typer.Typer(
    name="drrlhf",
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
