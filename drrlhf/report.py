"""Pictures of a training run, in the colour-blind-safe colours of Okabe and Ito."""

from __future__ import annotations

import importlib
import math
import os
import re
from pathlib import Path
from statistics import fmean
from typing import Any

from drrlhf.files import json_lines, write_whole
from drrlhf.seeds import mean_and_error

BLUE, ORANGE, GREEN, VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PALETTE = (BLUE, ORANGE, GREEN, VERMILION, "#CC79A7", "#56B4E9", "#F0E442", "#000000")
_MARKERS = "osD^vP*X"
LINE_STYLES = ("-", "--", "-.", ":")

Line = dict[str, Any]


def figure_of(width: float, height: float, backend: str = "agg") -> Any:
    """An empty figure that needs no display; ``backend`` is matplotlib's, agg or svg.

    Raises:
        ImportError: matplotlib is missing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    importlib.import_module(f"matplotlib.backends.backend_{backend}").FigureCanvas(figure)
    return figure


def save(figure: Any, output_png: str | os.PathLike[str], dpi: int = 130, **more: Any) -> Path:
    """Write a figure as a PNG, whole at any time; its path. ``more`` goes to ``savefig``."""
    path = Path(output_png)
    as_written(figure)
    write_whole(path, lambda part: figure.savefig(part, format="png", dpi=dpi, **more))
    return path


def as_written(figure: Any) -> None:
    """Has a $ in a figure's texts be a $: names and paths of users are no mathematics, and ended in
    an error where they could not be read as such. Numbers along an axis may hold powers."""
    from matplotlib.text import Text
    from matplotlib.ticker import FixedFormatter, FuncFormatter

    numbers = set()
    for axis in (each for axes in figure.axes for each in (axes.xaxis, axes.yaxis)):
        numbers |= {axis.offsetText, *axis.get_minorticklabels()}
        if not isinstance(axis.get_major_formatter(), (FixedFormatter, FuncFormatter)):
            numbers |= {*axis.get_majorticklabels()}
    for text in figure.findobj(Text):
        if text not in numbers:
            text.set_parse_math(False)


def light(axis: Any) -> None:
    """A pale grid, and no frame at the top and the right."""
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)


def plot_training(
    metrics_path: str | os.PathLike[str], output_png: str | os.PathLike[str], *, title: str = ""
) -> Path:
    """Draw the curves of one run's ``metrics.jsonl`` as a PNG and return its path.

    Top: for a policy mean and worst-case reward; then training loss, worst-case value and plain
    mean where they were logged, evaluation loss. Below, as far as the run has them: how unevenly
    the adversary weighs the pairs or prompts of a step (effective sample size and those with any
    weight as shares of them, largest weight as a multiple of the uniform one), and the weight of
    each group (the kept state of a Group set, otherwise the group's share of the worst-case
    weight) and its reward.

    Raises:
        ValueError: the file has no training line, or a line that is not JSON.
        ImportError: matplotlib is missing.
    """
    lines = json_lines(metrics_path)
    train = [line for line in lines if line["event"] == "train"]
    if not train:
        raise ValueError(
            f"{metrics_path}: no training step was logged, so there is nothing to plot"
        )
    evaluations = [line for line in lines if line["event"] == "eval"]
    logged, groups = {name for line in train for name in line}, group_columns(train)
    wanted = {
        _draw_rewards: "reward" in logged,
        _draw_loss: True,
        _draw_weights: "robust/effective_sample_size" in logged,
        _draw_groups: groups,
        _draw_group_rewards: group_columns(train, ("reward",)),
    }
    panels: list[Any] = [draw for draw, there in wanted.items() if there]

    from matplotlib.ticker import MaxNLocator

    figure = figure_of(8.0, 0.6 + 2.7 * len(panels))
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axis, draw in zip(axes, panels, strict=True):
        draw(axis, train, evaluations, groups)
        light(axis)
    axes[-1].set_xlabel("optimizer step")
    axes[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, fontsize="medium")
    return save(figure, output_png)


def plot_comparison(result: dict[str, Any], output_png: str | os.PathLike[str]) -> Path:
    """Draw `drrlhf.demo.dpo`'s result as a PNG: held-out accuracy and margin by domain and setting.

    Bars carry one standard error over pairs; the dashed line is chance.
    """
    runs, domains = result["runs"], list(result["domains"])
    figure = figure_of(9.5, 3.9)
    for axis, column in zip(figure.subplots(1, 2), ("accuracy", "margin"), strict=True):
        for number, run in enumerate(runs):
            scores = [run["held_out"][name] for name in domains]
            found = [(score[column], score[f"{column}_error"]) for score in scores]
            _bars(axis, found, number, len(runs), run["ambiguity"])
        axis.axhline(0.5 if column == "accuracy" else 0, color="black", linewidth=1, linestyle="--")
        _name_domains(axis, result["domains"])
        axis.spines[["top", "right"]].set_visible(False)
    accuracy, margin = figure.axes
    accuracy.set_ylabel("held-out preference accuracy")
    margin.set_ylabel("mean held-out margin")
    _legend(accuracy)
    steps = result["settings"]["steps"]
    figure.suptitle(
        f"DPO on {result['model']}, {steps} steps, one seed\n{result['data']}", fontsize=9
    )
    return save(figure, output_png)


def plot_rewards(result: dict[str, Any], output_png: str | os.PathLike[str]) -> Path:
    """Draw `drrlhf.demo.grpo`'s result as a PNG: reward over training, and held out by domain.

    Thin lines are single seeds, bars and thick lines their means; error bars are one standard error
    over seeds, and the dashed marks are the start model.
    """
    runs, domains = result["runs"], list(result["domains"])
    figure = figure_of(9.5, 3.9)
    over, bars = figure.subplots(1, 2)
    for number, run in enumerate(runs):
        color, label = PALETTE[number], run["ambiguity"]
        for seed in run["training"]:
            over.plot(range(1, len(seed) + 1), seed, color=color, alpha=0.25, linewidth=1)
        mean = [fmean(step) for step in zip(*run["training"], strict=True)]
        over.plot(
            range(1, len(mean) + 1), mean, color=color, label=label, linestyle=LINE_STYLES[number]
        )
        rewards = [mean_and_error(run["rewards"][name]) for name in domains]
        _bars(bars, rewards, number, len(runs), label)
    for place, name in enumerate(domains):
        start = fmean(result["start"][name])
        bars.hlines(start, place - 0.42, place + 0.42, color="black", linestyle="--", linewidth=1)
    _name_domains(bars, result["domains"])
    bars.set_ylabel("held-out reward (dashed: start)")
    over.set_xlabel("optimizer step")
    over.set_ylabel("mean reward of the step")
    for axis in (over, bars):
        axis.spines[["top", "right"]].set_visible(False)
    _legend(bars)
    settings = result["settings"]
    figure.suptitle(
        f"GRPO on {result['model']}, {settings['steps']} steps, {settings['seeds']} seeds\n"
        f"{result['data']}",
        fontsize=8,
    )
    return save(figure, output_png)


def _bars(axis: Any, found: list[tuple[float, float]], number: int, runs: int, label: str) -> None:
    """A bar with its error for each domain, of one run among several."""
    width = 0.8 / runs
    axis.bar(
        [place + (number - (runs - 1) / 2) * width for place in range(len(found))],
        [value for value, _ in found],
        width,
        yerr=[error for _, error in found],
        capsize=3,
        label=label,
        color=PALETTE[number],
        hatch=("", "//")[number % 2],
        edgecolor="white",
    )


def _name_domains(axis: Any, domains: dict[str, str]) -> None:
    ticks = [f"{name}\n{what}" for name, what in domains.items()]
    axis.set_xticks(range(len(domains)), ticks, fontsize="small")


def group_columns(
    lines: list[Line], kinds: tuple[str, ...] = ("weight", "state")
) -> dict[str, str]:
    """{group: column}, of the last of `kinds` that there is: as it stands the kept state of a
    group where there is one, else its weight in the batch."""
    columns: dict[str, str] = {}
    for kind in kinds:
        for line in lines:
            for name in line:
                if match := re.fullmatch(rf"group/(.+)/{kind}", name):
                    columns[match[1]] = name
    return dict(sorted(columns.items(), key=lambda one: _order(one[0])))


def _order(group: str) -> tuple[bool, int, str]:
    """Numbers by their size, then names."""
    number = group.isdecimal()
    return not number, int(group) if number else 0, group


def _curve(axis: Any, lines: list[Line], column: str, label: str, color: str, **style: Any) -> None:
    """One column over steps; a noisy long one is drawn pale under its trailing mean."""
    points = [(line["step"], line[column]) for line in lines if column in line]
    if not points:
        return
    steps, values = zip(*points, strict=True)
    numbers = [math.nan if value is None else value for value in values]  # nan: a gap
    window = len(numbers) // 25
    if window > 1 and "marker" not in style:
        axis.plot(steps, numbers, color=color, alpha=0.3, linewidth=1)
        parts = (numbers[max(0, end - window) : end] for end in range(1, len(numbers) + 1))
        numbers = [sum(part) / len(part) for part in parts]
    style.setdefault("marker", "o" if len(points) < 3 else None)
    axis.plot(steps, numbers, label=label, color=color, markersize=4, **style)


def _legend(axis: Any, *others: Any) -> None:
    """Of this panel and others, above it, where no curve can run under it."""
    handles = [one for each in (axis, *others) for one in each.get_legend_handles_labels()[0]]
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": min(len(handles), 6)}
    axis.legend(handles=handles, frameon=False, fontsize="small", borderaxespad=0.2, **place)


def _draw_loss(axis: Any, train: list[Line], evaluations: list[Line], *_: Any) -> None:
    robust = [line.get("robust/value") for line in train]
    if robust == [line.get("loss") for line in train]:
        _curve(axis, train, "loss", "training loss (worst case of each step)", BLUE)
    else:
        _curve(axis, train, "loss", "training loss", BLUE)
        _curve(axis, train, "robust/value", "worst case of each step", ORANGE, linestyle="--")
    _curve(axis, train, "robust/mean_loss", "plain mean of each step", GREEN, linestyle=":")
    _curve(axis, evaluations, "eval_loss", "evaluation loss", VERMILION, marker="D")
    axis.set_ylabel("loss")
    _legend(axis)


def _draw_rewards(axis: Any, train: list[Line], evaluations: list[Line], *_: Any) -> None:
    _curve(axis, train, "reward", "mean reward", BLUE)
    _curve(axis, train, "robust/worst_case_reward", "worst case of each step", ORANGE)
    _curve(axis, evaluations, "eval_reward", "held out", VERMILION, marker="D")
    axis.set_ylabel("reward of\ncompletions")
    _legend(axis)


def _draw_weights(axis: Any, train: list[Line], *_: Any) -> None:
    _curve(axis, train, "robust/effective_sample_size", "effective sample size", GREEN)
    _curve(axis, train, "robust/kept", "kept any weight", BLUE, linestyle=":")
    axis.set_ylabel("share of\na step")
    axis.set_ylim(0, 1.05)
    other = axis.twinx()
    _curve(other, train, "robust/max_weight", "largest weight", VERMILION, linestyle="--")
    other.set_ylabel("largest weight\n(1 = uniform)")
    other.set_ylim(bottom=0)
    other.spines["top"].set_visible(False)
    _legend(axis, other)


def _draw_groups(
    axis: Any, train: list[Line], evaluations: list[Line], groups: dict[str, str]
) -> None:
    _group_curves(axis, train, groups)
    kept = next(iter(groups.values())).endswith("state")
    axis.set_ylabel("group weight" if kept else "group's share of\nthe batch's weight")
    axis.set_ylim(0, 1.05)  # weights of groups are shares of 1


def _draw_group_rewards(axis: Any, train: list[Line], *_: Any) -> None:
    _group_curves(axis, train, group_columns(train, ("reward",)))
    axis.set_ylabel("reward of\neach group")


def _group_curves(axis: Any, train: list[Line], columns: dict[str, str]) -> None:
    for number, (group, column) in enumerate(columns.items()):
        # A number alone says little, and what begins with "_" would not be in the legend.
        bare = group.isdecimal() or group.startswith("_")
        label = f"group {group}" if bare else group
        _curve(
            axis,
            train,
            column,
            label,
            PALETTE[number % len(PALETTE)],
            linestyle=LINE_STYLES[number // len(PALETTE) % len(LINE_STYLES)],
            marker=_MARKERS[number % len(_MARKERS)],
            markevery=max(1, len(train) // 8),
        )
    _legend(axis)
