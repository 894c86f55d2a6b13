"""Train three small models and make their stress pages, by the commands of the shell:
``python -m evidence.stress.run`` rewrites docs/stress, which README.md and docs/stress.md show.

The models are two encoders with a reward head, without and with views, and 8 layers of SmolLM2
after DPO. Texts, whose preferences are derived from ratings, are left out of the pages.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from drrlhf.demo import material, sentiment
from drrlhf.demo.dpo import LAYERS, cut_model
from drrlhf.files import write_text
from evidence.views.run import BATCH, SHARES, TRAINED

PAGES = Path(__file__).parents[2] / "docs" / "stress"
PROGRAMS = Path(sys.executable).parent
KEPT = ("pairs", "accuracy", "verdict", "findings", "requirements", "worst_change", "attacks")
SEED = 0


@dataclass(frozen=True)
class Sizes:
    """Training steps, and what is tested: pairs a domain, of all these how many with changes, and
    prompts with as many candidates each. ``policy`` are those of the policy."""

    steps: int = 150
    pairs: int = 250
    changed: int = 400
    prompts: int = 64
    candidates: int = 64
    policy_steps: int = 32
    policy_pairs: int = 40
    policy_changed: int = 80
    layers: int = LAYERS


QUICK = Sizes(2, 32, 8, 2, 64, policy_steps=2, policy_pairs=2, policy_changed=4)
# Files of the folder that the commands run in.
REWARD = """
drrlhf train reward --data train.jsonl --model minilm {training} --output-dir rm-plain
drrlhf train reward --data train.jsonl --model minilm {training} --views {views}
  --output-dir rm-views
drrlhf stress --model rm-plain --model rm-views --data held_out.jsonl --changed-pairs {changed}
  --best-of candidates.jsonl --dtype float32 --no-texts --output-dir reward
  --require "worst-change accuracy>=0.5" --require "best-of-64 gold>=best-of-1"
  --require "domain=nyt accuracy>=0.7"
"""
POLICY = """
drrlhf train dpo --data train_prompts.jsonl --model smollm2 --lora --batch-size 16
  --max-steps {policy_steps} --learning-rate 5e-4 --max-length 128 --seed 0
  --output-dir smollm2-dpo
drrlhf stress --model smollm2-dpo --data held_out_prompts.jsonl --prompt-column none
  --changed-pairs {policy_changed} --dtype float32 --no-texts --output-dir policy
"""
TRAINING = "--batch-size {batch} --max-steps {steps} --learning-rate 5e-5 --seed 0"


def commands(sizes: Sizes) -> list[list[str]]:
    """The words of every command, in order."""
    training = TRAINING.format(batch=BATCH, steps=sizes.steps)
    told = {**vars(sizes), "training": training, "views": ",".join(TRAINED)}
    text = (REWARD + POLICY).replace("\n  ", " ").format(**told)
    return [shlex.split(line) for line in text.splitlines() if line]


def write_data(folder: Path, sizes: Sizes) -> None:
    """The files that the commands name, beside their models."""
    splits = sentiment.split_texts(sentiment.load_texts(material.fetch("sentiment")), SEED)
    train = [
        pair
        for domain, share in SHARES.items()
        for pair in sentiment.make_pairs(
            splits["train"][domain], round(share * sizes.steps * BATCH), seed=SEED
        )
    ]
    random.Random(SEED).shuffle(train)
    _write(folder / "train.jsonl", map(_answers, train))
    _write(folder / "train_prompts.jsonl", (_prompt(p) | _answers(p) for p in train))
    test = splits["test"]
    held_out = [
        pair
        for domain in sentiment.DOMAINS
        for pair in sentiment.make_pairs(test[domain], sizes.pairs, seed=SEED)
    ]
    _write(folder / "held_out.jsonl", (_answers(p) | {"domain": p.domain} for p in held_out))
    by_policy = [
        pair
        for domain in sentiment.DOMAINS
        for pair in sentiment.make_pairs(test[domain], sizes.policy_pairs, seed=SEED)
    ]
    rows = (_prompt(p) | _answers(p) | {"domain": p.domain} for p in by_policy)
    _write(folder / "held_out_prompts.jsonl", rows)
    _write(folder / "candidates.jsonl", _candidates(test, sizes))


def _answers(pair: sentiment.Pair) -> dict[str, Any]:
    return {"chosen": pair.chosen, "rejected": pair.rejected}


def _prompt(pair: sentiment.Pair) -> dict[str, Any]:
    return {"prompt": f"{pair.prompt}\n"}


def _candidates(test: Mapping[str, list[sentiment.Text]], sizes: Sizes) -> list[dict[str, Any]]:
    """Texts of one domain a row, each with its mean rating."""
    draw, rows = random.Random(SEED), []
    for i in range(sizes.prompts):
        domain = sentiment.DOMAINS[i % len(sentiment.DOMAINS)]
        some = draw.sample(test[domain], sizes.candidates)
        texts, gold = [text.text for text in some], [text.rating for text in some]
        rows.append({"id": f"{domain} {i}", "candidates": texts, "gold": gold, "domain": domain})
    return rows


def _write(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    write_text(path, "".join(f"{json.dumps(row)}\n" for row in rows))


def kept(report: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """What is kept of a report beside its page, by model."""
    return {name: {part: model[part] for part in KEPT} for name, model in report["models"].items()}


def make(output: Path, sizes: Sizes) -> None:
    """Run all of it, and leave reward.html, policy.html and kept.json in ``output``.

    Raises:
        CalledProcessError: a command failed; a gate that is missed is no failure.
    """
    models = {"minilm": material.fetch("minilm"), "smollm2": cut_model(sizes.layers, Console())}
    output.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_data(folder, sizes)
        for name, source in models.items():
            (folder / name).symlink_to(source)
        for words in commands(sizes):
            print(shlex.join(words), flush=True)
            done = subprocess.run([str(PROGRAMS / words[0]), *words[1:]], cwd=folder, check=False)
            missed = words[1] == "stress" and done.returncode == 1
            if not missed:
                done.check_returncode()
        for page in ("reward", "policy"):
            shutil.copyfile(folder / page / "report.html", output / f"{page}.html")
            found |= kept(json.loads((folder / page / "report.json").read_text(encoding="utf-8")))
    write_text(output / "kept.json", f"{json.dumps(found, indent=1)}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=PAGES)
    parser.add_argument("--quick", action="store_true", help="tiny: proves only that it works")
    arguments = parser.parse_args()
    make(arguments.output, QUICK if arguments.quick else Sizes())


if __name__ == "__main__":
    main()
