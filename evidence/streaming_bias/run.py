"""How far the worst case of small batches lies below that of the population, with and without a
running normaliser: ``python -m evidence.streaming_bias.run FOLDER`` writes a table and a plot, of
which this folder keeps one each.

A batch's t log mean exp(l/t) is biased low (Jensen): the largest losses of the population are
rarely in it. `KL` with momentum keeps the mean running over batches.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

import drrlhf as dr
from drrlhf.files import write_text
from drrlhf.report import PALETTE, save

FILE = "streaming_bias"
TEMPERATURE = 0.5
SIZES = tuple(2**k for k in range(1, 10))
MOMENTA = (None, 0.9, 0.99)
BATCHES, WARM_UP = 4000, 1000
# Losses -log sigmoid(m) of margins m that are normal, as of a policy halfway through training.
MEAN, DEVIATION = 1.0, 1.5


def draw(shape: tuple[int, ...], generator: torch.Generator) -> torch.Tensor:
    """Simulated losses, float64."""
    margins = torch.randn(shape, generator=generator, dtype=torch.float64) * DEVIATION + MEAN
    return torch.nn.functional.softplus(-margins)


def population() -> float:
    """t log E exp(l/t), by quadrature."""
    z = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    losses = torch.nn.functional.softplus(-(z * DEVIATION + MEAN))
    density = torch.softmax(-(z**2) / 2, 0).log()
    return float(TEMPERATURE * torch.logsumexp(losses / TEMPERATURE + density, 0))


def measure(size: int, momentum: float | None, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation of the value over batches of `size`, after the warm-up."""
    losses = draw((BATCHES, size), torch.Generator().manual_seed(seed))
    state, ambiguity = dr.NormaliserState(), dr.KL(temperature=TEMPERATURE, momentum=momentum)
    values = torch.stack(
        [dr.robust_risk(batch, ambiguity, normaliser_state=state).value for batch in losses]
    )[WARM_UP:]
    return float(values.mean()), float(values.std())


def collect() -> dict[str, Any]:
    """The table: records of size, momentum, mean, deviation, beside the population's value."""
    records = [
        dict(zip(("size", "momentum", "mean", "deviation"), (n, m, *measure(n, m)), strict=True))
        for m in MOMENTA
        for n in SIZES
    ]
    return {
        "suite": "streaming bias",
        "temperature": TEMPERATURE,
        "losses": f"-log sigmoid(m), m normal with mean {MEAN}, standard deviation {DEVIATION}",
        "population": population(),
        "batches": BATCHES - WARM_UP,
        "records": records,
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Value over batch size for each momentum; the line is the population's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.0, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    for number, momentum in enumerate(MOMENTA):
        rows = [r for r in result["records"] if r["momentum"] == momentum]
        axis.errorbar(
            [r["size"] for r in rows],
            [r["mean"] for r in rows],
            yerr=[r["deviation"] for r in rows],
            label="the batch alone" if momentum is None else f"momentum {momentum}",
            color=PALETTE[number],
            marker="osD"[number],
            capsize=2,
        )
    axis.axhline(
        result["population"], color="black", linestyle="--", linewidth=1, label="population"
    )
    axis.set_xscale("log", base=2)
    axis.set_xlabel("pairs in a batch")
    axis.set_ylabel(f"KL(temperature={result['temperature']}) value")
    axis.legend(frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.set_title("Mean over batches, bars: one standard deviation", fontsize="medium")
    save(figure, path)


def main(folder: str) -> None:
    """Writes ``streaming_bias.json`` and ``.png``."""
    result = collect()
    write_text(Path(folder) / f"{FILE}.json", json.dumps(result, indent=1) + "\n")
    plot(result, Path(folder) / f"{FILE}.png")
    print(f"population {result['population']:.3f}")
    for r in result["records"]:
        print(f"n {r['size']:4d}  momentum {r['momentum']}: {r['mean']:.3f} ± {r['deviation']:.3f}")


if __name__ == "__main__":
    main(sys.argv[1])
