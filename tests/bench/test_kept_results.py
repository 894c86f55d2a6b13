"""The result files of `drrlhf bench` that are kept: all in the form that is written today."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from drrlhf.bench import plots, results, table
from drrlhf.bench.registry import SUITES

KEPT = Path(__file__).parents[2] / "benchmarks" / "results"
RESULTS = [path for suite in SUITES for path in sorted(KEPT.glob(f"{suite}_*.json"))]


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_every_kept_result_has_the_form_of_today_and_can_be_shown(path, tmp_path):
    found = results.read(path)
    assert path.stem.startswith(f"{found['suite']}_{results.slug(found['device'])}")
    assert path.stem.endswith(f"_{found['date']}") and found["commit"] and found["versions"]
    shown = Console(file=io.StringIO(), width=200)
    shown.print(table._table(found["records"]))
    lines = shown.file.getvalue().splitlines()
    assert len(lines) == 1 + len(found["records"])
    assert {line.split()[0] for line in lines[1:]} == {
        record["contender"].split()[0] for record in found["records"]
    }
    assert all(record.keys() >= {"axis", "baseline", "ratio"} for record in found["records"])
    plots.plot(found, tmp_path, path.stem)
    table.readme_tables(path.parent)


def test_kept_results_are_found():
    assert {path.name.split("_")[0] for path in RESULTS} == {"cpu", "gpu"}
