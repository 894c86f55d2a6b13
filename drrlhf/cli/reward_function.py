"""What ``--reward`` names: a function in a Python module, or the directory of a reward model."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any


def load(reward: str) -> Any:
    """What TRL takes as a reward function.

    ``module:function`` is imported, from the working directory too; the function is called as
    TRL's: ``function(prompts, completions, **columns)`` gives a number, or None, for each. A
    directory (or hub name) is a sequence-classification model with one label, such as ``drrlhf
    train reward`` leaves: its score of the prompt followed by the completion.

    Raises:
        ValueError: there is no such module, function or directory.
    """
    path = Path(reward).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ValueError(f"--reward {reward}: a directory without config.json is no model")
        return str(path)
    module, colon, function = reward.partition(":")
    if not colon:
        if reward.startswith((".", "/", "~")) or reward.count("/") > 1:
            raise ValueError(f"--reward {reward}: no such directory")
        return reward  # a hub name
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
