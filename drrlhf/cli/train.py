"""``drrlhf train reward|dpo|grpo``: the commands; their options are listed in settings.py, the work
is in run.py and drrlhf.demo."""

from __future__ import annotations

import importlib
import shlex
from pathlib import Path
from typing import Any

import typer

from drrlhf.cli import _console, run
from drrlhf.cli.settings import DEFAULT_AMBIGUITY, takes

app = typer.Typer(
    help="Train a reward model, or a policy by DPO or GRPO, with worst-case weights over each "
    "step's pairs or prompts.",
    no_args_is_help=True,
)


@app.command()
@takes("reward")
def reward(ctx: typer.Context, **options: Any) -> None:
    """Train a reward model on preference pairs.

    Example:

        drrlhf train reward --data pairs.jsonl --model DIR --ambiguity tv:0.1 --output-dir out

        drrlhf train reward --demo --output-dir demo
    """
    _console.ignore_upstream_deprecations()
    if options["demo"]:
        _only_with_demo(ctx, {"output_dir", "seeds", "quick", "demo"})
        _reward_demo(Path(options["output_dir"] or "demo"), options["seeds"], options["quick"])
    else:
        _never_without_demo(ctx, {"seeds", "quick"})
        _train(ctx, "reward")


@app.command()
@takes("dpo")
def dpo(ctx: typer.Context, **options: Any) -> None:
    """Train a policy by direct preference optimisation.

    Example:

        drrlhf train dpo --data pairs.jsonl --model DIR --ambiguity kl:0.1 --lora --output-dir out

        drrlhf train dpo --demo
    """
    _console.ignore_upstream_deprecations()
    if options["demo"]:
        _only_with_demo(ctx, {"output_dir", "max_steps", "ambiguity", "seed", "demo"})
        _policy_demo("dpo", options, "seed")
    else:
        _train(ctx, "dpo")


@app.command()
@takes("grpo")
def grpo(ctx: typer.Context, **options: Any) -> None:
    """Train a policy on rewards of what it writes (GRPO), against the worst prompts of each step.

    Example:

        drrlhf train grpo --data prompts.jsonl --model DIR --reward my_module:score --output-dir out

        drrlhf train grpo --demo
    """
    _console.ignore_upstream_deprecations()
    if options["demo"]:
        _only_with_demo(ctx, {"output_dir", "max_steps", "ambiguity", "seeds", "demo"})
        _policy_demo("grpo", options, "seeds")
    else:
        _never_without_demo(ctx, {"seeds"})
        _train(ctx, "grpo")


def _train(ctx: typer.Context, kind: str) -> None:
    """Missing options, then over to run.py; ends the command with the run's exit status."""
    options = dict(ctx.params)
    needed = ("data", "model", *(["reward"] if kind == "grpo" else []), "output_dir")
    missing = [f"--{n.replace('_', '-')}" for n in needed if not options[n]]
    if missing:
        raise _console.fail(
            f"missing {', '.join(missing)} (or --demo); see {ctx.command_path} --help"
        )
    options["ambiguity"] = options["ambiguity"] or DEFAULT_AMBIGUITY
    raise typer.Exit(run.run(kind, options, _console.console(), _resume_command(ctx)))


def _reward_demo(output_dir: Path, seeds: int, quick: bool) -> None:
    with _console.user_errors():
        run.require()
        from drrlhf.demo import material, reward
    with _console.user_errors(material.MaterialError):
        reward.run(output_dir, seeds=seeds, quick=quick, console=_console.console())


def _policy_demo(kind: str, options: dict[str, Any], own: str) -> None:
    """The demonstration of dpo or grpo; `own` is the option that only this one takes."""
    with _console.user_errors():
        run.require("peft", "gguf")
        from drrlhf.demo import material

        demo = importlib.import_module(f"drrlhf.demo.{kind}")
    chosen = {"ambiguity": options["ambiguity"] or DEFAULT_AMBIGUITY, own: options[own]}
    if options["max_steps"] != -1:
        chosen["steps"] = options["max_steps"]
    with _console.user_errors(material.MaterialError):
        folder = Path(options["output_dir"] or f"demo-{kind}")
        demo.run(folder, console=_console.console(), **chosen)


def _given(ctx: typer.Context) -> dict[str, Any]:
    """The click parameters that stand on the command line, by name."""
    given = {}
    for parameter in ctx.command.params:
        source = ctx.get_parameter_source(parameter.name or "")
        if parameter.name and source and source.name == "COMMANDLINE":
            given[parameter.name] = parameter
    return given


def _only_with_demo(ctx: typer.Context, allowed: set[str]) -> None:
    odd = sorted(set(_given(ctx)) - allowed)
    if odd:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in odd)
        raise _console.fail(f"--demo brings its own data, model and settings: leave out {names}")


def _never_without_demo(ctx: typer.Context, demo_only: set[str]) -> None:
    odd = sorted(set(_given(ctx)) & demo_only)
    if odd:
        raise _console.fail(f"--{odd[0]} belongs to --demo")


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
