"""What the report page shows of a model, ready for its template: rows, examples and words."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from markupsafe import Markup

from drrlhf.stress.differences import marked
from drrlhf.transformations import PROMPT

SIDES = ("chosen", "rejected", "both", PROMPT)
_CHANGED = {
    "chosen": "when the chosen answer is changed",
    "rejected": "when the rejected answer is changed",
    "both": "when both answers are changed",
    PROMPT: "when the prompt is changed",
    "preferred": "an answer beside its changed form",
}
_PARTS = {PROMPT: "Prompt", "chosen": "Chosen answer", "rejected": "Rejected answer"}
# Where an attacker has a hand: in the rejected answer first, in the chosen one last.
_ATTACKED = ("rejected", PROMPT, "both", "chosen")
TEXTS = 3_000_000  # bytes of examples in the table of changes, over all models
_COLD, _MIDDLE, _WARM = (0, 114, 178), (255, 255, 255), (230, 159, 0)


def known(number: float | None) -> bool:
    """Whether there is a number: NaN, null in JSON, says that there is none."""
    return number is not None and number == number


def percent(share: float | None) -> str:
    """A share in percent, or a dash."""
    return f"{share:.1%}" if share is not None and known(share) else "–"


def band(found: Mapping[str, float] | None) -> Markup:
    """A share in percent with its band in brackets, or a dash."""
    return _band(found, percent, lambda share: f"{100 * share:.1f}")


def number_band(found: Mapping[str, float] | None, digits: int = 4) -> Markup:
    """A number with its band in brackets, or a dash."""
    shown = f"{{:.{digits}f}}".format
    return _band(found, shown, shown)


def _band(
    found: Mapping[str, float] | None, shown: Callable[[float], str], end: Callable[[float], str]
) -> Markup:
    if found is None or not known(found["value"]):
        return Markup("–")
    ends = end(found["low"]), end(found["high"])
    return Markup('{} <span class="dim">[{}, {}]</span>').format(shown(found["value"]), *ends)


def sort_key(number: float | None) -> str:
    """The number that a table is sorted by; nothing where there is none, which comes last."""
    return f"{number:.8g}" if number is not None and known(number) else ""


def heat(share: float | None) -> str:
    """A colour for a share, from orange over white at one half to blue, with text to read on it."""
    if share is None or not known(share):
        return ""
    far = min(abs(share - 0.5) * 2, 1.0)
    end = _COLD if share > 0.5 else _WARM
    mixed = [round(a + (b - a) * far) for a, b in zip(_MIDDLE, end, strict=True)]
    linear = [(c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4) for c in mixed]
    light = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    text = "#000000" if light > 0.179 else "#ffffff"  # whichever has the higher contrast
    return f"background:rgb({','.join(map(str, mixed))});color:{text}"


def example(one: Mapping[str, Any], title: str = "") -> dict[str, Any]:
    """An example as its title, its texts as (label, text), and what became of its numbers."""
    if "answer" in one:
        old, new = marked(one["answer"], one["changed"])
        texts = [("Prompt", one["prompt"]), ("Answer", old), ("The same, changed", new)]
        numbers = (
            f"Reward {one['reward']:+.2f} as it is, {one['reward_after']:+.2f} changed: "
            f"{one['reward_after'] - one['reward']:+.2f}."
        )
        same = old == new
    else:
        texts, same = [], True
        for part, label in _PARTS.items():
            if part not in one.get("after", ()):
                texts.append((label, one[part]))
                continue
            old, new = marked(one[part], one["after"][part])
            texts += [(label, old), (f"{label}, changed", new)]
            same = same and old == new
        numbers, same = _margins(one), same and "after" in one
    if same:
        numbers += " What differs lies beyond the part of the texts that is shown."
    return {"title": title, "texts": [one for one in texts if one[1]], "numbers": numbers}


def answer_example(one: Mapping[str, Any], title: str = "") -> dict[str, Any]:
    """As `example`, of an answer of a policy's own, and of that to the changed prompt."""
    numbers = f"Reward {one['reward']:+.3f}; mean of the prompt's answers {one['mean']:+.3f}."
    if "prompt_after" not in one:
        texts = [("Prompt", one["prompt"]), ("Answer", one["answer"])]
    else:
        old, new = marked(one["prompt"], one["prompt_after"])
        texts = [
            ("Prompt", old),
            ("Prompt, changed", new),
            ("Answer", one["answer"]),
            ("Answer to the changed prompt", one["answer_after"]),
        ]
        numbers = (
            f"Reward {one['reward']:+.3f} before, {one['reward_after']:+.3f} after; mean of the "
            f"prompt's answers {one['mean']:+.3f} before, {one['mean_after']:+.3f} after."
        )
    return {"title": title, "texts": texts, "numbers": numbers}


def _margins(one: Mapping[str, Any]) -> str:
    plain = f"Margin (reward of chosen minus rejected) {one['margin']:+.2f}"
    if "margin_after" not in one:
        return f"{plain}."
    turned = one["margin"] > 0 >= one["margin_after"]
    return f"{plain} before, {one['margin_after']:+.2f} after" + (
        ": the model ranked the pair right, and no more." if turned else "."
    )


def named(changes: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """What each change is, by its name."""
    return {one["change"]: one["what"] for one in changes}


class Budget:
    """Bytes of text that are left to spend, so that the page stays small with any examples."""

    def __init__(self, most: float) -> None:
        self.left = most

    def afforded(self, found: Iterable[tuple[Mapping[str, Any], str]]) -> Iterator[dict[str, Any]]:
        """Of examples and their titles those that can still be shown, which spends their bytes."""
        for one, title in found:
            if self.left > 0:
                shown = example(one, title)
                self.left -= sum(
                    len(f"{label}{text}".encode()) + 100 for label, text in shown["texts"]
                )
                yield shown


def change_rows(model: Mapping[str, Any], models: int = 1) -> list[dict[str, Any]]:
    """A row for each change, gravest first: what it is, and what it does on each side."""
    rows: dict[str, dict[str, Any]] = {}
    for one in model["changes"]:
        row = rows.setdefault(
            one["change"],
            {key: one[key] for key in ("change", "what", "kind", "keeps")} | {"uses": {}},
        )
        row["uses"][one["sides"]] = one
    budget = Budget(TEXTS / models)
    for row in rows.values():
        pairs = [one["pairs"] for one in row["uses"].values()]
        row["pairs"] = max(pairs)
        row["fewest"] = min(pairs)
        attacked = next(side for side in _ATTACKED if side in row["uses"])
        row["success"] = row["uses"][attacked]["success"]
        found = [
            (one, _CHANGED[side])
            for side in (*row["uses"], "preferred")
            for one in model["examples"].get(f"{row['change']}/{side}", ())
        ]
        row["examples"] = list(budget.afforded(found))
        row["left_out"] = len(found) - len(row["examples"])
    return list(rows.values())


def worst_by(model: Mapping[str, Any]) -> dict[str, list[tuple[str, float]]]:
    """Which change is the worst one, as (what it is, share of pairs), for either answer."""
    words = named(model["changes"])
    return {
        side: [(words.get(name, name), share) for name, share in shares.items()]
        for side, shares in model["worst_change"]["by"].items()
    }


def most_lost(rows: Iterable[Mapping[str, Any]]) -> float:
    """The most accuracy that any change costs, which has the longest bar."""
    lost = [use["lost"]["value"] for row in rows for use in row["uses"].values()]
    return max([one for one in lost if known(one)], default=0.0)


def gates(models: Mapping[str, Any]) -> dict[str, Any]:
    """How many gates of all models are met, and the word and class of the verdict."""
    judged = [one["met"] for model in models.values() for one in model["requirements"]]
    met = sum(judged)
    if not judged:
        text, name = "No gate was set", "none"
    elif met == len(judged):
        text, name = "All gates are met" if met > 1 else "The gate is met", "met"
    else:
        text, name = f"{len(judged) - met} of {len(judged)} gates missed", "missed"
    return {"text": text, "class": name}
