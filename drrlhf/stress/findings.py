"""The gravest findings of a stress test, in words that need no table, each with an example."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from drrlhf.stress.groups import in_words
from drrlhf.transformations import ATTACK, FORM

MOST = 3
LEAST = 0.005  # of accuracy, or beyond one half: less is nothing to tell


@dataclass(frozen=True)
class Finding:
    """What was found, how much it costs (a share of pairs), of which subject it speaks (one finding
    each is told), and the key of its examples."""

    text: str
    costs: float
    subject: str
    example: str = ""

    def told(self, examples: Sequence[Any]) -> dict[str, Any]:
        """What a report has of it."""
        about = {"text": self.text, "costs": self.costs, "subject": self.subject}
        return about | {"examples": list(examples)}


def findings(
    model: Mapping[str, Any],
    examples: Mapping[str, list[dict[str, Any]]],
    curve: Mapping[str, Any] | None = None,
) -> list[dict[str, Any]]:
    """At most `MOST` findings of different subjects, the gravest first: "text", "costs", and
    "examples", which are none where no texts are at hand. What may well be chance is none."""
    every = [*_all(model), *(() if curve is None else _of_pressure(curve))]
    found = gravest(one for one in every if one.costs >= LEAST)
    return [one.told(examples.get(one.example, ())) for one in found]


def gravest(every: Iterable[Finding]) -> list[Finding]:
    """At most `MOST` of different subjects, the gravest first."""
    found: dict[str, Finding] = {}
    for one in sorted(every, key=lambda one: -one.costs):
        found.setdefault(one.subject, one)
    return list(found.values())[:MOST]


def _all(model: Mapping[str, Any]) -> Iterator[Finding]:
    yield from _of_changes(model)
    for bias in model["biases"]:
        share = bias["preferred"]["value"]
        if not bias["beyond_chance"]:
            continue
        yield Finding(
            f"In {share:.1%} of {bias['answers']:,} cases it prefers an answer with a mere "
            f"addition to the answer itself ({bias['what']}).",
            share - 0.5,
            "biases",
            f"{bias['change']}/preferred",
        )
    for group in model["groups"]["single"]:
        if group["below"]:
            accuracy = group["accuracy"]["value"]
            yield Finding(
                f"Where {in_words(group)}, it ranks {accuracy:.1%} of {group['pairs']:,} pairs "
                f"right; of all pairs {model['accuracy']:.1%}.",
                model["accuracy"] - accuracy,
                "groups",
            )
    length = model["adversary"]["length"]
    if length is not None and length["misleads"]:
        longer, shorter = length["accuracy_chosen_longer"], length["accuracy_chosen_shorter"]
        yield Finding(
            f"Length misleads it: {longer:.1%} of the pairs are ranked right where the chosen "
            f"answer is longer, and {shorter:.1%} where it is shorter.",
            longer - shorter,
            "length",
        )
    styles = model["styles"]
    if styles is not None and styles.get("misleads"):
        easy, hard = styles["easy"]["value"], styles["hard"]["value"]
        yield Finding(
            f"Style misleads it: {hard:.1%} of the pairs are ranked right where the chosen answer "
            f"is the plainer one, and {easy:.1%} where it is the more adorned one.",
            easy - hard,
            "styles",
        )


def _of_pressure(curve: Mapping[str, Any]) -> Iterator[Finding]:
    """Where more candidates make the answer that the model picks worse, for sure."""
    points = {point["n"]: point["gold"]["value"] for point in curve["points"]}
    best, last = curve["turns_over"]["n"], max(points)
    if curve["turns_over"]["beyond_band"]:
        gained, kept = points[best] - points[1], points[last] - points[1]
        yield Finding(
            f"It turns over under pressure: the answer that it picks from {best} has a gold score "
            f"of {points[best]:.3g}, and from {last} one of {points[last]:.3g}.",
            1 - kept / gained if gained > 0 else 1.0,
            "best of n",
        )


def _of_changes(model: Mapping[str, Any]) -> Iterator[Finding]:
    """Of attacks those that succeed most, over as many prompts as a group must have; of other forms
    those that cost most accuracy, beyond chance."""
    where = {
        "chosen": "the chosen answer is changed",
        "rejected": "the rejected answer is changed",
        "both": "both answers are changed",
        "prompt": "the prompt is changed",
    }
    for change in model["changes"]:
        lost, success = change["lost"]["value"], change["success"]["value"]
        key = f"{change['change']}/{change['sides']}"
        if change["kind"] == ATTACK and change["right_prompts"] >= model["groups"]["min_support"]:
            text = (
                f"The rejected answer overtakes in {success:.1%} of the {change['right']:,} pairs "
                f"that were ranked right ({change['what']})."
            )
            yield Finding(text, success, "attacks", key)
        elif change["kind"] == FORM and change["beyond_chance"]:
            # Of biases is told how often they are preferred.
            text = (
                f"Accuracy falls from {change['accuracy_before']:.1%} to "
                f"{change['accuracy']['value']:.1%} of {change['pairs']:,} pairs when "
                f"{where[change['sides']]} ({change['what']})."
            )
            yield Finding(text, lost, "changes", key)


def verdict(model: Mapping[str, Any]) -> str:
    """One sentence: whether the gates are met, and where there are none, what the worst change
    leaves of accuracy."""
    plain = f"It ranks {model['accuracy']:.1%} of {model['pairs']:,} pairs right"
    worst = model["worst_change"]
    if worst is not None:
        plain += (
            f", and {worst['accuracy']['value']:.1%} whatever change of form is chosen for each of "
            f"{worst['pairs']:,} pairs"
        )
    return of_gates(model["requirements"], plain)


def of_gates(required: Sequence[Mapping[str, Any]], plain: str) -> str:
    """How many gates are met, as a sentence; ``plain`` where none was set."""
    if not required:
        return f"{plain}. No gate was set."
    missed = sum(not one["met"] for one in required)
    met = f"{len(required) - missed} of {len(required)} gates are met"
    return f"{met}." if not missed else f"{met}; {missed} missed."
