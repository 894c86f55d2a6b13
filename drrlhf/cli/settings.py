"""The options of ``drrlhf train``, each said once: name, type, default, words, and who takes it.

The fields of `CommandLine` are the list. The commands have their signatures from it (`takes`),
`Settings` is what ``run.json`` records of a run, and `Settings.arguments` is what its trainer is
told.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import types
import typing
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeVar

import typer

from drrlhf.cli._options import parameter, with_parameters

Function = TypeVar("Function", bound=Callable[..., Any])

DEFAULT_AMBIGUITY = "erm"  # as in Python; which set pays depends on the data
DEMO_AMBIGUITY = "tv:0.1"  # beside plain training
LORA_R = 16
# Learning rate by (kind, adapters only).
LEARNING_RATES = {
    ("reward", False): 1e-5,
    ("reward", True): 1e-4,
    ("dpo", False): 1e-6,
    ("dpo", True): 1e-5,
    ("grpo", False): 1e-6,
    ("grpo", True): 1e-5,
}
_RATES_TOLD = "reward 1e-5, dpo and grpo 1e-6; with --lora ten times that"

KINDS = ("reward", "dpo", "grpo")
_PAIRS = ("reward", "dpo")
_POLICY = ("dpo", "grpo")
_IN, _OUT, _DEMO = "Input", "Output", "Demo"


@dataclasses.dataclass(frozen=True)
class Option:
    """What is said of an option beside its name and type.

    said: ``default`` and what `typer.Option` takes. of: the kinds that take it. instead: what is
    said otherwise for a kind. to: the name under which transformers and TRL know it, "" if that is
    its own; None where the trainer is not told, or not in these words. free: may change when a run
    is resumed, since it changes no number, or is compared by content.
    """

    names: tuple[str, ...]
    said: Mapping[str, Any]
    of: tuple[str, ...]
    instead: Mapping[str, Mapping[str, Any]]
    to: str | None
    free: bool

    def parameter(self, name: str, kind: str, settled: Any) -> inspect.Parameter:
        """The option as a parameter of the command ``kind``. ``settled`` is the type of its value
        in the end; an option without a default may be left open before."""
        said = {**self.said, **self.instead.get(kind, {})}
        default = said.pop("default")
        hint = settled
        if typing.get_origin(hint) in (types.UnionType, typing.Union):  # None is of other kinds
            (hint,) = (one for one in typing.get_args(hint) if one is not type(None))
        if default is None:
            hint = hint | None
        return parameter(name, default, hint, typer.Option(*self.names, **said))


def _option(
    default: Any,
    help: str,
    *names: str,
    panel: str = "Optimisation",
    of: tuple[str, ...] = KINDS,
    instead: Mapping[str, Mapping[str, Any]] | None = None,
    to: str | None = "",
    free: bool = False,
    **rules: Any,
) -> Any:
    """A field with an `Option`; that of a kind that does not take it is None."""
    said = {"default": default, "help": help, "rich_help_panel": panel, **rules}
    option = Option(names, said, of, instead or {}, to, free)
    missing = dataclasses.MISSING if of == KINDS else None
    return dataclasses.field(default=missing, metadata={"option": option})  # type: ignore[call-overload]


_input = functools.partial(_option, panel=_IN, to=None, free=True)
_output = functools.partial(_option, panel=_OUT, free=True)
_of_grpo = functools.partial(_option, of=("grpo",))
_of_pairs = functools.partial(_option, of=_PAIRS)
_of_reward = functools.partial(_option, of=("reward",))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that decides a run's numbers, after defaults were resolved.

    The field names are the option names of ``drrlhf train``; a field that the trainer of this
    ``kind`` does not have is ``None``.
    """

    kind: str
    data: str = _input(
        None,
        "Preference pairs: a .jsonl, .json, .csv or .parquet file, or a `datasets` name. "
        "Columns chosen and rejected; optional prompt, group, margin, weight, p_chosen.",
        instead={
            "grpo": {
                "help": "Prompts: a .jsonl, .json, .csv or .parquet file, or a `datasets` name. "
                "Column prompt; optional group, weight; others go to the reward function."
            }
        },
    )
    model: str = _input(
        None,
        "Model directory, or a hub name. Adapters, as --lora leaves them, are trained on, and "
        "what they were at the start is the reference.",
    )
    reward: str | None = _input(
        None,
        "module:function, called as TRL's reward functions (prompts, completions and "
        "columns by name), or the directory of a reward model, whole or as adapters.",
        of=("grpo",),
        free=False,
    )
    eval_data: str | None = _input(
        None,
        "Held-out pairs, evaluated with every checkpoint and at the end.",
        instead={
            "grpo": {"help": "Held-out prompts, evaluated with every checkpoint and at the end."}
        },
    )
    split: str | None = _input(None, "Split of --data, a `datasets` name.", show_default="train")
    eval_split: str | None = _input(
        None, "Split of --eval-data; without that, of --data.", show_default="train of --eval-data"
    )

    ambiguity: str = _option(
        None,
        "Ambiguity set: erm (plain training), tv:0.1, kl:0.1, kl:temperature=1, chi2:0.5, "
        "cvar:0.3, group (as many groups as the data has), group:4,step_size=0.05; all but the "
        "bare group also with ,trim=0.05.",
        show_default=DEFAULT_AMBIGUITY,
    )
    beta: float | None = _option(
        0.1,
        "Strength of the pull to the start.",
        of=_POLICY,
        instead={"grpo": {"default": 0.0, "min": 0}},
    )
    loss_type: str | None = _option(
        "sigmoid",
        "Loss of a pair, by TRL's name (its robust is rDPO).",
        of=_POLICY,
        instead={
            "grpo": {"default": "dapo", "help": "grpo, bnpo, dr_grpo, dapo, or another of TRL's."}
        },
    )
    label_smoothing: float | None = _option(
        0.0, "Assumed share of flipped labels.", of=("dpo",), min=0, max=1
    )
    importance_level: Literal["token", "sequence"] | None = _of_grpo(
        "token", "What an importance ratio is of.", to="importance_sampling_level"
    )
    clip_low: float | None = _of_grpo(
        0.2, "Ratios are clipped at 1 minus this.", to="epsilon", min=0, max=1
    )
    clip_high: float | None = _of_grpo(
        0.2, "Ratios are clipped at 1 plus this.", to="epsilon_high", min=0
    )
    num_generations: int | None = _of_grpo(8, "Completions of each prompt.", min=2)
    max_completion_length: int | None = _of_grpo(256, "Longest completion in tokens.", min=1)
    temperature: float | None = _of_grpo(1.0, "Of sampling.")
    group_by: Literal["column", "pass_rate"] | None = _of_grpo(
        "column",
        "Groups of --ambiguity group:G: the column group, or each prompt's running share "
        "of completions that reach --pass-threshold.",
    )
    pass_threshold: float | None = _of_grpo(0.5, "The reward from which a completion has passed.")
    epochs: float = _option(1.0, "Passes over the data.", to="num_train_epochs", min=0)
    max_steps: int = _option(
        -1, "Optimizer steps, instead of --epochs; -1: off.", "--max-steps", "--steps"
    )
    batch_size: int = _option(
        8,
        "Pairs per device and batch.",
        to="per_device_train_batch_size",
        instead={
            "grpo": {
                "help": "Completions per device and batch; those of a step are a multiple of "
                "--num-generations."
            }
        },
        min=1,
    )
    gradient_accumulation: int = _option(
        1, "Batches per optimizer step.", to="gradient_accumulation_steps", min=1
    )
    robust_scope: Literal["step", "microbatch"] = _option(
        "step",
        "The worst case is among the pairs of the optimizer step (two passes over its batches "
        "where there are several), or of each batch alone.",
        instead={
            "grpo": {
                "help": "The worst case is among the prompts of the optimizer step, or of each "
                "batch alone."
            }
        },
    )
    padding_free: bool | None = _of_pairs(
        False,
        "Run the model on one packed row of tokens, without padding (causal decoders).",
        "--padding-free",
    )
    share_prompts: Literal["auto", "true", "false"] = _option(
        "auto",
        "Run the model on a prompt once for all of its answers; auto: where the model keeps its "
        "numbers and enough tokens are saved.",
        free=True,
    )
    label_ambiguity: str | None = _of_pairs(
        "erm",
        "What is believed of the column p_chosen, the probability of each label: erm, all of it; "
        "chi2:RADIUS, the worst near it.",
    )
    views: str | None = _of_pairs(
        "",
        "Forms in which a pair must keep its order, as in typos,bullets,sentence, or @NAME for the "
        "columns chosen@NAME and rejected@NAME: each pair is trained on in its worst one.",
    )
    views_per_pair: int | None = _of_pairs(
        3, "How many views of each answer are drawn in every epoch.", min=1
    )
    views_scored: float | None = _of_pairs(
        1.0,
        "The share of pairs whose views are scored; the others are trained on in any of them.",
        min=0,
        max=1,
    )
    views_scored_from: float | None = _of_pairs(
        0.0,
        "The share of training, below 1, after which views are scored; before it pairs are trained "
        "on in any of them.",
        min=0,
        max=1,
    )
    view_ambiguity: str | None = _of_pairs(
        "max",
        "Which of its views a pair is trained on: max, the worst; mean, any (augmentation); "
        "kl:temperature=T, cvar:ALPHA or tv:RADIUS.",
    )
    learning_rate: float = _option(None, "Peak; decays linearly to 0.", show_default=_RATES_TOLD)
    max_length: int | None = _of_pairs(1024, "Longest sequence in tokens.", min=2)
    center_rewards_coefficient: float | None = _of_reward(
        0.0, "Pulls the rewards of a pair towards mean 0.", min=0
    )
    batch_sum_coefficient: float | None = _of_reward(
        0.0, "Pulls the sum of the rewards of a batch towards 0 (BSR).", min=0
    )
    view_consistency_coefficient: float | None = _of_reward(
        0.0,
        "Pulls the reward of an answer in another form towards that of the answer as it is.",
        min=0,
    )
    seed: int = _option(42, "Decides data order and new weights.", min=0)
    lora: bool = _option(
        None,
        "Train LoRA adapters only.",
        "--lora/--no-lora",
        show_default="lora where --model holds adapters",
        to=None,
    )
    lora_r: int = _option(
        None,
        "Rank of the adapters.",
        min=1,
        show_default=f"{LORA_R}, or that of --model's",
        to=None,
    )
    dtype: Literal["fp32", "bf16"] = _option(
        None, "bf16 is autocast.", show_default="bf16 on a GPU, fp32 on the CPU", to=None
    )
    precompute_ref: bool | None = _option(
        False,
        "Reference log-probs once, beforehand: the reference model then needs no memory.",
        "--precompute-ref",
        of=("dpo",),
        to="precompute_ref_log_probs",
    )

    output_dir: str = _output(None, "Directory of this run.")
    save_steps: int = _output(500, "Steps between checkpoints.", min=1)
    logging_steps: int = _output(1, "Steps that one line of metrics.jsonl averages over.", min=1)

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Settings:
        """The settings among ``options``, which have a value for each that the kind takes."""
        names = {field.name for field in dataclasses.fields(cls)}
        return cls(**{name: value for name, value in options.items() if name in names})

    def arguments(self) -> dict[str, Any]:
        """What the trainer of this kind is told in the words of an option, under its own names."""
        return {
            option.to or name: getattr(self, name)
            for name, option in options_of(Settings).items()
            if option.to is not None and self.kind in option.of
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class CommandLine(Settings):
    """Settings, and what a command line says beside them, which no run records."""

    resume: bool = _option(
        False, "Go on from the newest checkpoint in --output-dir.", "--resume", panel=_OUT
    )
    overwrite: bool = _option(
        False, "Discard an earlier run in --output-dir.", "--overwrite", panel=_OUT
    )
    demo: bool = _option(
        False,
        "Compare every ambiguity set on real sentiment preferences instead.",
        "--demo",
        panel=_DEMO,
        instead={
            "dpo": {
                "help": "Train the first layers of SmolLM2 plainly and under a set, on real "
                "sentiment preferences; "
                f"takes --output-dir, --steps, --ambiguity ({DEMO_AMBIGUITY}) and --seed."
            },
            "grpo": {
                "help": "Train the first layers of SmolLM2 plainly and under a set, on prompts "
                "of two domains; "
                f"takes --output-dir, --steps, --ambiguity ({DEMO_AMBIGUITY}) and --seeds."
            },
        },
    )
    seeds: int | None = _option(
        5,
        "Runs per ambiguity set.",
        panel=_DEMO,
        of=("reward", "grpo"),
        instead={"grpo": {"default": 3, "min": 1}},
        min=2,
    )
    quick: bool | None = _option(False, "A shortened demo.", "--quick", panel=_DEMO, of=("reward",))


def options_of(listed: type[Settings]) -> dict[str, Option]:
    """The options in a list of them, by name."""
    return {
        field.name: field.metadata["option"]
        for field in dataclasses.fields(listed)
        if "option" in field.metadata
    }


FREE_ON_RESUME = {name for name, option in options_of(Settings).items() if option.free}


def takes(kind: str) -> Callable[[Function], Function]:
    """Makes a function of the context and ``**options`` the command that takes those of ``kind``,
    in the order of the list."""
    hints = typing.get_type_hints(CommandLine)
    parameters = [
        option.parameter(name, kind, hints[name])
        for name, option in options_of(CommandLine).items()
        if kind in option.of
    ]
    context = inspect.Parameter(
        "ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD, annotation=typer.Context
    )
    return lambda function: with_parameters(function, [context, *parameters])
