"""What a checkpoint keeps of us: the states of the sets, and the question that was being asked."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers.trainer_utils import sort_checkpoints

STATE_FILE = "drrlhf_state.safetensors"
UNFINISHED = ".checkpoint.part"  # where a checkpoint is written, until it is whole


def save(folder: Path, states: Mapping[str, nn.Module], facts: Mapping[str, str]) -> None:
    """Write the buffers of `states` and, beside them, `facts`."""
    tensors = {
        f"{name}.{key}": tensor.contiguous()
        for name, module in states.items()
        for key, tensor in module.state_dict().items()
    }
    save_file(tensors, folder / STATE_FILE, metadata=dict(facts))


def put_in_place(written: Path, checkpoint: Path, limit: int | None, best: str | None) -> None:
    """Give the folder `written` its name, and remove its own folder and older checkpoints.

    Of the checkpoints there, as many as `limit` stay, at least this one and `best`. Each comes and
    goes by one renaming: whatever ends the process leaves none in part.
    """
    unfinished = written.parent
    if checkpoint.exists():
        checkpoint.rename(unfinished / "replaced")
    written.rename(checkpoint)
    if limit is not None and limit > 0:
        found = sort_checkpoints(str(checkpoint.parent), use_mtime=True)
        spared = {str(checkpoint), best} & set(found)
        old = [name for name in found if name not in spared]
        for name in old[: max(0, len(found) - max(limit, len(spared)))]:
            Path(name).rename(unfinished / Path(name).name)
    shutil.rmtree(unfinished)


def facts(folder: Path) -> dict[str, str] | None:
    """The facts of a checkpoint; None where none were kept (TRL's own checkpoints)."""
    if not (folder / STATE_FILE).is_file():
        return None
    with safe_open(folder / STATE_FILE, "pt") as file:
        return dict(file.metadata() or {})


def load(folder: Path, states: Mapping[str, nn.Module]) -> None:
    """Read the buffers of `states` back.

    Raises:
        ValueError: the checkpoint has none, or others, for one of them.
    """
    kept = load_file(folder / STATE_FILE) if (folder / STATE_FILE).is_file() else {}
    for name, module in states.items():
        prefix = f"{name}."
        found = {k.removeprefix(prefix): t for k, t in kept.items() if k.startswith(prefix)}
        expected = {key: tuple(t.shape) for key, t in module.state_dict().items()}
        shapes = {key: tuple(t.shape) for key, t in found.items()}
        grows = getattr(module, "grows", False)
        if shapes.keys() != expected.keys() or (shapes != expected and not grows):
            raise ValueError(
                f"{folder / STATE_FILE}: expected {name} with {expected}, found "
                f"{shapes or 'none'}. Resume with the ambiguity set of the saved run, or start a "
                "new run from the checkpoint's model."
            )
        module.load_state_dict(found)
