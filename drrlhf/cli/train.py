"""``drrlhf train reward|dpo|grpo``: the options; the work is in run.py and drrlhf.demo."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from drrlhf.cli import _console, run

app = typer.Typer(
    help="Train a reward model, or a policy by DPO or GRPO, with worst-case weights over each "
    "step's pairs or prompts.",
    no_args_is_help=True,
)

DEFAULT_AMBIGUITY = "tv:0.1"
_RATES_TOLD = "reward 1e-5, dpo and grpo 1e-6; with --lora ten times that"
_IN, _OPT, _OUT, _DEMO = "Input", "Optimisation", "Output", "Demo"


def _option(*names: str, panel: str, help: str, **rules: Any) -> Any:
    return typer.Option(*names, help=help, rich_help_panel=panel, **rules)


# What both commands take is written once, here.
Data = Annotated[
    str | None,
    _option(
        panel=_IN,
        help="Preference pairs: a .jsonl, .json, .csv or .parquet file, or a `datasets` name. "
        "Columns chosen and rejected; optional prompt, group, margin, weight.",
    ),
]
EvalData = Annotated[
    str | None,
    _option(panel=_IN, help="Held-out pairs, evaluated with every checkpoint and at the end."),
]
Split = Annotated[
    str | None,
    _option(panel=_IN, help="Split of --data, a `datasets` name.", show_default="train"),
]
EvalSplit = Annotated[
    str | None,
    _option(
        panel=_IN,
        help="Split of --eval-data; without that, of --data.",
        show_default="train of --eval-data",
    ),
]
Model = Annotated[
    str | None,
    _option(
        panel=_IN,
        help="Model directory, or a hub name. Adapters, as --lora leaves them, are trained on, and "
        "what they were at the start is the reference.",
    ),
]
Ambiguity = Annotated[
    str | None,
    _option(
        panel=_OPT,
        help="Ambiguity set: erm (plain training), tv:0.1, kl:0.1, kl:temperature=1, chi2:0.5, "
        "cvar:0.3, group (as many groups as the data has), group:4,step_size=0.05; all but the "
        "bare group also with ,trim=0.05.",
        show_default=DEFAULT_AMBIGUITY,
    ),
]
Epochs = Annotated[float, _option(panel=_OPT, min=0, help="Passes over the data.")]
MaxSteps = Annotated[
    int,
    _option(
        "--max-steps", "--steps", panel=_OPT, help="Optimizer steps, instead of --epochs; -1: off."
    ),
]
BatchSize = Annotated[int, _option(panel=_OPT, min=1, help="Pairs per device and batch.")]
Accumulation = Annotated[int, _option(panel=_OPT, min=1, help="Batches per optimizer step.")]
RobustScope = Annotated[
    Literal["step", "microbatch"],
    _option(
        panel=_OPT,
        help="The worst case is among the pairs of the optimizer step (two passes over its batches "
        "where there are several), or of each batch alone.",
    ),
]
PaddingFree = Annotated[
    bool,
    _option(
        "--padding-free",
        panel=_OPT,
        help="Run the model on one packed row of tokens, without padding (causal decoders).",
    ),
]
LearningRate = Annotated[
    float | None, _option(panel=_OPT, help="Peak; decays linearly to 0.", show_default=_RATES_TOLD)
]
MaxLength = Annotated[int, _option(panel=_OPT, min=2, help="Longest sequence in tokens.")]
Seed = Annotated[int, _option(panel=_OPT, min=0, help="Decides data order and new weights.")]
Lora = Annotated[
    bool | None,
    _option(
        "--lora/--no-lora",
        panel=_OPT,
        help="Train LoRA adapters only.",
        show_default="lora where --model holds adapters",
    ),
]
LoraR = Annotated[
    int | None,
    _option(
        panel=_OPT,
        min=1,
        help="Rank of the adapters.",
        show_default=f"{run.LORA_R}, or that of --model's",
    ),
]
Dtype = Annotated[
    Literal["fp32", "bf16"] | None,
    _option(panel=_OPT, help="bf16 is autocast.", show_default="bf16 on a GPU, fp32 on the CPU"),
]
OutputDir = Annotated[str | None, _option(panel=_OUT, help="Directory of this run.")]
SaveSteps = Annotated[int, _option(panel=_OUT, min=1, help="Steps between checkpoints.")]
LoggingSteps = Annotated[
    int, _option(panel=_OUT, min=1, help="Steps that one line of metrics.jsonl averages over.")
]
Resume = Annotated[
    bool,
    _option("--resume", panel=_OUT, help="Go on from the newest checkpoint in --output-dir."),
]
Overwrite = Annotated[
    bool, _option("--overwrite", panel=_OUT, help="Discard an earlier run in --output-dir.")
]


@app.command()
def reward(
    ctx: typer.Context,
    data: Data = None,
    model: Model = None,
    eval_data: EvalData = None,
    split: Split = None,
    eval_split: EvalSplit = None,
    ambiguity: Ambiguity = None,
    epochs: Epochs = 1.0,
    max_steps: MaxSteps = -1,
    batch_size: BatchSize = 8,
    gradient_accumulation: Accumulation = 1,
    robust_scope: RobustScope = "step",
    padding_free: PaddingFree = False,
    learning_rate: LearningRate = None,
    max_length: MaxLength = 1024,
    center_rewards_coefficient: Annotated[
        float, _option(panel=_OPT, min=0, help="Pulls the rewards of a pair towards mean 0.")
    ] = 0.0,
    seed: Seed = 42,
    lora: Lora = None,
    lora_r: LoraR = None,
    dtype: Dtype = None,
    output_dir: OutputDir = None,
    save_steps: SaveSteps = 500,
    logging_steps: LoggingSteps = 1,
    resume: Resume = False,
    overwrite: Overwrite = False,
    demo: Annotated[
        bool,
        _option(
            "--demo",
            panel=_DEMO,
            help="Compare every ambiguity set on real sentiment preferences instead.",
        ),
    ] = False,
    seeds: Annotated[int, _option(panel=_DEMO, min=2, help="Runs per ambiguity set.")] = 5,
    quick: Annotated[bool, _option("--quick", panel=_DEMO, help="A shortened demo.")] = False,
) -> None:
    """Train a reward model on preference pairs.

    Example:

        drrlhf train reward --data pairs.jsonl --model DIR --ambiguity tv:0.1 --output-dir out

        drrlhf train reward --demo --output-dir demo
    """
    _console.hush_deprecations()
    if demo:
        _only_with_demo(ctx, {"output_dir", "seeds", "quick", "demo"})
        _reward_demo(Path(output_dir or "demo"), seeds, quick)
    else:
        _never_without_demo(ctx, {"seeds", "quick"})
        _train(ctx, "reward")


@app.command()
def dpo(
    ctx: typer.Context,
    data: Data = None,
    model: Model = None,
    eval_data: EvalData = None,
    split: Split = None,
    eval_split: EvalSplit = None,
    ambiguity: Ambiguity = None,
    beta: Annotated[float, _option(panel=_OPT, help="Strength of the pull to the start.")] = 0.1,
    loss_type: Annotated[
        str, _option(panel=_OPT, help="Loss of a pair, by TRL's name (its robust is rDPO).")
    ] = "sigmoid",
    label_smoothing: Annotated[
        float, _option(panel=_OPT, min=0, max=1, help="Assumed share of flipped labels.")
    ] = 0.0,
    epochs: Epochs = 1.0,
    max_steps: MaxSteps = -1,
    batch_size: BatchSize = 8,
    gradient_accumulation: Accumulation = 1,
    robust_scope: RobustScope = "step",
    padding_free: PaddingFree = False,
    learning_rate: LearningRate = None,
    max_length: MaxLength = 1024,
    seed: Seed = 42,
    lora: Lora = None,
    lora_r: LoraR = None,
    dtype: Dtype = None,
    precompute_ref: Annotated[
        bool,
        _option(
            "--precompute-ref",
            panel=_OPT,
            help="Reference log-probs once, beforehand: the reference model then needs no memory.",
        ),
    ] = False,
    output_dir: OutputDir = None,
    save_steps: SaveSteps = 500,
    logging_steps: LoggingSteps = 1,
    resume: Resume = False,
    overwrite: Overwrite = False,
    demo: Annotated[
        bool,
        _option(
            "--demo",
            panel=_DEMO,
            help="Train a cut SmolLM2 plainly and robustly on real sentiment preferences; takes "
            "--output-dir, --steps, --ambiguity and --seed.",
        ),
    ] = False,
) -> None:
    """Train a policy by direct preference optimisation.

    Example:

        drrlhf train dpo --data pairs.jsonl --model DIR --ambiguity kl:0.1 --lora --output-dir out

        drrlhf train dpo --demo
    """
    _console.hush_deprecations()
    if demo:
        _only_with_demo(ctx, {"output_dir", "max_steps", "ambiguity", "seed", "demo"})
        _dpo_demo(Path(output_dir or "demo-dpo"), max_steps, ambiguity, seed)
    else:
        _train(ctx, "dpo")


@app.command()
def grpo(
    ctx: typer.Context,
    data: Annotated[
        str | None,
        _option(
            panel=_IN,
            help="Prompts: a .jsonl, .json, .csv or .parquet file, or a `datasets` name. Column "
            "prompt; optional group, weight; others go to the reward function.",
        ),
    ] = None,
    model: Model = None,
    reward: Annotated[
        str | None,
        _option(
            panel=_IN,
            help="module:function, called as TRL's reward functions (prompts, completions and "
            "columns by name), or the directory of a reward model, whole or as adapters.",
        ),
    ] = None,
    eval_data: EvalData = None,
    split: Split = None,
    eval_split: EvalSplit = None,
    ambiguity: Ambiguity = None,
    beta: Annotated[
        float, _option(panel=_OPT, min=0, help="Strength of the pull to the start.")
    ] = 0.0,
    loss_type: Annotated[
        str, _option(panel=_OPT, help="grpo, bnpo, dr_grpo, dapo, or another of TRL's.")
    ] = "dapo",
    importance_level: Annotated[
        Literal["token", "sequence"], _option(panel=_OPT, help="What an importance ratio is of.")
    ] = "token",
    clip_low: Annotated[
        float, _option(panel=_OPT, min=0, max=1, help="Ratios are clipped at 1 minus this.")
    ] = 0.2,
    clip_high: Annotated[
        float, _option(panel=_OPT, min=0, help="Ratios are clipped at 1 plus this.")
    ] = 0.2,
    num_generations: Annotated[
        int, _option(panel=_OPT, min=2, help="Completions of each prompt.")
    ] = 8,
    max_completion_length: Annotated[
        int, _option(panel=_OPT, min=1, help="Longest completion in tokens.")
    ] = 256,
    temperature: Annotated[float, _option(panel=_OPT, help="Of sampling.")] = 1.0,
    group_by: Annotated[
        Literal["column", "pass_rate"],
        _option(
            panel=_OPT,
            help="Groups of --ambiguity group:G: the column group, or each prompt's running share "
            "of completions that reach --pass-threshold.",
        ),
    ] = "column",
    pass_threshold: Annotated[
        float, _option(panel=_OPT, help="The reward from which a completion has passed.")
    ] = 0.5,
    epochs: Epochs = 1.0,
    max_steps: MaxSteps = -1,
    batch_size: Annotated[
        int,
        _option(
            panel=_OPT,
            min=1,
            help="Completions per device and batch; those of a step are a multiple of "
            "--num-generations.",
        ),
    ] = 8,
    gradient_accumulation: Accumulation = 1,
    robust_scope: RobustScope = "step",
    learning_rate: LearningRate = None,
    seed: Seed = 42,
    lora: Lora = None,
    lora_r: LoraR = None,
    dtype: Dtype = None,
    output_dir: OutputDir = None,
    save_steps: SaveSteps = 500,
    logging_steps: LoggingSteps = 1,
    resume: Resume = False,
    overwrite: Overwrite = False,
    demo: Annotated[
        bool,
        _option(
            "--demo",
            panel=_DEMO,
            help="Train a cut SmolLM2 plainly and robustly on prompts of four domains; takes "
            "--output-dir, --steps, --ambiguity and --seeds.",
        ),
    ] = False,
    seeds: Annotated[int, _option(panel=_DEMO, min=1, help="Runs per ambiguity set.")] = 3,
) -> None:
    """Train a policy on rewards of what it writes (GRPO), against the worst prompts of each step.

    Example:

        drrlhf train grpo --data prompts.jsonl --model DIR --reward my_module:score --output-dir out

        drrlhf train grpo --demo
    """
    _console.hush_deprecations()
    if demo:
        _only_with_demo(ctx, {"output_dir", "max_steps", "ambiguity", "seeds", "demo"})
        _grpo_demo(Path(output_dir or "demo-grpo"), max_steps, ambiguity, seeds)
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


def _dpo_demo(output_dir: Path, steps: int, ambiguity: str | None, seed: int) -> None:
    with _console.user_errors():
        run.require("peft", "gguf")
        from drrlhf.demo import dpo, material
    options: dict[str, Any] = {"ambiguity": ambiguity or DEFAULT_AMBIGUITY, "seed": seed}
    if steps != -1:
        options["steps"] = steps
    with _console.user_errors(material.MaterialError):
        dpo.run(output_dir, console=_console.console(), **options)


def _grpo_demo(output_dir: Path, steps: int, ambiguity: str | None, seeds: int) -> None:
    with _console.user_errors():
        run.require("peft", "gguf")
        from drrlhf.demo import grpo, material
    options: dict[str, Any] = {"ambiguity": ambiguity or DEFAULT_AMBIGUITY, "seeds": seeds}
    if steps != -1:
        options["steps"] = steps
    with _console.user_errors(material.MaterialError):
        grpo.run(output_dir, console=_console.console(), **options)


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
