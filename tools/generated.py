"""Numbers in README.md and docs/ stand in blocks, made from kept results (and tables of the code):
``python -m tools.generated`` says which blocks differ from them, ``--write`` rewrites these.

A block is ``<!-- generated: NAME -->``, its text, ``<!-- end -->``; `blocks` has every NAME. Tables
of the CPU benchmarks are those of `drrlhf bench --readme`.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from drrlhf.bench import results
from drrlhf.bench.table import markdown, readme_tables
from drrlhf.bench.trainer_step import of_prompts
from drrlhf.files import json_lines, write_text
from drrlhf.reference.pair_losses import PAIR_LOSSES
from drrlhf.seeds import mean_and_error
from drrlhf.transformations import ATTACK, TRANSFORMATIONS
from evidence import pays
from evidence.best_of import summary as best_of
from evidence.labels import summary as labels
from evidence.shift import page, summary
from evidence.tables import kept
from evidence.views import expected, length
from evidence.views import summary as views
from tools.api import first_sentence, listed

ROOT = Path(__file__).parent.parent
KEPT = ROOT / "benchmarks" / "results"
BLOCK = re.compile(r"(<!-- generated: (\S+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """README.md and docs/, whose commands are tests, too."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def evidence_pages() -> list[Path]:
    """What was found, beside its protocol."""
    return sorted((ROOT / "evidence").glob("*/README.md"))


def blocks() -> dict[str, str]:
    """{NAME: markdown}, from the results that are kept in the checkout."""
    steps = gpu_steps()
    viewed, viewed_by_dpo = (kept(f"views/results/{name}.jsonl") for name in ("reward", "dpo"))
    return {
        **readme_tables(KEPT),
        "reward_demo": _reward_demo(_read("reward_demo")),
        "grpo_demo": _grpo_demo(_read("grpo_demo")),
        "gpu_speed": _gpu_speed(steps),
        "gpu_step": _gpu_step(steps),
        "gpu_head": _gpu_head(list(json_lines(_kept("gpu-ops", ".jsonl")))),
        "pair_losses": _pair_losses(),
        "transformations": _transformations(),
        "attacks": _attacks(),
        "best_of": best_of.tables(kept("best_of/results/best_of.jsonl")),
        "labels": labels.tables(kept("labels/results/labels.jsonl")),
        "pays": pays.table(),
        "stress": _stress(_stressed()),
        "views_reward": views.tables(viewed),
        "views_expected": expected.table(viewed, expected.REWARD),
        "views_length": length.table(viewed),
        "views_confirmed": expected.table(viewed, expected.CONFIRMED),
        "views_dpo": views.tables(viewed_by_dpo),
        "views_dpo_expected": expected.table(viewed_by_dpo, expected.DPO),
        "stress_findings": _stress_findings(_stressed()),
        **summary.tables(page.HERE / "results"),
        "api": listed("drrlhf"),
        **{
            f"api_{part}": listed(f"drrlhf.{part}") for part in ("trl", "stress", "transformations")
        },
    }


def names(text: str) -> list[str]:
    """The names of the blocks of a page, in order."""
    return [found[2] for found in BLOCK.finditer(text)]


def rewritten(text: str, known: Mapping[str, str]) -> str:
    """A page with the text of every block as it is generated.

    Raises:
        ValueError: a block has a name that nothing generates.
    """

    def block(found: re.Match[str]) -> str:
        if found[2] not in known:
            expected = ", ".join(sorted(known))
            raise ValueError(f"generated: expected one of {expected}, got {found[2]!r}")
        return f"{found[1]}{known[found[2]]}\n{found[4]}"

    return BLOCK.sub(block, text)


def _kept(kind: str, suffix: str) -> Path:
    """The newest kept file of a kind; names end in their date."""
    return max(KEPT.glob(f"{kind}_*{suffix}"), key=lambda path: path.stem.rpartition("_")[2])


def gpu_steps() -> results.Result:
    """The newest kept result of a GPU that has steps of a trainer."""
    found = results.newest(KEPT, "trainer_step", suite="gpu")
    assert found is not None
    return found


def _read(kind: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(_kept(kind, ".json").read_text(encoding="utf-8"))
    return found


def _reward_demo(result: dict[str, Any]) -> str:
    """Rows: an ambiguity set. Cells: accuracy by domain; in the worst, above plain training."""
    methods = result["methods"]
    domains = list(methods["erm"]["accuracy"])
    rows = []
    for name, method in methods.items():
        gain = method["worst_minus_erm"]
        error = f"{100 * gain['mean']:+.1f} ± {100 * gain['standard_error']:.1f}"
        cells = [f"{100 * method['accuracy'][domain]['mean']:.1f}" for domain in domains]
        rows.append((f"`{name}`", *cells, "–" if name == "erm" else error))
    return markdown(
        (f"accuracy, % ({result['protocol']['seeds']} seeds)", *domains, "worst domain − `erm`"),
        rows,
    )


def _pair_losses() -> str:
    """Rows: a loss of a pair. Cells: where it comes from, and what it takes besides ``beta``."""
    rows = []
    for name, loss in PAIR_LOSSES.items():
        smoothing = f"`label_smoothing` in {loss.smoothing}" if loss.smoothing else ""
        takes = (smoothing, "`f_divergence`" if loss.divergences else "")
        needs = (
            "a reference" if loss.reference else "",
            "lengths of the answers" if loss.lengths else "",
        )
        cells = [", ".join(filter(None, some)) or "–" for some in (needs, takes)]
        rows.append((f"`{name}`", first_sentence(loss.function).rstrip("."), *cells))
    return markdown(("loss", "from", "needs", "takes"), rows)


def _grpo_demo(result: dict[str, Any]) -> str:
    """Rows: a domain. Cells: held-out reward before and after, and the paired difference."""
    plain, robust = (run["rewards"] for run in result["runs"])
    rows = []
    for domain, share in result["domains"].items():
        differences = [b - a for a, b in zip(plain[domain], robust[domain], strict=True)]
        mean, error = mean_and_error(differences)
        means = [mean_and_error(of[domain])[0] for of in (result["start"], plain, robust)]
        cells = [f"{value:.2f}" for value in means]
        rows.append((f"{domain} ({share})", *cells, f"{mean:+.3f} ± {error:.3f}"))
    sets = [f"`{run['ambiguity']}`" for run in result["runs"]]
    settings = result["settings"]
    title = f"reward, {settings['steps']} steps, {settings['seeds']} seeds"
    return markdown((title, "before", *sets, "difference"), rows)


# Of a step on a GPU, its metric and what the table calls it, by its record.
_GPU_STEPS = (
    (of_prompts(1536, 256), "{pairs} pairs, prompts of 1536, answers of 256"),
    ("step in one forward", "{pairs} pairs of {tokens} tokens, no prompt in common"),
)
# Ours and TRL's, without and with Liger's layers.
_GPU_CONTENDERS = (
    ("drrlhf (shared)", "drrlhf (erm)"),
    ("trl",),
    ("drrlhf (shared, liger)", "drrlhf (erm, liger)"),
    ("trl with liger",),
)


def _gpu_speed(result: results.Result) -> str:
    """Rows: a DPO step. Cells: tokens a second, ours beside TRL's."""
    rows = []
    for metric, title in _GPU_STEPS:
        same = {r["contender"]: r for r in result["records"] if r["metric"] == metric}
        if not same:
            continue
        (_, pairs, tokens) = next(iter(same.values()))["shape"]
        found = [
            next((same[name] for name in names if name in same), None) for names in _GPU_CONTENDERS
        ]
        cells = [
            "–" if record is None else f"{record['tokens_per_s'] / 1000:.1f}k" for record in found
        ]
        rows.append((title.format(pairs=pairs, tokens=tokens), *cells))
    trl = f"TRL {result['versions']['trl'].rpartition('.')[0]}"
    return markdown(
        (
            f"DPO step, tokens/s, {result['device']}",
            "drrlhf",
            trl,
            "drrlhf, Liger's layers",
            f"{trl}, Liger's layers",
        ),
        rows,
    )


def _gpu_step(result: results.Result) -> str:
    """Rows: who trains. Cells: the median time of a step, its spread, and peak memory."""
    versions = result["versions"]
    mine = {"trl": f"TRL {versions['trl']}", "trl with liger": "TRL with Liger's layer kernels"}
    columns: dict[str, dict[str, str]] = {}
    shapes = {r["metric"]: r["shape"] for r in result["records"]}
    steps = [(metric, title) for metric, title in _GPU_STEPS if metric in shapes]
    for metric, _ in steps:
        for one in result["records"]:
            if one["metric"] == metric:
                name = mine.get(one["contender"]) or "drrlhf, `{}`".format(
                    re.sub(r"^drrlhf \((.*)\)$", r"\1", one["contender"])
                )
                time = f"{one['value']:.0f} ± {one['spread']:.0f} {one['unit']}"
                memory = f"{one['peak_mib'] / 1024:.1f} GiB"
                columns.setdefault(name, {})[metric] = f"{time}, {memory}"
    rows = [
        (name, *(cells.get(metric, "–") for metric, _ in steps)) for name, cells in columns.items()
    ]
    titles = [
        title.format(pairs=shapes[metric][1], tokens=shapes[metric][2]) for metric, title in steps
    ]
    where = (
        f"{result['device']}, {result['date']}, commit {str(result['commit'])[:7]}; median ± IQR"
    )
    return markdown((where, *titles), rows)


_GPU_WHO = {
    "triton": "drrlhf, Triton",
    "cuda": "drrlhf, CUDA C++",
    "plain": "plain PyTorch",
    "torch.compile": "torch.compile",
    "trl": "TRL",
}


def _gpu_head(lines: Sequence[dict[str, Any]]) -> str:
    """Rows: who computes the head. Cells: time of scoring, and of forward + backward."""
    found = {(one["who"], one["kind"]): one for one in lines if one["item"] == "head"}
    rows = [
        (title, *(f"{found[who, kind]['ms']:.1f} ms" for kind in ("forward", "frozen")))
        for who, title in _GPU_WHO.items()
    ]
    one = found["triton", "frozen"]
    device = next(line["name"] for line in lines if line["item"] == "device")
    title = f"frozen head, {one['n']}×{one['d']} by {one['v']}×{one['d']}, bfloat16, {device}"
    return markdown((title, "scoring", "forward + backward"), rows)


def _transformations() -> str:
    """Rows: a view. Cells: its kind, what it does, at what rate, and when it keeps the meaning."""
    rows = [
        (f"`{name}`", one.kind, one.what, "–" if one.rate is None else f"{one.rate:g}", one.keeps)
        for name, one in TRANSFORMATIONS.items()
        if one.kind != ATTACK
    ]
    return markdown(("view", "kind", "change", "rate", "keeps the meaning"), rows)


def _stressed() -> dict[str, Any]:
    """What is kept of the reports behind docs/stress/*.html."""
    return json.loads((ROOT / "docs" / "stress" / "kept.json").read_text(encoding="utf-8"))


def _attacks() -> str:
    """Rows: an attack. Cells: what it does, and at what rate."""
    rows = [
        (
            f"`{name}`",
            one.what.removeprefix("attack: "),
            "–" if one.rate is None else f"{one.rate:g}",
        )
        for name, one in TRANSFORMATIONS.items()
        if one.kind == ATTACK
    ]
    return markdown(("attack", "on the rejected answer", "rate"), rows)


def _stress(models: Mapping[str, Any]) -> str:
    """Rows: a model whose page is kept. Cells: accuracy, under the worst change, and attacks."""

    def share(found: Mapping[str, float]) -> str:
        low, high = (f"{100 * found[end]:.1f}" for end in ("low", "high"))
        return f"{100 * found['value']:.1f} [{low}, {high}]"

    rows = [
        (
            f"`{name}`",
            f"{100 * model['accuracy']:.1f}",
            share(model["worst_change"]["accuracy"]),
            share(model["attacks"]["success"]),
        )
        for name, model in models.items()
    ]
    return markdown(("model", "accuracy, %", "under the worst change", "best attack"), rows)


def _stress_findings(models: Mapping[str, Any]) -> str:
    """What the first of the pages begins with, in its words."""
    told = (f"*{finding['text']}*" for finding in next(iter(models.values()))["findings"])
    return " ".join(told)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="rewrite the blocks that differ")
    options = parser.parse_args()
    known, stale = blocks(), []
    for path in [*pages(), *evidence_pages()]:
        text = path.read_text(encoding="utf-8")
        new = rewritten(text, known)
        if new != text:
            stale.append(str(path.relative_to(ROOT)))
            if options.write:
                write_text(path, new)
    if stale:
        print(("rewritten: " if options.write else "out of date: ") + ", ".join(stale))
    if stale and not options.write:
        sys.exit(1)


if __name__ == "__main__":
    main()
