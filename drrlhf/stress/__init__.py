"""Stress before deployment: worst cases of a reward model or policy from its scored pairs."""

from drrlhf.stress.report import write_report
from drrlhf.stress.require import Requirement, parse_requirement
from drrlhf.stress.run import stress_test
from drrlhf.stress.scores import Attribute, Scores, load_scores

__all__ = [
    "Attribute", "Requirement", "Scores", "load_scores", "parse_requirement", "stress_test",
    "write_report",
]  # fmt: skip
