"""What ``--reward`` names: a function in a Python module, or the directory of a reward model."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from drrlhf import models

logger = logging.getLogger(__name__)

# Columns of prompts that TRL's trainer fails on at the first step, and why; and those of which no
# reward function hears, since TRL gives it something else under their name, or nothing.
REFUSED = {
    **dict.fromkeys(("prompts", "completions"), "a reward function gets these from TRL"),
    **dict.fromkeys(("image", "images"), "training takes them for pictures, and prompts are text"),
}
UNHEARD = {"completion", "completion_ids", "trainer_state", "log_extra", "log_metric"}


def check_columns(source: str, names: Iterable[str]) -> None:
    """Say which columns of prompts do not reach a reward function.

    Raises:
        ValueError: training cannot begin with a column of that name.
    """
    for name in sorted(REFUSED.keys() & {*names}):
        raise ValueError(f"{source}: column {name!r}: {REFUSED[name]}; rename it, or leave it out")
    if unheard := sorted(UNHEARD & {*names}):
        logger.warning(
            "%s: columns that do not reach the reward function, since TRL has another use for "
            "their name: %s; rename them if it is to read them",
            source,
            ", ".join(unheard),
        )


def find(reward: str) -> Any:
    """The function, or the name of a reward model, that is meant.

    ``module:function`` is imported, from the working directory too; the function is called as
    TRL's: ``function(prompts, completions, **columns)`` gives a number, or None, for each. A
    directory (or hub name) is a sequence-classification model with one label, such as ``drrlhf
    train reward`` leaves, whole or as adapters: its score of the prompt followed by the completion.

    Raises:
        ValueError: there is no such module, function or directory, or another kind of model in it.
    """
    path = Path(os.path.expanduser(reward))
    module, colon, function = reward.partition(":")
    if path.is_dir() or not colon:
        if not path.is_dir() and models.is_path(reward):
            raise ValueError(f"--reward {reward}: no such directory")
        name = str(path) if path.is_dir() else reward  # else a hub name
        try:
            described = models.describe(name)
        except OSError as error:
            raise ValueError(f"--reward {error}; a function is module:function") from error
        if described.kind != models.REWARD:
            raise ValueError(
                f"--reward {reward}: expected a reward model (sequence classification), got "
                f"{described.found}; train one with drrlhf train reward, or give module:function"
            )
        if described.labels not in (None, 1):
            raise ValueError(
                f"--reward {reward}: expected a reward model of one label, got {described.labels}"
            )
        return name
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not (module + ".").startswith(error.name + "."):
            raise  # something that the module itself needs
        raise ValueError(
            f"--reward {reward}: no module {module!r} here or installed; give module:function, "
            "or the directory of a reward model"
        ) from error
    if not callable(getattr(found, function, None)):
        raise ValueError(f"--reward {reward}: {module} has no function {function!r}")
    return getattr(found, function)


def load(reward: str) -> Any:
    """What TRL takes as a reward function: what `find` finds, adapters loaded and merged.

    Raises:
        ValueError: as `find`, or the model under adapters is not there.
    """
    found = find(reward)
    if not isinstance(found, str) or models.adapters_of(found) is None:
        return found
    model = models.load(found, models.REWARD).merge_and_unload().eval()
    model.config._name_or_path = found  # where TRL looks for the tokenizer
    return model
