"""Changes of a preference pair's text that leave its meaning alone, by name.

One table for training (``views``) and the stress test: a pair that a model ranks by its meaning
keeps its order under each of them. What "keeps" says is where that ends.
"""

from drrlhf.transformations.rows import BY_COLUMN, SIDES, from_column, transformed
from drrlhf.transformations.table import ANSWER, PROMPT, TRANSFORMATIONS, Transformation

__all__ = [
    "ANSWER",
    "BY_COLUMN",
    "PROMPT",
    "SIDES",
    "TRANSFORMATIONS",
    "Transformation",
    "from_column",
    "transformed",
]
