"""Options that several commands about scored pairs share."""

from __future__ import annotations

from typing import Annotated

import typer

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
