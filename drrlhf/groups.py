"""Groups as data name them, and the numbers 0 to G - 1 that losses and states know them by.

Data name groups by integers from 0 up, which are their numbers already, by codes such as 20240115,
or by text. The last two are numbered in the order of their sorted values.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Integral
from typing import Any

from drrlhf.ambiguity import Group, parse_ambiguity

SHOWN = 8  # names in a message


@dataclass(frozen=True)
class Groups:
    """G groups: ``names[g]`` is what the data call group g; without names, its number, which a
    column of text has as text.

    ``encoded`` says that integers in the data are numbers of groups, although these have names
    (as in a column of `datasets.ClassLabel`); else an integer is a name like any other.
    """

    count: int
    names: tuple[str, ...] | None = None
    encoded: bool = False

    def number(self, value: Any) -> int:
        """The number of the group that the data call ``value``.

        Raises:
            ValueError: there is none; the message says which there are.
        """
        text = isinstance(value, str)
        coded = self.names is None or (self.encoded and not text)
        found = self._numbers.get(value) if text else integer(value)
        if found is not None and not coded and not text:
            found = self._numbers.get(str(found))
        if found is None or found >= self.count:
            expected = f"an integer in [0, {self.count})" if coded else f"one of the groups {self}"
            raise ValueError(f"expected {expected}")
        return found

    def label(self, number: int) -> str:
        """What the data call group ``number``."""
        if self.names is None or not 0 <= number < self.count:
            return str(number)
        return self.names[number]

    def described(self) -> str:
        """All names in order, as JSON; "0 to 3" where the numbers are the names."""
        return f"0 to {self.count - 1}" if self.names is None else json.dumps(self.names)

    def __str__(self) -> str:
        return self.described() if self.names is None else short(self.names)

    @cached_property
    def _numbers(self) -> dict[str, int]:
        names = map(str, range(self.count)) if self.names is None else self.names
        return {name: number for number, name in enumerate(names)}


def named(names: Sequence[str], *, encoded: bool = False) -> Groups:
    """Groups of these names in this order; "0", "1", ... are no names but the numbers."""
    if list(names) == [str(number) for number in range(len(names))]:
        return Groups(len(names))
    return Groups(len(names), tuple(names), encoded)


def of_values(values: Iterable[Any]) -> Groups:
    """The groups of a column: distinct integers from 0 up in their order, or sorted text.

    Raises:
        ValueError: a value is neither, or some are text and others are not.
    """
    distinct = list(dict.fromkeys(values))
    for value in distinct:
        if isinstance(value, str) is not isinstance(distinct[0], str) or not is_group(value):
            text = "text, as in the first row"
            wanted = text if isinstance(distinct[0], str) else "an integer from 0 up, or only text"
            raise ValueError(f"holds {value!r}: expected {wanted}")
    if distinct and isinstance(distinct[0], str):
        return named(sorted(distinct))
    return named([str(number) for number in sorted({integer(value) or 0 for value in distinct})])


def is_group(value: Any) -> bool:
    """Whether a group may be called that: text that is not blank, or an integer from 0 up."""
    return bool(value.strip()) if isinstance(value, str) else is_integer(value)


def is_integer(value: Any) -> bool:
    """Whether ``value`` is an integer from 0 up; 3.0 is one, True is none."""
    return integer(value) is not None


def integer(value: Any) -> int | None:
    """The integer from 0 up that a number is, None for anything else."""
    whole = isinstance(value, Integral) or (isinstance(value, float) and value.is_integer())
    return int(value) if whole and value >= 0 and not isinstance(value, bool) else None


def short(names: Sequence[str]) -> str:
    """The names in a message, the first of many."""
    more = f", and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def from_data(ambiguity: Any) -> bool:
    """Whether a string names a group set without its number of groups: ``group``, or
    ``group:step_size=0.1``."""
    if not isinstance(ambiguity, str):
        return False
    name, _, rest = ambiguity.strip().lower().partition(":")
    keys = [part.partition("=")[:2] for part in rest.split(",")] if rest else []
    bare = all(equals and key.strip() != "num_groups" for key, equals in keys)
    return name.strip() == Group.name and bare


def with_count(ambiguity: str, count: int) -> Group:
    """The set that a string as in `from_data` names, of ``count`` groups.

    Raises:
        ValueError: as `drrlhf.parse_ambiguity`.
    """
    rest = ambiguity.partition(":")[2]
    found = parse_ambiguity(f"group:{count}" + (f",{rest}" if rest.strip() else ""))
    assert isinstance(found, Group)
    return found
