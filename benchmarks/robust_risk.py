"""`robust_risk` forward + backward against `torch.logsumexp`, the cheapest smooth reduction.

    python benchmarks/robust_risk.py [--n 4096] [--output FOLDER] [--readme]

Every set at n losses on the CPU, one thread, interleaved with the baseline in one process; medians
of many rounds, their spread beside them. Each set is checked against the reference before it is
timed. The figure to reach is a ratio of at most 4.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import statistics
import subprocess
import time
from datetime import date
from pathlib import Path

import torch

import drrlhf as dr
from drrlhf import backends

HERE = Path(__file__).parent
SETS = [
    "erm", "tv:0.1", "kl:0.1", "kl:temperature=1", "kl:temperature=-1", "chi2:0.5",
    "chi2:penalty=1", "cvar:0.3", "cvar:0.3,trim=0.05", "cvar:0.3,temperature=0.5", "group:4",
]  # fmt: skip


def seconds(function, calls: int = 20) -> float:
    start = time.perf_counter()
    for _ in range(calls):
        function()
    return (time.perf_counter() - start) / calls


def check(losses: torch.Tensor, text: str, groups: torch.Tensor) -> None:
    """Correctness first: the serving backend against the reference in float64."""
    ours = dr.robust_risk(losses.detach().double(), text, groups=groups)
    with backends.use("reference"):
        truth = dr.robust_risk(losses.detach().double(), text, groups=groups)
    torch.testing.assert_close(ours.value, truth.value, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.weights, truth.weights, rtol=1e-6, atol=1e-12)


def measure(n: int, rounds: int) -> list[dict]:
    losses = torch.randn(n, generator=torch.Generator().manual_seed(0)).requires_grad_()
    groups = torch.arange(n) % 4

    def step(reduce) -> None:
        losses.grad = None
        reduce().backward()

    functions = {"logsumexp": lambda: step(lambda: torch.logsumexp(losses, 0))}
    for text in SETS:
        check(losses, text, groups)
        ambiguity = dr.parse_ambiguity(text)
        functions[text] = lambda a=ambiguity: step(
            lambda: dr.robust_risk(losses, a, groups=groups).value
        )
    times: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            times[name].append(seconds(function))
    base = statistics.median(times["logsumexp"][1:])
    backend = "cpp" if backends.build_info()["built"] else "reference"
    records = []
    for name in SETS:
        samples = times[name][1:]
        value = statistics.median(samples)
        records.append(
            {
                "op": "robust_risk", "backend": backend, "dtype": "float32", "shape": [n],
                "head": None, "metric": name, "value": value * 1e6, "unit": "us",
                "spread": (max(samples) - min(samples)) * 1e6, "baseline": "torch.logsumexp",
                "baseline_value": base * 1e6, "ratio": value / base,
            }
        )  # fmt: skip
    return records


def device() -> str:
    """The processor's name, without what vendors decorate it with."""
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    return names[0].strip() if names else platform.machine()


def result(records: list[dict]) -> dict:
    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, cwd=HERE)
    return {
        "device": device(),
        "versions": {"torch": torch.__version__, "drrlhf": dr.__version__},
        "commit": commit.stdout.strip() or None,
        "records": records,
    }


def newest() -> dict:
    """The newest result that is kept beside this file."""
    files = sorted((HERE / "results").glob("robust_risk_*.json"), key=lambda p: p.stem[-10:])
    return json.loads(files[-1].read_text())


def readme_table(kept: dict) -> str:
    """The README's table, from a kept result."""
    lines = ["| set | ratio to `torch.logsumexp` |", "|---|---|"]
    lines += [f"| `{r['metric']}` | {r['ratio']:.1f} |" for r in kept["records"]]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--output", type=Path, help="folder for the result file")
    parser.add_argument("--readme", action="store_true", help="print the README's table and stop")
    options = parser.parse_args()
    if options.readme:
        print(readme_table(newest()))
        return
    torch.set_num_threads(1)
    records = measure(options.n, options.rounds)
    print(f"torch.logsumexp, n = {options.n}: {records[0]['baseline_value']:.1f} us")
    for r in records:
        print(
            f"{r['metric']:28s} {r['value']:8.1f} us  {r['ratio']:5.2f}x  spread {r['spread']:.1f}"
        )
    if options.output:
        name = re.sub(r"[^a-z0-9]+", "-", device().lower()).strip("-")
        path = options.output / f"robust_risk_{name}_{date.today()}.json"
        path.write_text(json.dumps(result(records), indent=1) + "\n")
        print(path)


if __name__ == "__main__":
    main()
