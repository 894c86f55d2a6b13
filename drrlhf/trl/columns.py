"""The two columns that TRL does not know: ``group`` (int64 ids) and ``weight`` (float64).

They ride in the batch beside TRL's own columns and are taken out again before the model sees it.
``weight`` is the nominal weight of a pair (0 masks it), ``group`` its group.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch

GROUP, WEIGHT = "group", "weight"
COLUMNS = (GROUP, WEIGHT)


@dataclass
class PairColumns:
    """A data collator around another: adds ``group`` and ``weight`` when the examples have them.

    ``num_groups`` is the number of groups of the ambiguity set, None when it has none; only then
    are group ids checked, and a ``group`` column that does not hold integers is left out.

    Raises:
        ValueError: (when called) a group id outside [0, num_groups), or a weight that is not a
            finite number >= 0.
    """

    collator: Callable[[list[dict[str, Any]]], Any]
    num_groups: int | None = None

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        extra = {}
        for name, dtype in ((GROUP, torch.int64), (WEIGHT, torch.float64)):
            if name in examples[0]:
                values = [_plain(example.get(name)) for example in examples]
                check_values(name, values, self.num_groups)
                if name == WEIGHT or all(_is_integer(value) for value in values):
                    extra[name] = torch.tensor(values, dtype=dtype)
        batch = self.collator(examples)
        for name, tensor in extra.items():
            batch[name] = tensor
        return batch


def take(inputs: Any) -> tuple[dict[str, Any], torch.Tensor | None, torch.Tensor | None]:
    """Split a batch into (a copy without our columns, weight (n,), group (n,))."""
    rest = dict(inputs)
    group, weight = rest.pop(GROUP, None), rest.pop(WEIGHT, None)
    return rest, weight, group


def check_dataset(dataset: Any, argument: str, num_groups: int | None) -> set[str]:
    """Fail before any training on columns that cannot work; return those of ours that are there.

    Every value of a map-style dataset is checked here, those of a streamed one as they come.
    ``dataset`` may be a mapping of datasets, as ``eval_dataset`` may.

    Raises:
        ValueError: ``num_groups`` is given and there is no ``group`` column; or as PairColumns.
    """
    if dataset is None:
        return set()
    if hasattr(dataset, "items"):
        return set().union(
            *(check_dataset(d, f"{argument}[{key!r}]", num_groups) for key, d in dataset.items())
        )
    present = set(COLUMNS) & set(next(iter(dataset), {}))
    if num_groups is not None and GROUP not in present:
        raise ValueError(
            f"{argument} has no column 'group', which ambiguity='group:{num_groups}' needs: add "
            f"one with the integer group of every pair, 0 to {num_groups - 1}."
        )
    for name in present:
        if hasattr(dataset, "unique"):
            check_values(name, dataset.unique(name), num_groups, f" of {argument}")
    return present


def check_values(name: str, values: Iterable[Any], num_groups: int | None, where: str = "") -> None:
    """ValueError naming the first value that a column of ours may not hold."""
    for value in values:
        if name == WEIGHT:
            if not isinstance(value, Real) or not math.isfinite(value) or value < 0:
                raise ValueError(
                    f"column 'weight'{where} holds {value!r}: expected a finite number >= 0 (0 "
                    "masks the pair). Correct the column, or rename it if it means something else."
                )
        elif num_groups is not None and not (_is_integer(value) and 0 <= value < num_groups):
            raise ValueError(
                f"column 'group'{where} holds {value!r}: expected an integer in [0, {num_groups})."
                " Correct the column, or the number of groups of the ambiguity set."
            )


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
