"""Stress before deployment: worst cases of a reward model or policy from its scored pairs, and of a
policy's reward from its own answers."""

from drrlhf.stress.benchmarks import read_pairs
from drrlhf.stress.best_of import (
    best_of_curve,
    best_of_curves,
    best_of_right,
    best_of_right_of_pairs,
    combined,
    kendall_tau,
)
from drrlhf.stress.candidates import Candidates, load_candidates
from drrlhf.stress.generate import Generated, generate_scores
from drrlhf.stress.generated import stress_generated
from drrlhf.stress.junit import write_junit
from drrlhf.stress.models import Policy, RewardModel, load_judge
from drrlhf.stress.radius import suggest_radius
from drrlhf.stress.report import write_report
from drrlhf.stress.require import Requirement, parse_requirement
from drrlhf.stress.run import stress_test
from drrlhf.stress.scores import Attribute, Scores, from_table, load_scores
from drrlhf.stress.scoring import score_candidates, score_pairs, score_table

__all__ = [
    "Attribute",
    "Candidates",
    "Generated",
    "Policy",
    "Requirement",
    "RewardModel",
    "Scores",
    "best_of_curve",
    "best_of_curves",
    "best_of_right",
    "best_of_right_of_pairs",
    "combined",
    "from_table",
    "generate_scores",
    "kendall_tau",
    "load_candidates",
    "load_judge",
    "load_scores",
    "parse_requirement",
    "read_pairs",
    "score_candidates",
    "score_pairs",
    "score_table",
    "stress_generated",
    "stress_test",
    "suggest_radius",
    "write_junit",
    "write_report",
]
