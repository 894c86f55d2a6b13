"""Result files: what was measured, on what, with which versions, at which commit."""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
from collections.abc import Iterable
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import drrlhf as dr
from drrlhf.bench.budget import LEFT_OUT
from drrlhf.bench.registry import SUITES
from drrlhf.bench.runner import Outcome
from drrlhf.files import write_text

Result = dict[str, Any]

PEERS = (
    "trl",
    "transformers",
    "peft",
    "triton",
    "liger-kernel",
    "cut-cross-entropy",
    "sqwash",
    "dro",
)


def background(suite: str) -> Result:
    """What records are taken on: suite, device, date, versions, and commit (None outside a
    checkout; ends in -dirty when tracked files differ from it)."""
    return {
        "suite": suite,
        "device": device_name(SUITES[suite]),
        "date": date.today().isoformat(),
        "versions": versions(),
        "commit": commit(),
    }


def collect(suite: str, outcomes: Iterable[Outcome], taken_on: Result | None = None) -> Result:
    """What a result file holds: ``records`` beside what they were taken on, see `background`.

    Further keys: records, skipped (who did not run, and why), failed (our results that were wrong)
    and profiles (where the time of an implementation went, see `profile.of`).
    """
    outcomes = list(outcomes)
    return (background(suite) if taken_on is None else taken_on) | {
        "records": [record for outcome in outcomes for record in outcome.records],
        "skipped": [
            _about(outcome) | {"contender": name or None, "reason": why}
            for outcome in outcomes
            for name, why in outcome.skipped.items()
        ],
        "failed": [
            _about(outcome) | {"reason": why} for outcome in outcomes for why in outcome.failures
        ],
        "profiles": [
            _about(outcome) | {"contender": name, **found}
            for outcome in outcomes
            for name, found in outcome.profiles.items()
        ],
    }


# By which a case is told apart from others.
_CASE = ("op", "metric", "dtype", "shape", "head", "axis")


def _about(outcome: Outcome) -> dict[str, Any]:
    return {key: getattr(outcome.case, key) for key in _CASE} | {"shape": list(outcome.case.shape)}


def _case(entry: dict[str, Any]) -> tuple[Any, ...]:
    return (*(entry.get(key) for key in _CASE if key != "shape"), *(entry.get("shape") or ()))


def write(result: Result, folder: str | os.PathLike[str]) -> Path:
    """Write `result` as ``<suite>_<device>_<date>.json`` in `folder` and return the path.

    A file of the same day, commit and versions keeps its entries of the cases that were not
    measured now; one of another commit or other versions is set aside as
    ``<suite>_<device>-<commit>_<date>.json``. The file is whole at any time.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem(result)}.json"
    lists = ("records", "skipped", "failed", "profiles")
    if path.is_file():
        before = read(path)
        same = all(before.get(key) == result[key] for key in ("commit", "versions"))
        # What there was no time for says nothing about what an earlier run found.
        late = [e for e in result["skipped"] if not e["contender"] and e["reason"] == LEFT_OUT]
        measured = {_case(e) for key in lists for e in result[key] if e not in late}
        if same:
            kept = {
                key: [e for e in before.get(key, []) if _case(e) not in measured] for key in lists
            }
            known = {_case(e) for key in lists for e in kept[key]}
            new = result | {
                "skipped": [e for e in result["skipped"] if e not in late or _case(e) not in known]
            }
            result = result | {key: kept[key] + new[key] for key in lists}
        else:
            mark = slug(str(before.get("commit"))[:7])
            name = f"{before['suite']}_{slug(before['device'])}-{mark}_{before['date']}.json"
            path.replace(folder / name)
    write_text(path, json.dumps(result, indent=1) + "\n")
    return path


def stem(result: Result) -> str:
    """The name of a result's file, without its suffix."""
    return f"{result['suite']}_{slug(result['device'])}_{result['date']}"


def read(path: str | os.PathLike[str]) -> Result:
    """A result file.

    Raises:
        ValueError: not JSON, or without records.
    """
    try:
        result = json.loads(Path(path).read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(result, dict) or not isinstance(result.get("records"), list):
        raise ValueError(f"{path}: expected a result of drrlhf bench, with a list of records")
    return result


def newest(
    folder: str | os.PathLike[str], op: str, metric: str = "", suite: str = "cpu"
) -> Result | None:
    """The newest kept result of a suite in `folder` that has records of `op`, with a metric that
    begins with ``metric``; None without one."""
    found = ((path.stem.rpartition("_")[2], path) for path in Path(folder).glob(f"{suite}_*.json"))
    for _, path in sorted(found, reverse=True):
        result = read(path)
        if any(
            record["op"] == op and record["metric"].startswith(metric)
            for record in result["records"]
        ):
            return result
    return None


def device_name(device: str) -> str:
    """The processor's or the GPU's name, without what vendors decorate it with."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", info.read_text()) if info.exists() else []
    name = names[0].strip() if names else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)|@.*$", "", name).strip()


def slug(name: str) -> str:
    """A name as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def versions() -> dict[str, str]:
    """Versions of drrlhf, Python, torch and the peers that are installed."""
    found = {
        "drrlhf": dr.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    for package in PEERS:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """The commit of the checkout that this package is part of, if it is part of one."""
    package = Path(dr.__file__).parent
    # The package may be installed inside somebody else's checkout, which does not track it.
    if _git(package, "ls-files", "--error-unmatch", "version.py") is None:
        return None
    head = _git(package, "rev-parse", "HEAD")
    # The results of one op, just kept, are no change to what the next one measures.
    measured = (":/", ":(top,exclude)benchmarks/results")
    changed = _git(package, "status", "--porcelain", "--untracked-files=no", "--", *measured)
    return f"{head}-dirty" if changed else head


def _git(folder: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=folder)
    except FileNotFoundError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None
