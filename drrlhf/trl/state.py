"""What a checkpoint keeps of us: the states of the sets, and the question that was being asked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

STATE_FILE = "drrlhf_state.safetensors"


def save(folder: Path, states: Mapping[str, nn.Module], facts: Mapping[str, str]) -> None:
    """Write the buffers of `states` and, beside them, `facts`."""
    tensors = {
        f"{name}.{key}": tensor.contiguous()
        for name, module in states.items()
        for key, tensor in module.state_dict().items()
    }
    save_file(tensors, folder / STATE_FILE, metadata=dict(facts))


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
    for name, module in states.items():
        found: dict[str, torch.Tensor] = {}
        if (folder / STATE_FILE).is_file():
            with safe_open(folder / STATE_FILE, "pt") as file:
                prefix = f"{name}."
                found = {
                    key.removeprefix(prefix): file.get_tensor(key)
                    for key in file.keys()  # noqa: SIM118 - not a mapping
                    if key.startswith(prefix)
                }
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
