"""Every public name with its arguments and the first sentence of its docstring, for docs/api.md."""

from __future__ import annotations

import importlib
import inspect
import re
from typing import Any


def listed(module: str) -> str:
    """Markdown: a line for each name in the ``__all__`` of a module that is no constant."""
    home = importlib.import_module(module)
    found = {name: getattr(home, name) for name in home.__all__}
    return "\n".join(
        f"- `{name}{_arguments(value)}`: {first_sentence(value)}"
        for name, value in sorted(found.items(), key=lambda one: one[0].lower())
        if inspect.isclass(value) or inspect.isroutine(value) or inspect.ismodule(value)
    )


def first_sentence(value: Any) -> str:
    """The first sentence of a docstring, on one line.

    Raises:
        ValueError: there is no docstring.
    """
    said = inspect.getdoc(value)
    if not said:
        raise ValueError(f"{value!r}: expected a docstring, got none; say in it what this is for")
    paragraph = " ".join(said.split("\n\n")[0].split())
    return re.split(r"(?<=[.:]) (?=[A-Z(])", paragraph)[0].rstrip(":")


def _arguments(value: Any) -> str:
    """The names of a function's arguments, in parentheses; nothing for a class."""
    if not inspect.isroutine(value):
        return ""
    names: list[str] = []
    for one in inspect.signature(value).parameters.values():
        if one.kind is inspect.Parameter.VAR_KEYWORD:
            names += _keywords(value, one.annotation) or [f"**{one.name}"]
        else:
            several = one.kind is inspect.Parameter.VAR_POSITIONAL
            names.append(("*" if several else "") + one.name)
    return f"({', '.join(names)})"


def _keywords(function: Any, annotation: Any) -> list[str]:
    """The names that ``**options: Unpack[LISTED]`` of a function stands for; none of others."""
    # The annotation is text, which `Unpack` of type checkers alone would not evaluate.
    listed = re.fullmatch(r"Unpack\[(\w+)\]", str(annotation))
    if listed is None:
        return []
    return list(inspect.unwrap(function).__globals__[listed[1]].__annotations__)
