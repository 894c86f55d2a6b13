"""Options that several commands about scored pairs share, and commands whose options are listed in
a dataclass."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import typing
from collections.abc import Callable, Sequence
from typing import Annotated, Any, TypeVar

import typer

Function = TypeVar("Function", bound=Callable[..., Any])

# Said alike by the commands about scored pairs.
PROMPT_COLUMN: dict[str, Any] = {
    "help": "Column by which pairs belong together.",
    "show_default": "prompt_id, prompt, question_id or id; none: every pair by itself",
}
MAX_NAN = "Share of scores that may be NaN, infinite or missing."
RESAMPLES = "Bootstrap samples of prompts."


def chosen(options: Any, *names: str) -> dict[str, Any]:
    """The options of these names, for what knows them by the same ones."""
    return {name: getattr(options, name) for name in names}


def option(default: Any, help: str, *names: str, **rules: Any) -> Any:
    """A field of a dataclass for `taken_from`; a default of ... asks for a value."""
    said = typer.Option(*names, help=help, **rules)
    if default is ...:
        return dataclasses.field(metadata={"option": said})
    return dataclasses.field(default=default, metadata={"option": said})


def parameter(name: str, default: Any, hint: Any, said: Any) -> inspect.Parameter:
    """An option of a command, of which typer is ``said`` the rest."""
    default = inspect.Parameter.empty if default is dataclasses.MISSING else default
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=default, annotation=Annotated[hint, said])


def with_parameters(function: Function, parameters: Sequence[inspect.Parameter]) -> Function:
    """``function``, which takes any options, with the signature that typer makes a command from."""
    described: Any = function
    described.__signature__ = inspect.Signature(parameters)
    described.__annotations__ = {one.name: one.annotation for one in parameters}
    return function


def taken_from(listed: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Makes a function of one ``listed``, a dataclass of fields as `option` makes them, the command
    that takes these options."""
    hints = typing.get_type_hints(listed)
    parameters = [
        parameter(field.name, field.default, hints[field.name], field.metadata["option"])
        for field in dataclasses.fields(listed)
    ]

    def of(function: Callable[[Any], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**options: Any) -> None:
            function(listed(**options))

        return with_parameters(command, parameters)

    return of
