"""Files of every kind give the same rows and columns, and what is wrong is one line that names it.

Expected values are written down by hand, beside the rows that they are of.
"""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from datetime import datetime

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from trl_fixtures import tiny_llama_dir
from typer.testing import CliRunner

from drrlhf import files
from drrlhf.cli import app
from drrlhf.data import DataError, load_preference_data, load_prompt_data
from drrlhf.files import tables
from drrlhf.stress import load_scores, score_table
from drrlhf.stress.scores import from_table

runner = CliRunner()


def lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(*arguments):
    return runner.invoke(app, list(map(str, arguments)))


# ---- rows and columns ----------------------------------------------------------------------------


def test_columns_of_lines_have_one_type(tmp_path, monkeypatch):
    """Across blocks too: blocks of two rows here, and a column that begins in the third."""
    monkeypatch.setattr(tables, "BLOCK", 2)
    values = {
        "grows": [1, 2, 0.5, None, None, 3],
        "mixed": [1, 2.0, "a", True, None, 0.5],
        "late": ["absent"] * 4 + [[1.0], None],
        "big": [1, 2, 3, 2**64, 5, 6],
        "unsigned": [2**63, 1, None, 2, 3, 4],
    }
    rows = [{k: v[i] for k, v in values.items() if v[i] != "absent"} for i in range(6)]
    found = tables.table(lines(tmp_path / "a.jsonl", rows))
    assert found.to_pydict() == {
        "grows": [1.0, 2.0, 0.5, None, None, 3.0],
        "mixed": ["1", "2", "a", "true", None, "0.5"],
        "late": [None] * 4 + [[1.0], None],
        "big": ["1", "2", "3", "18446744073709551616", "5", "6"],
        "unsigned": ["9223372036854775808", "1", None, "2", "3", "4"],
    }


def test_cells_of_csv_are_what_all_of_their_column_are(tmp_path):
    (tmp_path / "a.csv").write_text(
        "whole,number,truth,name,code,odd\n"
        "1, 0.5,true,a,18446744073709551616,1\n"
        "NA,1e3,False,,18446744073709551617,1b\n"
        "-3,nan,,NA,1,\n"
    )
    assert tables.table(tmp_path / "a.csv").to_pydict() == {
        "whole": [1, None, -3],
        "number": [0.5, 1000.0, None],
        "truth": [True, False, None],
        "name": ["a", None, "NA"],
        "code": ["18446744073709551616", "18446744073709551617", "1"],
        "odd": ["1", "1b", None],
    }


def test_texts_are_measured_and_a_prompt_with_an_id_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "BLOCK", 1)
    rows = [{"prompt": "p", "prompt_id": 7, "chosen": "né", "k": 1}, {"chosen": None, "k": 2}]
    lines(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    expected = {"prompt_id": [7, None], "k": [1, 2], "chosen_length": [2, None]}
    for suffix in (".jsonl", ".parquet"):
        found = tables.table(tmp_path / f"a{suffix}", ("chosen",), {"prompt": "prompt_id"})
        wanted = expected | ({"chosen": [None, None]} if suffix == ".jsonl" else {})
        assert found.to_pydict() == wanted
    given = [row | {"rejected_length": 3} for row in rows]
    found = tables.table(lines(tmp_path / "b.jsonl", given), ("chosen", "rejected"))
    assert "chosen_length" not in found.column_names  # in tokens, for all that is known


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}\n{"a": 2}\n', [(1, {"a": 1}), (2, {"a": 2})]),
        ('{"a": [1, 2], "b": 3}', [(1, {"a": [1, 2], "b": 3})]),
        ('{"a": [1, 2]}', [(1, {"a": 1}), (2, {"a": 2})]),
        ('{"a": [1, 2],\n "b": 3}', [(1, {"a": 1, "b": 3}), (2, {"a": 2, "b": 3})]),
        ('\n{"a": [{"role": "user"}]}', [(2, {"a": [{"role": "user"}]})]),
        ('{"a": [1, 2],\n "b": [3]}', [(1, {"a": [1, 2], "b": [3]})]),
        ('[\n{"a": 1},\n\n{"a":\n 2}, {"a": 3}]\n', [(2, {"a": 1}), (4, {"a": 2}), (5, {"a": 3})]),
        ("[]", []),
        (" \n", []),
    ],
)
def test_json_is_lines_an_array_or_columns(tmp_path, text, expected):
    (tmp_path / "a.json").write_text(text)
    assert list(tables.rows(tmp_path / "a.json")[1]) == expected


# ---- scores as evaluators have them --------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_nulls_among_lists_of_one_do_not_shift_rows(tmp_path, suffix):
    """10 - 9 and 3 - 7; what lacks one score or the other is counted, wherever it stands."""
    chosen, rejected = [[10.0], None, [3.0], [1.0], []], [[9.0], [5.0], [7.0], None, [2.0]]
    rows = [
        {"scores_chosen": c, "scores_rejected": r, "domain": "abcde"[i], "prompt_id": f"p{i}"}
        for i, (c, r) in enumerate(zip(chosen, rejected, strict=True))
    ]
    path = lines(tmp_path / "s.jsonl", rows)
    if suffix == ".json":
        path = tmp_path / "s.json"
        path.write_text(json.dumps({k: [row[k] for row in rows] for k in rows[0]}, indent=1))
    elif suffix == ".parquet":
        path = tmp_path / "s.parquet"
        pq.write_table(pa.Table.from_pylist(rows), path)
    found = load_scores(path, max_nan=0.6)
    assert found.margin.tolist() == [1.0, -4.0]
    assert (found.rows, found.dropped, found.prompts.tolist()) == (5, 3, [0, 1])
    assert found.attributes["domain"].codes.tolist() == [0, 1]
    assert found.attributes["domain"].names == ("a", "c")
    with pytest.raises(DataError, match=r"3 of 5 scores .*missing \(rows 2, 4, 5\)"):
        load_scores(path)


KINDS = [
    pa.list_(pa.float64()),
    pa.large_list(pa.float32()),
    pa.list_(pa.float64(), 1),
    pa.list_view(pa.float64()),
    pa.list_(pa.list_(pa.int64())),
    pa.decimal128(9, 2),
    pa.float16(),
    pa.dictionary(pa.int8(), pa.float64()),
    pa.list_(pa.decimal128(9, 2)),
]


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_scores_of_every_arrow_type(kind):
    """2 - 1, 3 - 5 and a null, in two chunks."""

    def cell(value):
        for _ in range(str(kind).count("list")):
            value = [value]
        return value

    def column(*parts):
        cells = [[one if one is None else cell(one) for one in part] for part in parts]
        return pa.chunked_array([pa.array(part, kind) for part in cells])

    table = pa.table(
        {
            "chosen_reward": column([2, None], [3]),
            "rejected_reward": column([1, 4], [5]),
        }
    )
    found = from_table(table, "made up", max_nan=0.5)
    assert found.margin.tolist() == [1.0, -2.0] and found.dropped == 1


def test_rewardbench_score_file(tmp_path):
    """As its scripts write it: columns, and beside them what belongs to all of them."""
    written = {
        "chat_template": "tulu",
        "id": [11, 12, 12],
        "model": "org/model",
        "model_type": "Seq. Classifier",
        "results": [1, 0, 1],
        "scores_chosen": [[2.5], [0.0], [1]],
        "scores_rejected": [[1.0], [0.5], [-1]],
        "subset": ["chat", "code", "chat"],
        "text_chosen": ["a", "b", "c"],
        "text_rejected": ["d", "e", "f"],
    }
    (tmp_path / "model.json").write_text(json.dumps(written, indent=4, sort_keys=True))
    found = load_scores(tmp_path / "model.json")
    assert found.margin.tolist() == [1.5, -0.5, 2.0]
    assert found.prompts.tolist() == [0, 1, 1]
    assert found.attributes["subset"].codes.tolist() == [0, 1, 0]
    assert found.ignored["model"] == found.ignored["chat_template"] == "constant"


@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: [x]], ids=["numbers", "lists of one"])
@pytest.mark.parametrize("suffix", [".jsonl", ".csv"])
def test_rewardbench_save_all(tmp_path, wrap, suffix):
    rows = [{"chosen": wrap(c), "rejected": wrap(r)} for c, r in ((1.0, 0.0), (0.0, 2.0))]
    if suffix == ".jsonl":
        path = lines(tmp_path / "m_all.jsonl", rows)
    else:
        if wrap(0) != 0:
            pytest.skip("CSV has no lists")
        path = tmp_path / "m_all.csv"
        path.write_text("chosen,rejected\n1.0,0.0\n0,2\n")
    found = load_scores(path)
    assert found.margin.tolist() == [1.0, -2.0]
    assert found.prompts.tolist() == [0, 1] and found.longer is None


RB2 = [
    {"id": "1", "subset": "Math", "scores": [3.0, 1.0, 4.0, 2.0], "num_correct": 1},
    {"id": "2", "subset": "Ties", "scores": [5.0, 1.0, 2.0, 6.0], "num_correct": 2},
    {"id": "3", "subset": "Math", "scores": None, "num_correct": 1},
    {"id": None, "subset": "Math", "scores": [0.0, float("nan"), 1.0], "num_correct": 1},
]
# Right answers with wrong ones: 3 with 1, 4, 2; 5 and 1 with 2 and 6; nothing; 0 with NaN and 1.
RB2_MARGINS = [2.0, -1.0, 1.0, 3.0, -1.0, -1.0, -5.0, -1.0]


@pytest.mark.parametrize("form", ["rows", "lists of one", "columns"])
def test_rewardbench_2_scores(tmp_path, form):
    rows = RB2
    if form == "lists of one":
        rows = [row | {"scores": row["scores"] and [[s] for s in row["scores"]]} for row in RB2]
    path = lines(tmp_path / "m.jsonl", rows)
    if form == "columns":
        path = tmp_path / "m.json"
        columns = {key: [row[key] for row in rows] for key in rows[0]} | {"model": "org/m"}
        path.write_text(json.dumps(columns, indent=4, sort_keys=True))
    found = load_scores(path, max_nan=0.2)
    assert found.margin.tolist() == RB2_MARGINS
    assert found.prompts.tolist() == [0, 0, 0, 1, 1, 1, 1, 2]
    assert found.attributes["subset"].codes.tolist() == [0, 0, 0, 1, 1, 1, 1, 0]
    assert (found.rows, found.dropped, found.without_prompt) == (10, 2, 1)
    with pytest.raises(DataError, match=r"2 of 10 scores .*\(rows 3, 4\)"):
        load_scores(path)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"scores": [1.0]}, r"row 2: 1 scores, of which 1 are of right answers \(num_correct\)"),
        ({"num_correct": 4}, "row 2: 4 scores, of which 4 are"),
        ({"num_correct": 0}, "row 2: 4 scores, of which 0 are"),
        ({"num_correct": None}, "row 2: 4 scores, of which nan are"),
    ],
)
def test_rewardbench_2_rows_without_a_pair(tmp_path, row, message):
    path = lines(tmp_path / "m.jsonl", [RB2[0], RB2[0] | row])
    with pytest.raises(DataError, match=message):
        load_scores(path)
    without = [{"id": row["id"], "scores": row["scores"]} for row in RB2[:2]]  # one right answer
    found = load_scores(lines(tmp_path / "m.jsonl", without))
    assert found.margin.tolist() == [2.0, -1.0, 1.0, 4.0, 3.0, -1.0]


# ---- prompts -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "prompts", "missing"),
    [
        (["a", None, "a", "", " \t", "b"], [0, 2, 0, 3, 4, 1], 3),
        ([1, 2**64, 1, None, None, 2**64 + 1], [0, 1, 0, 3, 4, 2], 2),
        ([0.5, float("nan"), 0.5, None, 1, 1], [0, 2, 0, 3, 1, 1], 2),
        (
            [[{"role": "user", "content": "q"}], [], [{"role": "user", "content": "q"}]]
            + [None] * 3,
            [0, 1, 0, 2, 3, 4],
            4,
        ),
        ([None] * 6, [0, 1, 2, 3, 4, 5], 6),
    ],
)
def test_pairs_without_a_prompt_id_stand_for_themselves(tmp_path, ids, prompts, missing):
    rows = [{"margin": 1.0 - i, "prompt_id": one} for i, one in enumerate(ids)]
    found = load_scores(lines(tmp_path / "s.jsonl", rows))
    assert found.prompts.tolist() == prompts
    assert found.without_prompt == missing


def test_pairs_without_a_prompt_id_are_said(tmp_path):
    """In what is printed, in the page and in its JSON; pairs that name themselves are as before."""
    margins = np.random.default_rng(0).normal(0.5, 1, 60).tolist()
    ids = [["a", "b", "", None][i % 4] for i in range(60)]  # 15 each
    rows = [{"margin": m, "prompt_id": one} for m, one in zip(margins, ids, strict=True)]
    path, said = lines(tmp_path / "s.jsonl", rows), "30 of 60 pairs have no prompt id"
    out = ("--output-dir", tmp_path / "out", "--resamples", 20)
    done = run("stress", "--scores", path, *out)
    assert done.exit_code == 0 and said in done.output, done.output
    assert said in (tmp_path / "out" / "report.html").read_text()
    report = json.loads((tmp_path / "out" / "report.json").read_text())["models"]["s"]
    assert (report["pairs_without_prompt"], report["prompts"]) == (30, 32)
    assert any(said in note for note in report["notes"])
    done = run("suggest-radius", "--scores", path, "--resamples", 100)
    assert done.exit_code == 0 and "30 of these pairs have no prompt id" in done.output
    named = lines(tmp_path / "s.jsonl", [{"margin": m} for m in margins])
    assert "no prompt id" not in run("stress", "--scores", named, *out).output


def test_a_prompts_text_can_be_asked_for_beside_its_id(tmp_path):
    rows = [{"margin": 1.0 - i, "prompt_id": i, "prompt": "pq"[i // 2]} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "s.parquet")
    for path in (lines(tmp_path / "s.jsonl", rows), tmp_path / "s.parquet"):
        assert load_scores(path).prompts.tolist() == [0, 1, 2, 3]
        assert load_scores(path, prompt_column="prompt").prompts.tolist() == [0, 0, 1, 1]


# ---- what is wrong is one line -------------------------------------------------------------------

DEEP = "[" * 100_000
GOOD = json.dumps({"prompt": "p", "chosen": "c", "rejected": "r", "a": 1})
HEADER = "prompt,chosen,rejected,a\np,c,r,1\n"
# A file, and what is said of it by whoever reads it.
BROKEN = {
    "json": (".jsonl", f'{GOOD}\n{{"a": ', "line 2: broken JSON: Expecting value (column 7)"),
    "json deep": (".jsonl", f'{{"a": {DEEP}', "line 1: broken JSON: maximum recursion depth"),
    "json digits": (".jsonl", f'{{"a": {"1" * 5000}}}', "line 1: broken JSON: Exceeds the limit"),
    "json bytes": (".jsonl", GOOD + '\n"\udcff"', "line 2: not UTF-8 (invalid start byte); save"),
    "array": (
        ".json",
        f'[\n{GOOD},\n{{"a": }}]',
        "line 3: broken JSON: Expecting value (column 7)",
    ),
    "array cut": (".json", f"[{GOOD},\n", "line 2: broken JSON: Expecting value (column 1)"),
    "array comma": (".json", f"[{GOOD}\n{GOOD}]", "line 2: broken JSON: Expecting ',' delimiter"),
    "array more": (".json", f"[{GOOD}]\n ]", "line 2: broken JSON: Extra data (column 2)"),
    "array deep": (".json", DEEP, "line 1: broken JSON: maximum recursion depth"),
    "columns": (".json", '{"a": [1],\n "b": [1}', "line 2: broken JSON: Expecting ',' delimiter"),
    "not rows": (".jsonl", "[1]\n", "line 1: expected an object"),
    "csv cells": (".csv", HEADER + 'p,"c\n2",r,3\np\n', "line 5: 1 fields, but the header names 4"),
    "csv quote": (".csv", HEADER + 'p,c,r,"2', "line 3: broken CSV: unexpected end of data"),
    "csv bytes": (".csv", HEADER + "p,c,r,\udcff", "line 3: not UTF-8 (invalid start byte); save"),
    "csv names": (".csv", "a,b,a\n1,2,3\n", "line 1: column 'a' is there more than once"),
    "parquet": (".parquet", "none", "cannot be read as Parquet"),
    "suffix": (".txt", "a", "unknown suffix '.txt'"),
}


REWARD = ("--reward", "operator:add")


def training(tmp_path):
    """The options of a run whose model has no weights."""
    (tmp_path / "model").mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config))
    return "--model", tmp_path / "model", "--output-dir", tmp_path / "out"


def one_red_line(result, path, message):
    """Exit status 2, and on standard error one line with the file and what is wrong in it."""
    assert result.exit_code == 2, result.output
    assert isinstance(result.exception, SystemExit)
    (line,) = result.stderr.strip().splitlines()
    assert line.startswith("error: ") and f"{path}: {message}" in line, line


@pytest.mark.parametrize(("suffix", "text", "message"), BROKEN.values(), ids=BROKEN)
def test_broken_files_are_one_line_in_every_command(tmp_path, suffix, text, message):
    """Data is read before the model, which cannot be loaded."""
    path = tmp_path / f"a{suffix}"
    path.write_text(text, encoding="utf-8", errors="surrogateescape")
    model = training(tmp_path)
    one_red_line(run("stress", "--scores", path, "--output-dir", tmp_path), path, message)
    one_red_line(run("suggest-radius", "--scores", path), path, message)
    for kind in ("reward", "dpo"):
        one_red_line(run("train", kind, "--data", path, *model), path, message)
    one_red_line(run("train", "grpo", "--data", path, *REWARD, *model), path, message)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt_id": 2**64}, {"prompt_id": 1}], None),
        ([{"k": "x"}, {"k": "x\ud83d"}], "line 2: 'k' is not valid Unicode: surrogates not"),
        ([{"k": 1}, {"k": "\ud83d"}], "line 2: 'k' is not valid Unicode"),
        ([{"margin": 1}, {"margin": "high"}], "row 2: column 'margin' must hold numbers, but"),
        ([{"margin": 1}, {"margin": True}], "row 2: column 'margin' must hold numbers, but"),
        ([{"margin": 1}, {"margin": 10**400}], "row 1: column 'margin' must hold numbers"),
        (
            [
                {"scores_chosen": [1], "scores_rejected": [2]},
                {"scores_chosen": [1, 2], "scores_rejected": [2]},
            ],
            "row 2: column 'scores_chosen' holds lists of several scores",
        ),
        (
            [
                {"scores_chosen": [1], "scores_rejected": 2},
                {"scores_chosen": 1, "scores_rejected": [2]},
            ],
            "row 1: column 'scores_chosen' must hold numbers, but holds string: '[1]'",
        ),
        (
            [{"scores": [1, 2]}, {"scores": 3}],
            "row 2: column 'scores' must hold a list of numbers for each prompt, but holds '3'",
        ),
        (
            [{"scores": [1, 2]}, {"scores": [1, "a"]}],
            "row 2: column 'scores' must hold a list of numbers for each prompt, but holds '[1, ",
        ),
        (
            [{"scores": [None, 2]}, {"scores": ["1", "a"]}],
            "row 2: column 'scores' must hold a list of numbers for each prompt, but holds '[",
        ),
        (
            [{"scores": ["1", "2"]}, {"scores": ["3", "a"]}],
            "row 2: column 'scores' must hold numbers, but holds string: 'a'",
        ),
    ],
)
def test_wrong_scores_name_their_row(tmp_path, rows, message):
    if "scores" not in rows[0]:
        rows = [{"margin": 1.0 - 2 * i} | row for i, row in enumerate(rows)]
    path = lines(tmp_path / "s.jsonl", rows)
    done = run("stress", "--scores", path, "--output-dir", tmp_path / "out")
    if message is None:
        assert done.exit_code == 0, done.output
    else:
        one_red_line(done, path, message)


def test_csv_beyond_a_mebibyte_with_line_breaks_in_cells(tmp_path):
    """Every other margin is 1 - 2, and the names are those that were written."""
    n = 30_000
    with (tmp_path / "s.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "chosen_reward", "rejected_reward", "name"])
        writer.writerows(
            [f'line {i}\nmore, "text"' * 2, 1, i % 2 * 2, f"a\n{i % 3}"] for i in range(n)
        )
    assert (tmp_path / "s.csv").stat().st_size > 2**20
    found = load_scores(tmp_path / "s.csv")
    assert found.margin.tolist() == [1.0, -1.0] * (n // 2)
    assert len(set(found.prompts)) == n
    assert found.attributes["name"].names == ("a\n0", "a\n1", "a\n2")


# ---- columns of the user's own -------------------------------------------------------------------


def prompts(tmp_path, *more, suffix=".jsonl"):
    rows = [{"prompt": f"p{i}"} | one for i, one in enumerate(more)]
    if suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "g.parquet")
        return tmp_path / "g.parquet"
    return lines(tmp_path / "g.jsonl", rows)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_of_several_tasks_are_none_where_they_are_not_given(tmp_path, suffix):
    more = [{"answer": 2, "tests": None}, {"answer": None, "tests": ["t"]}, {"tests": ["u", "v"]}]
    found = load_prompt_data(prompts(tmp_path, *more, suffix=suffix)).dataset
    assert found["answer"][:] == [2, None, None]
    assert found["tests"][:] == [None, ["t"], ["u", "v"]]
    assert found.features["answer"].dtype == "int64"


def test_a_column_that_begins_late_and_one_in_csv(tmp_path):
    found = load_prompt_data(prompts(tmp_path, {}, {"answer": 0.5}, {"answer": 1})).dataset
    assert found["answer"][:] == [None, 0.5, 1.0]
    (tmp_path / "g.csv").write_text("prompt,answer,tests\np,2,\nq,,t\n")
    found = load_prompt_data(tmp_path / "g.csv").dataset
    assert found["answer"][:] == ["2", None] and found["tests"][:] == [None, "t"]


BAD_ANSWERS = {
    "mixed": ([2, None, "two"], "line 3: 'answer' is 'two', but 2 in line 1; give all of it one"),
    "mixed later": ([None, "a", 1], "line 3: 'answer' is 1, but 'a' in line 2; give all of it one"),
    "true": ([1, True], "line 2: 'answer' is True, but 1 in line 1"),
    "list": ([[1], 1], r"line 2: 'answer' is 1, but [1] in line 1"),
    "nested": ([[1, "a"]], "line 1: 'answer' is [1, 'a']; give all of it one type"),
    "field": ([{"a": 1}, {"a": "b"}], "line 2: 'answer' is {'a': 'b'}, but {'a': 1} in line 1"),
    "beyond": ([1, 2**64], "line 2: 'answer' is 18446744073709551616, an integer beyond 64 bits"),
    "below": ([-(2**63) - 1], "line 1: 'answer' is -9223372036854775809, an integer beyond 64"),
    "surrogate": (["a", "\ud83d"], "line 2: 'answer' is not valid Unicode: surrogates not allowed"),
}


@pytest.mark.parametrize(("values", "message"), BAD_ANSWERS.values(), ids=BAD_ANSWERS)
def test_answers_of_no_one_type_name_file_line_and_column(tmp_path, values, message):
    path = prompts(tmp_path, *({"answer": value} for value in values))
    done = run("train", "grpo", "--data", path, *REWARD, *training(tmp_path))
    one_red_line(done, path, message)


@pytest.mark.parametrize(("key", "value"), [("margin", 10**400), ("weight", -(10**400))])
def test_numbers_that_no_float_holds(tmp_path, key, value):
    rows = [{"chosen": "a", "rejected": "b", key: one} for one in (1, value)]
    with pytest.raises(DataError, match=rf"line 2: '{key}' must be a finite number"):
        load_preference_data(lines(tmp_path / "p.jsonl", rows))


def test_a_value_without_a_python_object_names_row_and_column(tmp_path):
    """Bytes that are no text in a column of text, as some writers leave them."""
    validity, offsets, _ = pa.array(["ok", "xy", "z"]).buffers()
    text = pa.Array.from_buffers(pa.string(), 3, [validity, offsets, pa.py_buffer(b"ok\xff\xfez")])
    pq.write_table(pa.table({"prompt": ["p", "q", "r"], "answer": text}), tmp_path / "g.parquet")
    with pytest.raises(DataError, match="row 2: column 'answer' cannot be read: 'utf-8' codec"):
        load_prompt_data(tmp_path / "g.parquet")


def test_attributes_of_models_own_pairs_may_be_null_and_unsigned(tmp_path):
    """`stress --model` keeps other columns as attributes, dates and hashes among them."""
    rows = [
        {
            "chosen": "aa",
            "rejected": "b",
            "hash": 2**63 + i,
            "when": datetime(2026, 1, 1 + i),
            "lang": None if i == 1 else "en",
        }
        for i in range(3)
    ]
    schema = pa.schema(
        [
            ("chosen", pa.string()),
            ("rejected", pa.string()),
            ("hash", pa.uint64()),
            ("when", pa.timestamp("us")),
            ("lang", pa.string()),
        ]
    )
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), tmp_path / "p.parquet")

    class Lengths:
        def rewards(self, some, advance):
            advance(2 * len(some))
            return np.array([[len(row["chosen"]), len(row["rejected"])] for row in some], float)

    found = score_table(Lengths(), tmp_path / "p.parquet", changes="none").to_pydict()
    for key in ("hash", "when", "lang"):
        assert found[key] == [row[key] for row in rows]
    assert np.subtract(found["chosen_reward"], found["rejected_reward"]).tolist() == [1, 1, 1]


def test_grpo_hands_none_to_the_reward_function(tmp_path, monkeypatch):
    """A file of two tasks, trained on for one step: what the function is given is what was said."""
    monkeypatch.chdir(tmp_path)
    seen = tmp_path / "seen.jsonl"
    (tmp_path / "two_tasks.py").write_text(
        "import json\n"
        "def score(prompts, completions, answer, tests, **_):\n"
        f"    with open({str(seen)!r}, 'a') as file:\n"
        "        file.writelines(json.dumps([p, a, t]) + '\\n'"
        " for p, a, t in zip(prompts, answer, tests))\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    given = [{"answer": 4, "tests": None}, {"answer": None, "tests": ["t"]}] * 2
    path = prompts(tmp_path, *given)
    done = run(
        "train",
        "grpo",
        "--data",
        path,
        "--model",
        tiny_llama_dir(tmp_path),
        "--reward",
        "two_tasks:score",
        "--output-dir",
        "out",
        "--num-generations",
        2,
        "--steps",
        1,
        "--batch-size",
        4,
        "--max-completion-length",
        4,
    )
    assert done.exit_code == 0, done.output + done.stderr
    rows = [json.loads(line) for line in seen.read_text().splitlines()]
    assert rows
    for prompt, answer, tests in rows:
        wanted = given[int(prompt[1:])]
        assert (answer, tests) == (wanted["answer"], wanted["tests"])


# ---- files of ours -------------------------------------------------------------------------------


def test_json_lines_leave_out_a_cut_off_end_and_name_a_broken_line(tmp_path):
    path = tmp_path / "m.jsonl"
    said = "a\u2028b"  # a line of its own to str.splitlines
    path.write_text(f'{{"step": 1}}\n{{"step": 2, "said": "{said}"}}\n{{"step": 3, "lo', "utf-8")
    assert files.json_lines(path) == [{"step": 1}, {"step": 2, "said": said}]
    path.write_text('{"step": 1}\nnonsense\n{"step": 2}\n')
    with pytest.raises(ValueError, match=r"m\.jsonl, line 2: not valid JSON"):
        files.json_lines(path)
    assert files.json_lines(tmp_path / "absent.jsonl") == []


def test_a_write_that_fails_leaves_the_old_files_and_no_part(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    for path in (first, second):
        files.write_text(path, "old é")

    def fails(part):
        part.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.write_together({first: files.writes_text("new"), second: fails})
    assert [path.read_bytes() for path in (first, second)] == ["old é".encode()] * 2
    assert sorted(tmp_path.iterdir()) == [first, second]
    files.write_together({first: files.writes_text("1"), second: files.writes_text("2")})
    assert [path.read_text() for path in (first, second)] == ["1", "2"]


def test_what_writes_files_needs_no_pyarrow():
    """Benchmarks and the command's start run where torch alone is installed."""
    code = (
        "import sys; sys.modules['pyarrow'] = None\n"
        "import drrlhf.files, drrlhf.report, drrlhf.cli.rundir, drrlhf.bench.results"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
