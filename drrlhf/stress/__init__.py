"""Stress before deployment: worst cases of a reward model or policy from its scored pairs."""

from drrlhf.stress.junit import write_junit
from drrlhf.stress.models import Policy, RewardModel, load_judge
from drrlhf.stress.radius import suggest_radius
from drrlhf.stress.report import write_report
from drrlhf.stress.require import Requirement, parse_requirement
from drrlhf.stress.run import stress_test
from drrlhf.stress.scores import Attribute, Scores, from_table, load_scores
from drrlhf.stress.scoring import score_pairs, score_table

__all__ = [
    "Attribute",
    "Policy",
    "Requirement",
    "RewardModel",
    "Scores",
    "from_table",
    "load_judge",
    "load_scores",
    "parse_requirement",
    "score_pairs",
    "score_table",
    "stress_test",
    "suggest_radius",
    "write_junit",
    "write_report",
]
