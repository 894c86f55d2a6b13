"""Changes of a preference pair's text, by name: one table for training (``views``) and the stress
test.

A pair that a model ranks by its meaning keeps its order under each. Forms say the same in another
way, biases add words without substance, and what "keeps" says is where that ends; attacks make
a rejected answer worse. `lookup` reads names, with rates such as ``typos:0.2``.
"""

from drrlhf.transformations.rows import BY_COLUMN, SIDES, from_column, transformed
from drrlhf.transformations.table import (
    ANSWER,
    ATTACK,
    BIAS,
    FORM,
    KINDS,
    PROMPT,
    TRANSFORMATIONS,
    Transformation,
    lookup,
)

__all__ = [
    "ANSWER",
    "ATTACK",
    "BIAS",
    "BY_COLUMN",
    "FORM",
    "KINDS",
    "PROMPT",
    "SIDES",
    "TRANSFORMATIONS",
    "Transformation",
    "from_column",
    "lookup",
    "transformed",
]
