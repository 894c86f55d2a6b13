"""The columns that TRL does not know: ``group``, ``weight`` and ``p_chosen`` (float64).

They ride in the batch beside TRL's own columns and are taken out again before the model sees it.
``weight`` is the nominal weight of a pair (0 masks it), ``group`` its group: in the batch the int64
number of it, in the data that, a code, or text (`drrlhf.groups`). ``p_chosen``, of pairs alone, is
the probability of the label.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from drrlhf.groups import Groups, is_integer, named, of_values, short

GROUP, WEIGHT, LABEL = "group", "weight", "p_chosen"
COLUMNS = (GROUP, WEIGHT)
PAIR_COLUMNS = (*COLUMNS, LABEL)
NO_GROUP = -1
EXACT = 2**53  # a double holds every integer below
# What the numbers of a column may be, and the words for it.
_DOMAINS: dict[str, tuple[Callable[[float], bool], str]] = {
    WEIGHT: (lambda x: x >= 0, "a finite number >= 0 (0 masks the pair)"),
    LABEL: (lambda x: 0 <= x <= 1, "a probability in [0, 1]"),
}


@dataclass
class PairColumns:
    """A data collator around another: adds our columns when the examples have them.

    ``groups`` are those of the ambiguity set, see `group_numbers`. Without ``coded`` a ``group``
    column is left out: its data hold no integers, and the set has no groups. What a batch has must
    not depend on its rows, since all processes tell each other of it. ``unread`` are entries that
    the collator makes of a dataset's columns and that the trainer was not asked to read.

    Raises:
        ValueError: (when called) a group that is none of ``groups``, a weight that is not a finite
            number >= 0, or a ``p_chosen`` that is no probability.
    """

    collator: Callable[[list[dict[str, Any]]], Any]
    groups: Groups | None = None
    coded: bool = True
    unread: tuple[str, ...] = ()

    def __call__(self, examples: list[dict[str, Any]]) -> Any:
        extra = {}
        for name in PAIR_COLUMNS:
            if name not in examples[0] or (name == GROUP and not self.coded):
                continue
            values = [_plain(example.get(name)) for example in examples]
            if name == GROUP:
                numbers = group_numbers(values, self.groups)
                extra[name] = torch.tensor(numbers, dtype=torch.int64)
            else:
                check_values(name, values, None)
                extra[name] = torch.tensor(values, dtype=torch.float64)
        batch = self.collator(examples)
        for name in set(self.unread) & set(batch):
            del batch[name]
        for name, tensor in extra.items():
            batch[name] = tensor
        return batch


class Taken(NamedTuple):
    """A copy of a batch without our columns, and these, each (n,) or None."""

    inputs: dict[str, Any]
    weight: torch.Tensor | None
    group: torch.Tensor | None
    p_chosen: torch.Tensor | None


def take(inputs: Any) -> Taken:
    """Split a batch."""
    rest = dict(inputs)
    return Taken(rest, *(rest.pop(name, None) for name in (WEIGHT, GROUP, LABEL)))


def check_datasets(
    given: Mapping[str, Any], num_groups: int | None, names: Sequence[str] = PAIR_COLUMNS
) -> tuple[Groups | None, set[str]]:
    """Fail before any training on columns that cannot work.

    ``given`` are a trainer's arguments, of which ``train_dataset`` and ``eval_dataset`` are looked
    at; ``num_groups`` is what the ambiguity set needs: None for no groups, 0 for as many as the
    training data have; ``names`` are the columns that the trainer reads. Every value of a map-style
    dataset is checked here, those of a streamed one as they come.

    Returns:
        The groups that the training data have: of a set that needs them, or by the names of a
        `datasets.ClassLabel`; and those of our columns that the training data have.

    Raises:
        ValueError: groups are needed and a dataset has no column of them, or of another number, or
            the evaluation data have others than the training data; or as PairColumns.
    """
    train, evaluation = given.get("train_dataset"), given.get("eval_dataset")
    present = _present(train, "train_dataset", num_groups, names)
    groups = _groups(train, num_groups) if GROUP in present else None
    for name in present & set(_DOMAINS):
        if train is not None and hasattr(train, "unique"):
            check_values(name, train.unique(name), None, " of train_dataset")
    check_evaluation(evaluation, groups, num_groups, names=names)
    return groups, present


def check_evaluation(
    dataset: Any,
    groups: Groups | None,
    num_groups: int | None,
    argument: str = "eval_dataset",
    names: Sequence[str] = PAIR_COLUMNS,
) -> None:
    """`check_datasets` for evaluation data, which may be a mapping of datasets."""
    if hasattr(dataset, "items"):
        for key, one in dataset.items():
            check_evaluation(one, groups, num_groups, f"{argument}[{key!r}]", names)
        return
    check_names(dataset, groups, argument)
    for name in _present(dataset, argument, num_groups, names):
        if hasattr(dataset, "unique") and (name in _DOMAINS or num_groups is not None):
            check_values(name, dataset.unique(name), groups, f" of {argument}")


def check_names(dataset: Any, groups: Groups | None, argument: str = "eval_dataset") -> None:
    """ValueError where a dataset numbers the groups by other names than ``groups`` have."""
    names = _class_names(dataset)
    if groups is not None and names is not None and named(names) != named(groups.names or names):
        raise ValueError(
            f"column 'group' of {argument} numbers the groups {short(names)}, that of "
            f"train_dataset {groups}: cast it with cast_column('group', "
            "train_dataset.features['group'])."
        )


def _present(dataset: Any, argument: str, num_groups: int | None, names: Sequence[str]) -> set[str]:
    """Those of some columns of ours that a dataset has."""
    if dataset is None:
        return set()
    present = set(names) & set(next(iter(dataset), {}))
    if num_groups is not None and GROUP not in present:
        asked, ids = "group", ""
        if num_groups:
            asked, ids = f"group:{num_groups}", f", 0 to {num_groups - 1}, or its name"
        raise ValueError(
            f"{argument} has no column 'group', which ambiguity={asked!r} needs: add one with the "
            f"group of every pair{ids}."
        )
    return present


def _groups(dataset: Any, num_groups: int | None) -> Groups | None:
    """The groups of the training data, whose column ``group`` is there."""
    names = _class_names(dataset)
    if names is not None:
        found = named(names, encoded=True)
    elif num_groups is None:
        return None
    elif not hasattr(dataset, "unique"):
        if not num_groups:
            raise ValueError(
                "train_dataset is streamed, so the number of its groups is not known beforehand: "
                "write it, as in ambiguity='group:4', with integers from 0 in the column 'group', "
                "or cast that column to a datasets.ClassLabel."
            )
        return Groups(num_groups)
    else:
        values = dataset.unique(GROUP)
        if all(is_integer(value) and value < num_groups for value in values):
            return Groups(num_groups)
        try:
            found = of_values(values)
        except ValueError as error:
            raise ValueError(f"column 'group' of train_dataset {error}. Correct it.") from None
    if num_groups and num_groups != found.count:
        raise ValueError(
            f"column 'group' of train_dataset has {found.count} groups ({found}), but "
            f"ambiguity='group:{num_groups}' expects integers in [0, {num_groups}), or "
            f"{num_groups} different codes or names. Correct the column, or write "
            "ambiguity='group', which takes their number from the data."
        )
    return found


def _class_names(dataset: Any) -> list[str] | None:
    """The names of a column ``group`` of datasets.ClassLabel."""
    feature = (getattr(dataset, "features", None) or {}).get(GROUP)
    return getattr(feature, "names", None)


def check_values(name: str, values: Iterable[Any], groups: Groups | None, where: str = "") -> None:
    """ValueError naming the first value that a column of ours may not hold."""
    for value in values:
        if name in _DOMAINS:
            inside, wanted = _DOMAINS[name]
            number = float(value) if isinstance(value, Real) else math.nan
            if not math.isfinite(number) or not inside(number):
                raise ValueError(
                    f"column {name!r}{where} holds {value!r}: expected {wanted}. Correct the "
                    "column, or rename it if it means something else."
                )
        elif groups is not None:
            try:
                groups.number(value)
            except ValueError as error:
                raise ValueError(
                    f"column 'group'{where} holds {value!r}: {error}. Correct the column, or the "
                    "groups of the training data."
                ) from None


def group_numbers(values: Sequence[Any], groups: Groups | None) -> list[int]:
    """The number of each value of a column ``group``. Without the groups of a set that is the value
    itself, and `NO_GROUP` for one that is no integer; of ids too large for a double, in which all
    processes tell each other of them, the last 53 bits.

    Raises:
        ValueError: a value is none of ``groups``.
    """
    if groups is None:
        return [
            int(value) % EXACT if _is_integer(value) and value >= 0 else NO_GROUP
            for value in values
        ]
    check_values(GROUP, values, groups)
    return [groups.number(value) for value in values]


def may_be_coded(dataset: Any) -> bool:
    """Whether a column ``group`` may hold integers, as far as the data tell beforehand."""
    feature = (getattr(dataset, "features", None) or {}).get(GROUP)
    return getattr(feature, "dtype", "int64").startswith(("int", "uint"))


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else value


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)
