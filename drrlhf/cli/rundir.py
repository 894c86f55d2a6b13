"""The directory of one training run: what it records, who may write there, where to go on from.

``run.json``       settings, versions and data fingerprint, written before the first step
``metrics.jsonl``  one line per log event
``checkpoint-N/``  everything needed to continue after optimizer step N
``training.png``   the curves
"""

from __future__ import annotations

import datetime
import hashlib
import json
import shutil
from functools import partial
from pathlib import Path
from typing import Any

from drrlhf.cli.settings import FREE_ON_RESUME
from drrlhf.files import write_text, write_whole
from drrlhf.models import REFERENCE, has_reference

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
PLOT_FILE = "training.png"

# What a run or a saved model leaves behind, and what marks it as a run of ours.
_OURS = (RUN_FILE, METRICS_FILE, "checkpoint-*")
_MODEL = ("config.json", "adapter_config.json", "*.safetensors", "*.safetensors.index.json")
_TRACES = (*_OURS, *_MODEL, "*.gguf", "pytorch_model*.bin")


def occupant(output_dir: Path) -> str | None:
    """Name of the first file in `output_dir` that shows a run or a model lives there, or None."""
    found = (path.name for pattern in _TRACES for path in sorted(output_dir.glob(pattern)))
    return next(found, None)


def sweep(output_dir: Path) -> None:
    """Remove what a killed process was still writing there, or removing."""
    for path in output_dir.glob(".*.part"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def clear(output_dir: Path) -> None:
    """Remove an earlier run: checkpoints, curves, its model, and at last its record.

    A model that stayed would be taken for the new run's where that one saves adapters only. A
    checkpoint goes at once, and the record, which says that all this may be removed, goes last: a
    process killed in between leaves a run that can be continued or overwritten.
    """
    for path in output_dir.glob("checkpoint-*"):
        if path.is_dir():
            shutil.rmtree(path.rename(output_dir / f".{path.name}.part"))
    if has_reference(output_dir):
        shutil.rmtree((output_dir / REFERENCE).rename(output_dir / f".{REFERENCE}.part"))
    for pattern in (*_MODEL, PLOT_FILE, METRICS_FILE, RUN_FILE):
        for path in output_dir.glob(pattern):
            path.unlink()


def newest_checkpoint(output_dir: Path) -> Path | None:
    """The usable checkpoint with the highest step in `output_dir`, or None.

    The trainer writes ``trainer_state.json`` after the weights, the optimizer and the random
    states, so a checkpoint whose state file is missing, cut off or of another step was interrupted
    while it was written and is passed over.
    """
    usable = [path for path in output_dir.glob("checkpoint-*") if checkpoint_state(path)]
    return max(usable, key=lambda path: checkpoint_state(path)["global_step"], default=None)


def checkpoint_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer state saved in `checkpoint`, or an empty dict when it cannot be used."""
    try:
        state = json.loads((checkpoint / "trainer_state.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, json.JSONDecodeError):
        return {}
    named = checkpoint.name.rpartition("-")[2]
    return state if str(state.get("global_step")) == named else {}


def model_fingerprint(model: str) -> str:
    """What identifies the start weights: a hub name itself, or a digest of a local directory.

    The digest covers ``config.json`` and the names and sizes of the weight files; reading tens of
    gigabytes to notice an edit in place would cost more than it protects.
    """
    directory = Path(model)
    if not directory.is_dir():
        return model
    digest = hashlib.sha256()
    for path in sorted(directory.iterdir()):
        if path.suffix in {".safetensors", ".bin"}:
            digest.update(f"{path.name}:{path.stat().st_size};".encode())
        elif path.name in {"config.json", "adapter_config.json"}:
            digest.update(path.read_bytes())
    return digest.hexdigest()


def data_fingerprint(dataset: Any) -> str:
    """sha256 of every row, in order: the same data in JSONL and in Parquet has one fingerprint."""
    digest = hashlib.sha256()
    for row in dataset:
        line = json.dumps(row, sort_keys=True, ensure_ascii=False, default=str)
        digest.update(line.encode("utf-8", "surrogatepass") + b"\n")
    return digest.hexdigest()


def read_record(output_dir: Path) -> dict[str, Any]:
    """The run recorded in `output_dir`.

    Raises:
        ValueError: there is no ``run.json``, or it is not valid JSON.
    """
    path = output_dir / RUN_FILE
    if not path.is_file():
        raise ValueError(
            f"--resume: {output_dir} holds no run to continue ({RUN_FILE} is missing); "
            "start one by leaving --resume out"
        )
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise ValueError(f"--resume: {path} is not valid JSON ({error})") from error


def write_record(output_dir: Path, record: dict[str, Any]) -> None:
    """Write ``run.json`` so that a crash leaves either the old or the new one."""
    text = json.dumps(record, indent=2, ensure_ascii=False) + "\n"
    write_text(output_dir / RUN_FILE, text)


def check_same_run(record: dict[str, Any], new: dict[str, Any]) -> None:
    """Refuse to continue `record` with settings, data or model that would change its numbers.

    Raises:
        ValueError: names every difference, as recorded and as given now.
    """
    before, now = _comparable(record), _comparable(new)
    changed = [
        f"{name} was {before.get(name)!r}, now {value!r}"
        for name, value in now.items()
        if before.get(name) != value
    ]
    if changed:
        raise ValueError(
            f"--resume: not the run that started here: {'; '.join(changed)}. Give the settings "
            "that it was started with, or start a new run in another --output-dir"
        )


def _comparable(record: dict[str, Any]) -> dict[str, Any]:
    settings = {k: v for k, v in record["settings"].items() if k not in FREE_ON_RESUME}
    return settings | {
        "data sha256": record["data"]["sha256"],
        "group names": record["data"]["group_names"],
        "model fingerprint": record["model_fingerprint"],
    }


def promote(checkpoint: Path, output_dir: Path) -> None:
    """Copy model and tokenizer of a finished run's last checkpoint to `output_dir`, file by file
    whole."""
    training_only = (
        "optimizer.pt",
        "scheduler.pt",
        "trainer_state.json",
        "training_args.bin",
        "drrlhf_state.safetensors",
    )
    for path in sorted(checkpoint.iterdir()):
        if path.is_file() and path.name not in training_only and path.suffix != ".pth":
            write_whole(output_dir / path.name, partial(shutil.copy2, path))
    if has_reference(checkpoint):
        shutil.copytree(checkpoint / REFERENCE, output_dir / REFERENCE, dirs_exist_ok=True)


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
