"""``drrlhf train reward|dpo|grpo``: the commands; their options are listed in settings.py, the work
is in run.py and drrlhf.demo."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import Any

import typer

from drrlhf.cli import _console, run
from drrlhf.cli.settings import DEFAULT_AMBIGUITY, DEMO_AMBIGUITY, takes

app = typer.Typer(
    help="Train a reward model, or a policy by DPO or GRPO, with worst-case weights over each "
    "step's pairs or prompts.",
    no_args_is_help=True,
)
# Options that a demonstration takes, and packages that it needs beside those of training.
_DEMOS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "reward": (("seeds", "quick"), ()),
    "dpo": (("max_steps", "ambiguity", "seed"), ("peft", "gguf")),
    "grpo": (("max_steps", "ambiguity", "seeds"), ("peft", "gguf")),
}


@app.command()
@takes("reward")
def reward(ctx: typer.Context, **options: Any) -> None:
    """Train a reward model on preference pairs.

    Example:

        drrlhf train reward --data pairs.jsonl --model DIR --ambiguity tv:0.1 --output-dir out

        drrlhf train reward --demo --output-dir demo
    """
    _run(ctx, "reward")


@app.command()
@takes("dpo")
def dpo(ctx: typer.Context, **options: Any) -> None:
    """Train a policy by direct preference optimisation.

    Example:

        drrlhf train dpo --data pairs.jsonl --model DIR --ambiguity kl:0.1 --lora --output-dir out

        drrlhf train dpo --demo
    """
    _run(ctx, "dpo")


@app.command()
@takes("grpo")
def grpo(ctx: typer.Context, **options: Any) -> None:
    """Train a policy on rewards of what it writes (GRPO), against the worst prompts of each step.

    Example:

        drrlhf train grpo --data prompts.jsonl --model DIR --reward my_module:score --output-dir out

        drrlhf train grpo --demo
    """
    _run(ctx, "grpo")


def _run(ctx: typer.Context, kind: str) -> None:
    _console.ignore_upstream_deprecations()
    if ctx.params["demo"]:
        _demo(ctx, kind)
    elif odd := sorted({*_given(ctx)} & {"seeds", "quick"}):
        raise _console.fail(f"--{odd[0]} belongs to --demo")
    else:
        _train(ctx, kind)


def _train(ctx: typer.Context, kind: str) -> None:
    """Missing options, then over to run.py; ends the command with the run's exit status."""
    options = dict(ctx.params)
    needed = ("data", "model", *(["reward"] if kind == "grpo" else []), "output_dir")
    missing = [f"--{n.replace('_', '-')}" for n in needed if not options[n]]
    if missing:
        raise _console.fail(
            f"missing {', '.join(missing)} (or --demo); see {ctx.command_path} --help"
        )
    if options["ambiguity"] is None:
        options["ambiguity"] = DEFAULT_AMBIGUITY
    raise typer.Exit(run.run(kind, options, _console.console(), _resume_command(ctx)))


def _demo(ctx: typer.Context, kind: str) -> None:
    """The demonstration of a kind, which takes few of the options."""
    own, needed = _DEMOS[kind]
    if odd := sorted({*_given(ctx)} - {*own, "output_dir", "demo"}):
        names = ", ".join(f"--{name.replace('_', '-')}" for name in odd)
        raise _console.fail(f"--demo brings its own data, model and settings: leave out {names}")
    with _console.user_errors():
        run.require(*needed)
        from drrlhf.demo import material

        demo = importlib.import_module(f"drrlhf.demo.{kind}")
    chosen = {name: ctx.params[name] for name in own}
    if "ambiguity" in own and chosen["ambiguity"] is None:
        chosen["ambiguity"] = DEMO_AMBIGUITY
    if (steps := chosen.pop("max_steps", -1)) != -1:
        chosen["steps"] = steps
    with _console.user_errors(material.MaterialError):
        folder = Path(ctx.params["output_dir"] or ("demo" if kind == "reward" else f"demo-{kind}"))
        demo.run(folder, console=_console.console(), **chosen)


def _given(ctx: typer.Context) -> dict[str, Any]:
    """The click parameters that stand on the command line, by name."""
    given = {}
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if parameter.name and source and source.name == "COMMANDLINE":
            given[parameter.name] = parameter
    return given


def _resume_command(ctx: typer.Context) -> str:
    """The command line that continues this run: what was given, --resume, no --overwrite."""
    words = ctx.command_path.split()
    for name, parameter in _given(ctx).items():
        if name in ("resume", "overwrite"):
            continue
        value = ctx.params[name]
        if isinstance(value, bool):
            words.append((parameter.opts if value else parameter.secondary_opts)[0])
        else:
            words += [parameter.opts[0], str(value)]
    return shlex.join([*words, "--resume"])
