"""``drrlhf stress`` as a user types it: what it prints and leaves, and how it refuses."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner

from drrlhf.cli import app

runner = CliRunner()


def parquet(path, n=400, shift=1.0):
    rng = np.random.default_rng(0)
    domain = rng.choice(["film", "law"], n)
    margin = rng.normal(shift - 0.8 * (domain == "law"), 1.0)
    pq.write_table(pa.table({"margin": margin, "domain": domain}), path)
    return path


def stress(*arguments):
    return runner.invoke(app, ["stress", *map(str, arguments)])


def test_a_floor_that_is_met_and_one_that_is_missed(tmp_path):
    file, out = parquet(tmp_path / "rm.parquet"), tmp_path / "out"
    met = stress("--scores", file, "--output-dir", out, "--require", "tv:0.1 accuracy>=0.5")
    assert met.exit_code == 0, met.output
    assert "accuracy>=0.5: met" in met.output and str(out / "report.html") in met.output
    missed = stress("--scores", file, "--output-dir", out, "--require", "tv:0.1 accuracy>=0.9")
    assert missed.exit_code == 1 and "MISSED" in missed.output
    report = json.loads((out / "report.json").read_text())
    assert not report["passed"] and report["models"].keys() == {"rm"}


def test_models_side_by_side(tmp_path):
    files = [parquet(tmp_path / f"{name}.parquet", shift=s) for name, s in (("a", 1), ("b", 2))]
    done = stress("--scores", files[0], "--scores", files[1], "--output-dir", tmp_path / "out")
    assert done.exit_code == 0, done.output
    html = (tmp_path / "out" / "report.html").read_text()
    assert 0 < html.index("<h3>a</h3>") < html.index("<h3>b</h3>")


def changed(path, n=80):
    """Scores with forms, and of candidates."""
    rng = np.random.default_rng(2)
    columns = {"chosen_reward": rng.normal(1, 1, n), "rejected_reward": rng.normal(0, 1, n)}
    columns["chosen_reward@typos"] = columns["chosen_reward"] - 1
    columns["rejected_reward@typos"] = columns["rejected_reward"]
    pq.write_table(pa.table(columns), path)
    return path


def candidates(path):
    rows = [
        {"scores": [1.0, 2.0, 3.0, 4.0], "gold": [1.0, 2.0, 3.0, -9.0 + i % 2]} for i in range(30)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_gates_on_changes_and_on_best_of_n(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/drrlhf", "stress", "--scores", "my file"])
    given = ["--scores", changed(tmp_path / "rm.parquet"), "--output-dir", tmp_path / "out"]
    given += ["--best-of", candidates(tmp_path / "c.jsonl"), "--junit", tmp_path / "gates.xml"]
    met = stress(*given, "--require", "best-of-2 gold>=best-of-4", "--require", "typos success<=1")
    assert met.exit_code == 0, met.output
    assert "It turns over under pressure" in " ".join(met.output.split())
    missed = stress(*given, "--require", "best-of-4 gold>=best-of-1")
    assert missed.exit_code == 1
    assert (tmp_path / "gates.xml").read_text().count("<failure") == 1
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    points = report["best_of"]["curves"]["rm"]["points"]
    means = [sum(g) / 30 for g in zip(*([1, 2, 3, -9 + i % 2] for i in range(30)))]
    # All four, and the last of four; of two the pick is the better of each pair.
    assert points[0]["gold"]["value"] == pytest.approx(sum(means) / 4)
    assert points[2]["gold"]["value"] == pytest.approx(means[3])
    pairs = [means[max(i, j)] for i in range(4) for j in range(i)]
    assert points[1]["gold"]["value"] == pytest.approx(sum(pairs) / 6)
    assert report["command"] == "drrlhf stress --scores 'my file'"
    assert report["versions"]["torch"] and report["date"]


def test_the_command_on_the_page_is_one_that_runs(tmp_path, monkeypatch):
    """As `python -m drrlhf` has it, the first argument is the file that Python found."""
    monkeypatch.setattr("sys.argv", ["/site/drrlhf/__main__.py", "stress", "--scores", "s"])
    done = stress("--scores", parquet(tmp_path / "s.parquet"), "--output-dir", tmp_path / "out")
    assert done.exit_code == 0, done.output
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<code>python -m drrlhf stress --scores s</code>" in page


def test_prompts_without_scores_are_not_left_out_in_silence(tmp_path):
    """Of 40 prompts two have all scores; of the others the gate would say nothing."""
    file, given = tmp_path / "c.jsonl", changed(tmp_path / "rm.parquet")
    rows = [json.loads(line) for line in candidates(file).read_text().splitlines()[:20]] * 2
    rows[5]["gold"] = [1.0] * 4
    rows = [
        row | {"scores": [1.0, 2.0, None, 4.0]} if i % 20 else row for i, row in enumerate(rows)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = tmp_path / "out"
    gate = "best-of-4 gold>=-9"
    usual = ["--scores", given, "--best-of", file, "--output-dir", out, "--require", gate]
    done = stress(*usual)
    said = " ".join(done.output.split())
    assert done.exit_code == 2 and "got 38 of 40" in said and "raise --max-nan" in said
    assert not out.exists()
    done = stress(*usual, "--max-nan", "0.95")
    said = " ".join(done.output.split())
    assert done.exit_code == 0, done.output
    told = "38 of 40 prompts are left out: a score of theirs is missing, or is no finite number."
    for text in (said, (out / "report.html").read_text()):
        assert f"rm: {told}" in text and "rm: Only 2 prompts:" in text


def test_equal_gold_scores_are_told(tmp_path):
    rows = [{"scores": [1.0, 2.0], "gold": [1.0, float(i % 4 < 3)]} for i in range(40)]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--scores", changed(tmp_path / "rm.parquet"), "--best-of", tmp_path / "c.jsonl"]
    done = stress(*given, "--output-dir", tmp_path / "out")
    assert done.exit_code == 0, done.output
    told = "rm: In 30 of 40 prompts all gold scores are equal"
    assert told in " ".join(done.output.split())
    assert told in (tmp_path / "out" / "report.html").read_text()


def test_the_first_answer_is_told_of_all_prompts_or_not_at_all(tmp_path):
    """Of 40 prompts with two pairs each, one lacks a pair; a share of 0.025."""
    rows = [
        {
            "prompt_id": f"p{i // 2}",
            "margin": 1 - i % 3,
            "chosen_answer": 0,
            "rejected_answer": 1 + i % 2,
        }
        for i in range(80)
        if i != 78
    ]
    (tmp_path / "rm.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = ["--scores", tmp_path / "rm.jsonl", "--output-dir", tmp_path / "out"]
    gate = ["--require", "best-answer accuracy>=0"]
    done = stress(*given)
    assert done.exit_code == 0 and "Which answer comes first is not told" in done.output
    assert "got 1 of 40" in " ".join(done.output.split())
    assert stress(*given, *gate).exit_code == 2
    done = stress(*given, *gate, "--max-nan", "0.03")
    assert done.exit_code == 0, done.output
    told = "First of all answers: 1 of 40 prompts are left out"
    assert told in done.output and told in (tmp_path / "out" / "report.html").read_text()


def test_what_a_gate_names_and_the_report_lacks_leaves_no_report(tmp_path):
    file, out = changed(tmp_path / "rm.parquet"), tmp_path / "out"
    for text in ("typoss accuracy>=0.1", "subset=maths accuracy>=0.1", "best-of-2 gold>=0"):
        done = stress("--scores", file, "--output-dir", out, "--require", text)
        assert done.exit_code == 2 and text.split()[0] in done.output and not out.exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give --scores FILE"),
        (["--best-of", "a", "--best-of", "b"], "--best-of: expected 1 file"),
        (["--changes", "typos"], "--changes belongs to --model"),
        (["--beta", "3"], "--beta belongs to --model"),
        (["--model", "rm"], "give --scores FILE"),
        (["--data", "pairs.jsonl"], "--model and --data belong together"),
        (["--require", "tv:0.1 accurate"], "requirement 'tv:0.1 accurate' cannot be parsed"),
        (["--floor", "2"], "floor must lie in [0, 1]; got 2"),
        (["--ambiguity", "group:2"], "reweighs groups in training"),
        (["--prompt-column", "topic"], "no column 'topic' of prompts; found: domain, margin"),
        (["--max-nan", "1"], "max_nan must lie in [0, 1)"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(tmp_path, arguments, message):
    scores = ["--scores", parquet(tmp_path / "rm.parquet")] if arguments else []
    done = stress(*scores, "--output-dir", tmp_path / "out", *arguments)
    assert done.exit_code == 2 and message in done.output
    assert "Traceback" not in done.output and not (tmp_path / "out").exists()


def test_one_file_twice(tmp_path):
    file = parquet(tmp_path / "rm.parquet")
    done = stress("--scores", file, "--scores", file, "--output-dir", tmp_path / "out")
    assert done.exit_code == 2 and "is given twice" in done.output


def test_models_that_would_be_kept_in_one_file(tmp_path):
    """a_b/rm and a/b/rm: the second one's scores took the place of the first one's."""
    for folder in ("a_b/rm", "a/b/rm"):
        (tmp_path / folder).mkdir(parents=True)
    models = [f"--model={tmp_path / folder}" for folder in ("a_b/rm", "a/b/rm")]
    done = stress(*models, "--data", tmp_path / "p.jsonl", "--output-dir", tmp_path / "out")
    assert done.exit_code == 2 and "are both kept in" in done.output
    assert not (tmp_path / "out").exists()


def test_ctrl_c_leaves_no_report(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("drrlhf.stress.stress_test", interrupted)
    done = stress("--scores", parquet(tmp_path / "rm.parquet"), "--output-dir", tmp_path / "out")
    assert done.exit_code == 130 and "no report was written" in done.output
    assert not (tmp_path / "out").exists()


def test_names_with_marks_of_a_terminal(tmp_path):
    file = parquet(tmp_path / "x[b]v[1].parquet")
    done = stress("--scores", file, "--output-dir", tmp_path / "out")
    assert done.exit_code == 0 and "x[b]v[1]" in done.output


def test_no_texts_of_a_file_leave(tmp_path):
    n = 60
    columns = {"margin": np.random.default_rng(0).normal(1, 1, n), "domain": ["a", "b"] * 30}
    columns["instruction"] = [f"please say secret {i}, and say it in many words" for i in range(n)]
    columns["votes"] = [{"the secret that was voted on, as a key": 1.0}] * n
    pq.write_table(pa.table(columns), tmp_path / "s.parquet")
    done = stress(
        "--scores", tmp_path / "s.parquet", "--no-texts", "--output-dir", tmp_path / "out"
    )
    assert done.exit_code == 0, done.output
    for path in (tmp_path / "out").iterdir():
        assert "secret" not in path.read_text() and "domain" in path.read_text()


def test_candidates_of_models_must_be_the_same(tmp_path):
    files = [changed(tmp_path / f"{name}.parquet") for name in "ab"]
    given = [candidates(tmp_path / "a.jsonl"), tmp_path / "b.jsonl"]
    rows = [json.loads(line) for line in given[0].read_text().splitlines()]
    turned = [{name: values[::-1] for name, values in row.items()} for row in rows]
    given[1].write_text("".join(json.dumps(row) + "\n" for row in turned))
    both = [x for file, best in zip(files, given) for x in ("--scores", file, "--best-of", best)]
    done = stress(*both, "--output-dir", tmp_path / "out")
    assert done.exit_code == 2 and "the same gold scores" in " ".join(done.output.split())
