"""What a stress test of a policy's own answers found, in words, each with a real example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from drrlhf.stress.examples import shortened
from drrlhf.stress.findings import Finding, gravest, of_gates
from drrlhf.stress.generate import AS_IS, Generated
from drrlhf.stress.groups import in_words

if TYPE_CHECKING:
    from drrlhf.stress.generated import Prompts

OF_EACH = 2  # prompts of a change
WORST = 5  # prompts with the least reward


def examples(generated: Generated, prompts: Prompts) -> dict[str, list[dict[str, Any]]]:
    """{"": the prompts of least reward as they are, CHANGE: those that lose most under it}. Of the
    answers to a prompt the one is shown whose reward is nearest to their mean."""
    rows = prompts.rows
    least = np.argsort(prompts.values, kind="stable")[:WORST]
    found = {AS_IS: [_example(generated, int(rows[i])) for i in least]}
    for change, new in prompts.changed.items():
        lost = np.where(np.isfinite(new), prompts.values - new, -np.inf)
        most = [i for i in np.argsort(-lost, kind="stable")[:OF_EACH] if lost[i] > 0]
        found[change] = [_example(generated, int(rows[i]), change) for i in most]
    return {name: some for name, some in found.items() if some}


def _example(generated: Generated, row: int, change: str = AS_IS) -> dict[str, Any]:
    """The texts of a prompt and of a usual answer, and, of a changed prompt, what they became."""
    answer, reward, mean = _usual(generated, row, AS_IS)
    told = {"prompt": shortened(generated.prompts[row])}
    found: dict[str, Any] = told | {"answer": answer, "reward": reward, "mean": mean}
    if change != AS_IS:
        answer, reward, mean = _usual(generated, row, change)
        found["prompt_after"] = shortened(generated.forms[change][row])
        found |= {"answer_after": answer, "reward_after": reward, "mean_after": mean}
    return found


def _usual(generated: Generated, row: int, change: str) -> tuple[str, float, float]:
    """The answer whose reward is nearest to the mean, its reward, and the mean."""
    rewards = generated.rewards[change][row]
    mean = float(np.nanmean(np.where(np.isfinite(rewards), rewards, np.nan)))
    far = np.where(np.isfinite(rewards), np.abs(rewards - mean), np.inf)
    place = int(far.argmin())
    return shortened(generated.completions[change][row][place]), float(rewards[place]), mean


def findings(
    model: Mapping[str, Any], generated: Generated, prompts: Prompts
) -> list[dict[str, Any]]:
    """At most `MOST` findings of different subjects, the gravest first: "text", "costs" (in
    reward), "subject" and "examples". What may well be chance comes last."""
    every = [*_of_changes(model), *_of_groups(model), *_of_prompts(model), *_of_cuts(model)]
    found = []
    for one in gravest(every):
        shown = model["examples"].get(one.example, ())
        if one.subject == "groups":
            shown = _of_group(generated, prompts, model["groups"]["single"][0]["group"])
        elif one.subject == "cut":
            shown = _cut_one(generated, prompts.rows)
        found.append(one.told(shown))
    return found


def _of_changes(model: Mapping[str, Any]) -> Iterator[Finding]:
    for change in model["changes"]:
        lost = change["lost"]
        figures = (
            f"from {change['reward_before']:.3f} to {change['reward']['value']:.3f} over "
            f"{change['prompts']:,} prompts"
        )
        if change["beyond_chance"]:
            costs = lost["value"]
            text = f"The mean reward falls by {costs:.3f}, {figures}, when the prompt is changed"
        elif lost["value"] > 0:
            costs = 0.0
            text = (
                f"No change of the prompt that was tried costs reward beyond chance; the largest "
                f"loss is {lost['value']:.3f} [{lost['low']:.3f}, {lost['high']:.3f}], {figures}"
            )
        else:
            continue
        yield Finding(f"{text} ({change['what']}).", costs, "changes", change["change"])


def _of_groups(model: Mapping[str, Any]) -> Iterator[Finding]:
    for group in model["groups"]["single"][:1]:
        if group["below"]:
            reward, overall = group["reward"]["value"], model["reward"]["value"]
            yield Finding(
                f"Where {in_words(group)}, the mean reward of {group['prompts']:,} prompts is "
                f"{reward:.3f}; of all prompts it is {overall:.3f}.",
                overall - reward,
                "groups",
            )


def _of_prompts(model: Mapping[str, Any]) -> Iterator[Finding]:
    overall, worst = model["reward"]["value"], model["worst"]["tv:0.1"]["value"]
    if worst < overall:
        yield Finding(
            f"If a tenth of the weight moves from the best prompts to the worst one, the mean "
            f"reward falls from {overall:.3f} to {worst:.3f}.",
            overall - worst,
            "prompts",
            AS_IS,
        )


def _of_cuts(model: Mapping[str, Any]) -> Iterator[Finding]:
    cut, whole = model["reward_of_cut"], model["reward_of_whole"]
    if model["cut"] > 0 and cut < whole:
        yield Finding(
            f"{model['cut']:.1%} of the answers were cut at the most tokens; their mean reward is "
            f"{cut:.3f}, and {whole:.3f} of those that came to an end.",
            model["cut"] * (whole - cut),
            "cut",
        )


def _of_group(
    generated: Generated, prompts: Prompts, group: Mapping[str, str]
) -> list[dict[str, Any]]:
    """The prompt of least reward in a group."""
    inside = np.ones(len(prompts.rows), dtype=bool)
    for name, value in group.items():
        attribute = generated.attributes[name]
        inside &= attribute.codes[prompts.rows] == attribute.names.index(value)
    least = np.where(inside, prompts.values, np.inf).argmin()
    return [_example(generated, int(prompts.rows[least]))]


def _cut_one(generated: Generated, rows: NDArray[np.int64]) -> list[dict[str, Any]]:
    """The first answer that was cut and has a reward."""
    plain = generated.rewards[AS_IS][rows]
    row, place = np.argwhere(generated.cut[AS_IS][rows] & np.isfinite(plain))[0]
    number = int(rows[row])
    return [
        _example(generated, number)
        | {
            "answer": shortened(generated.completions[AS_IS][number][place]),
            "reward": float(plain[row, place]),
        }
    ]


def verdict(model: Mapping[str, Any]) -> str:
    """One sentence: whether the gates are met, and without any, how much reward is left."""
    plain = (
        f"Its answers to {model['prompts']:,} prompts have a mean reward of "
        f"{model['reward']['value']:.3f}, and of {model['worst']['tv:0.1']['value']:.3f} at tv:0.1"
    )
    worst = model["worst_change"]
    if worst is not None:
        reward = worst["reward"]["value"]
        plain += f"; under the worst change of each prompt it is {reward:.3f}"
    return of_gates(model["requirements"], plain)
