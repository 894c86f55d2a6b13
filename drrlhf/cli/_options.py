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

PromptColumn = Annotated[
    str | None,
    typer.Option(
        help="Column by which pairs belong together.",
        show_default="prompt_id, prompt, question_id or id; none: every pair by itself",
    ),
]
MaxNan = Annotated[
    float, typer.Option(help="Share of scores that may be NaN, infinite or missing.")
]
Seed = Annotated[int, typer.Option(min=0, help="Of the resampling.")]


def with_parameters(function: Function, parameters: Sequence[inspect.Parameter]) -> Function:
    """``function``, which takes any options, with the signature that typer makes a command from."""
    described: Any = function
    described.__signature__ = inspect.Signature(parameters)
    described.__annotations__ = {one.name: one.annotation for one in parameters}
    return function


def taken_from(listed: type) -> Callable[[Callable[[Any], None]], Callable[..., None]]:
    """Makes a function of one ``listed``, a dataclass whose fields are annotated for typer, the
    command that takes these options."""
    hints = typing.get_type_hints(listed, include_extras=True)
    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=hints[field.name],
        )
        for field in dataclasses.fields(listed)
    ]

    def of(function: Callable[[Any], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def command(**options: Any) -> None:
            function(listed(**options))

        return with_parameters(command, parameters)

    return of
