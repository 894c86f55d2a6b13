"""Files of the benchmarks of the field, as they are published, as rows of pairs."""

from __future__ import annotations

import json
import logging

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from drrlhf.data import DataError, load_preference_data
from drrlhf.stress import from_table, load_scores
from drrlhf.stress.benchmarks import read_pairs
from drrlhf.stress.scoring import score_table

REWARD_BENCH = {
    "prompt": "Say hello.",
    "chosen": "Hello!",
    "chosen_model": "good-1",
    "rejected": "No.",
    "rejected_model": "bad-1",
    "subset": "chat",
    "id": 7,
}
REWARD_BENCH_2 = {
    "id": "12",
    "prompt": "Name a colour of the rainbow.",
    "chosen": ["Red", "Blue"],
    "rejected": ["Pink", "Brown", "Grey"],
    "num_correct": 2,
    "num_incorrect": 3,
    "total_completions": 5,
    "models": ["m1", "m2"],
    "subset": "Ties",
    "additional_metadata": {"category": None, "index": 1.0},
}
RM_BENCH = {
    "id": 3,
    "prompt": "What is two and two?",
    "chosen": ["4", "It is 4.", "**4**"],
    "rejected": ["5", "It is 5.", "**5**"],
    "domain": "math",
}
JUDGE_BENCH = {
    "pair_id": "p-1",
    "original_id": "q-1",
    "source": "mmlu-pro-law",
    "question": "Which court?",
    "response_model": "gpt-4o",
    "response_A": "The first.",
    "response_B": "The second.",
    "label": "B>A",
}
HHH = {"input": "May I?", "targets": {"choices": ["Yes.", "Never."], "labels": [1, 0]}}
EVERY = {
    "RewardBench 2": REWARD_BENCH_2,
    "RM-Bench": RM_BENCH,
    "JudgeBench": JUDGE_BENCH,
    "HHH": HHH,
}


def written(tmp_path, rows, suffix=".jsonl"):
    path = tmp_path / f"data{suffix}"
    if suffix == ".jsonl":
        path.write_text("\n".join(map(json.dumps, rows)) + "\n")
    elif suffix == ".json":
        path.write_text(json.dumps(rows))
    else:
        pq.write_table(pa.Table.from_pylist(rows), path)
    return path


def pairs(tmp_path, rows, suffix=".jsonl"):
    return read_pairs(written(tmp_path, rows, suffix)).dataset.to_list()


def changed(row, **new):
    """The row with new values; without those that are None."""
    return {key: value for key, value in (row | new).items() if value is not None}


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rows",
    [
        [{"prompt": "p", "chosen": "a", "rejected": "b", "topic": "x"}] * 2,
        [REWARD_BENCH, REWARD_BENCH | {"id": 8, "subset": "code"}],
        [
            {
                "prompt": [{"role": "user", "content": "p"}],
                "chosen": [{"role": "assistant", "content": "a"}],
                "rejected": [{"role": "assistant", "content": "b"}],
            }
        ],
        # A plain file may have columns of the other formats beside its pairs.
        [{"chosen": "a", "rejected": "b", "responses": ["a", "b"], "domain": "d", "label": "A>B"}],
    ],
    ids=["plain", "RewardBench", "messages", "odd columns"],
)
def test_rows_of_pairs_stay_as_they_are(tmp_path, rows):
    path = written(tmp_path, rows)
    found = read_pairs(path).dataset.to_list()
    assert found == load_preference_data(path, keep_columns=True).dataset.to_list()
    assert [(one["chosen"], one["rejected"]) for one in found] == [
        (one["chosen"], one["rejected"]) for one in rows
    ]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_reward_bench_2(tmp_path, suffix, caplog):
    second = REWARD_BENCH_2 | {
        **{"id": "13", "chosen": ["Yes"], "rejected": ["No"], "subset": "Math"},
        **{"num_correct": 1, "num_incorrect": 1, "total_completions": 2},
    }
    with caplog.at_level(logging.WARNING):
        found = pairs(tmp_path, [REWARD_BENCH_2, second], suffix)
    common = {"prompt": REWARD_BENCH_2["prompt"], "prompt_id": "12", "subset": "Ties"}
    assert found[:6] == [
        {**common, "chosen": right, "rejected": wrong, "chosen_answer": i, "rejected_answer": j}
        for i, right in enumerate(["Red", "Blue"])
        for j, wrong in enumerate(["Pink", "Brown", "Grey"], 2)
    ]
    assert [(one["prompt_id"], one["chosen"], one["subset"]) for one in found[6:]] == [
        ("13", "Yes", "Math")
    ]
    assert "columns left out: additional_metadata, models" in caplog.text


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_rm_bench(tmp_path, suffix):
    found = pairs(tmp_path, [RM_BENCH, RM_BENCH | {"id": 4}], suffix)
    assert len(found) == 18 and [one["prompt_id"] for one in found] == ["3"] * 9 + ["4"] * 9
    said = [
        (
            *(one["chosen"], one["chosen_style"], one["chosen_answer"]),
            *(one["rejected"], one["rejected_style"], one["rejected_answer"]),
        )
        for one in found[:9]
    ]
    assert said[0] == ("4", "concise", 0, "5", "concise", 3)
    assert said[1] == ("4", "concise", 0, "It is 5.", "detailed", 4)
    assert said[5] == ("It is 4.", "detailed", 1, "**5**", "markdown", 5)
    assert said[6] == ("**4**", "markdown", 2, "5", "concise", 3)
    assert len({*said}) == 9
    assert {one["domain"] for one in found} == {"math"}


def test_judge_bench(tmp_path):
    other = JUDGE_BENCH | {"pair_id": "p-2", "original_id": "q-2", "label": "A>B"}
    second, first = pairs(tmp_path, [JUDGE_BENCH, other])
    assert second == {
        "prompt": "Which court?",
        "prompt_id": "p-1",
        "original_id": "q-1",
        "source": "mmlu-pro-law",
        "response_model": "gpt-4o",
        "chosen": "The second.",
        "rejected": "The first.",
        "chosen_answer": 1,
        "rejected_answer": 0,
        "chosen_position": "second",
    }
    assert (first["chosen"], first["rejected"]) == ("The first.", "The second.")
    assert (first["chosen_answer"], first["chosen_position"]) == (0, "first")


def test_hhh_in_its_three_forms(tmp_path):
    """The Hub's lines, texts with a score each, and a task of BIG-bench with examples."""
    turned = {"input": "Who?", "targets": {"choices": ["Me.", "You."], "labels": [0, 1]}}
    by_text = [
        {"input": "May I?", "target_scores": {"Yes.": 1, "Never.": 0}},
        {"input": "Who?", "target_scores": {"Me.": 0, "You.": 1}},
    ]
    wanted = [
        {
            "prompt": "May I?",
            "prompt_id": "row 1",
            "chosen": "Yes.",
            "rejected": "Never.",
            "chosen_answer": 0,
            "rejected_answer": 1,
        },
        {
            "prompt": "Who?",
            "prompt_id": "row 2",
            "chosen": "You.",
            "rejected": "Me.",
            "chosen_answer": 1,
            "rejected_answer": 0,
        },
    ]
    for suffix in (".jsonl", ".json", ".parquet"):
        assert pairs(tmp_path, [HHH, turned], suffix) == wanted
        assert pairs(tmp_path, by_text, suffix) == wanted
    task = tmp_path / "task.json"
    task.write_text(json.dumps({"name": "hhh", "keywords": ["a"], "examples": by_text}))
    found = read_pairs(task).dataset.to_list()
    assert found == [
        one | {"prompt_id": f"example {number}"} for number, one in enumerate(wanted, 1)
    ]


def test_answers_that_are_json_are_not_messages(tmp_path):
    row = changed(REWARD_BENCH_2, chosen=['{"a": 1}', "x"], rejected=["1", "[]", '{"b'])
    assert [one["chosen"] for one in pairs(tmp_path, [row])] == ['{"a": 1}'] * 3 + ["x"] * 3


def test_prompts_never_share_an_id(tmp_path):
    """Else the answers of two prompts would count as those of one."""
    found = pairs(tmp_path, [RM_BENCH, RM_BENCH, changed(RM_BENCH, id=None)])
    assert [one["prompt_id"] for one in found[::9]] == ["3", "3 (row 2)", "row 3"]
    mixed = pairs(tmp_path, [RM_BENCH, RM_BENCH | {"id": "three"}])
    assert [one["prompt_id"] for one in mixed[::9]] == ["3", "three"]


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "new", "message"),
    [
        ("RewardBench 2", {"num_correct": None}, "missing 'num_correct'; expected prompt, chosen"),
        ("RewardBench 2", {"prompt": None}, "missing 'prompt'"),
        ("RewardBench 2", {"num_correct": 1}, "'num_correct' is 1, but there are 2 chosen and 3"),
        ("RewardBench 2", {"num_incorrect": 2}, "'num_incorrect' is 2, .* expected 3"),
        ("RewardBench 2", {"total_completions": 4}, "'total_completions' is 4, .* expected 5"),
        ("RewardBench 2", {"rejected": "no"}, "'rejected' must be a list .*got 'no'"),
        ("RewardBench 2", {"chosen": []}, r"'chosen' must be a list of at least one .*got \[\]"),
        ("RM-Bench", {"domain": None}, "missing 'domain'; .*found: chosen, id, prompt, rejected"),
        ("RM-Bench", {"chosen": ["4", "four"]}, "'chosen' holds 2 answers; expected 3"),
        ("RM-Bench", {"rejected": ["5", "five", 5]}, "'rejected' must be a list"),
        ("JudgeBench", {"label": "A=B"}, "'label' must be one of 'A>B', 'B>A'; got 'A=B'"),
        ("JudgeBench", {"response_B": None}, "missing 'response_B'"),
        ("JudgeBench", {"response_A": 5}, "must be strings; got"),
        ("HHH", {"targets": None}, "missing 'targets' .or 'target_scores'."),
        ("HHH", {"targets": {"choices": ["a", "b"], "labels": [1]}}, "as many of both; got"),
        ("HHH", {"targets": {"choices": ["a", "b"], "label": [1, 0]}}, "'targets' must be"),
        ("HHH", {"targets": {"choices": ["a", "b"], "labels": [1, 1]}}, "one right .* one wrong"),
        ("HHH", {"targets": {"choices": ["a", "b"], "labels": [1, 2]}}, "1 .right. or 0 .wrong.;"),
        ("HHH", {"targets": None, "target_scores": {"a": 1, "b": 0.5}}, "got .1, 0.5."),
        ("HHH", {"input": None}, "missing 'input'"),
    ],
)
def test_a_row_of_another_version_is_named(tmp_path, form, new, message):
    """One line: the file, the row, what was expected and found; also where the row is not first,
    and in a file whose rows are all in one line."""
    good = EVERY[form]
    for suffix in (".jsonl", ".json"):
        path = written(tmp_path, [good, good, changed(good, **new)], suffix)
        with pytest.raises(DataError, match=rf"row 3: not as {form} has it: .*{message}") as found:
            read_pairs(path)
        assert str(found.value).startswith(str(path)) and "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed(RM_BENCH, domain=None), "expected them beside num_correct .* or beside domain"),
        ({"input": "p", "tragets": {}}, "HHH .input.; found: input, tragets; rename them"),
        ({"prompt": "p", "Chosen": "a", "Rejected": "b"}, "found: Chosen, Rejected, prompt"),
        (changed(JUDGE_BENCH, label=None, lable="A>B"), "not as JudgeBench has it: missing 'label"),
        ({"prompt": "p", "candidates": ["a"], "gold": [1.0]}, "'candidates', .*load_candidates"),
        (changed(REWARD_BENCH, rejected=None), "missing column 'rejected'"),
        (REWARD_BENCH_2 | {"chosen": ["a", " "]}, "'chosen' is empty"),
    ],
)
def test_a_first_row_of_no_format(tmp_path, row, message):
    with pytest.raises(DataError, match=f"(line|row) 1: .*{message}"):
        pairs(tmp_path, [row])


def test_a_file_without_rows(tmp_path):
    (tmp_path / "data.jsonl").write_text("\n")
    with pytest.raises(DataError, match="empty"):
        read_pairs(tmp_path / "data.jsonl")


# ---- scores --------------------------------------------------------------------------------------


class Judge:
    """Scores a pair by what its answers hold."""

    def __init__(self, reward):
        self.reward = reward

    def rewards(self, rows, on_progress):
        on_progress(2 * len(rows))
        return np.array(
            [[self.reward(row[side]) for side in ("chosen", "rejected")] for row in rows]
        )


def test_scores_of_a_benchmark_keep_answers_and_styles(tmp_path):
    """A judge that counts characters; the changes of the text are not what is looked at."""
    path = written(tmp_path, [RM_BENCH, RM_BENCH | {"id": 4, "domain": "code"}])
    table = score_table(Judge(len), path)
    kept = {"prompt_id", "chosen_answer", "rejected_answer", "chosen_style", "chosen_length"}
    assert kept <= {*table.column_names}
    found = from_table(table, "table")
    sizes = [len("4"), len("It is 4."), len("**4**")]
    np.testing.assert_array_equal(
        found.margin.reshape(2, 3, 3), [np.subtract.outer(sizes, sizes)] * 2
    )
    assert found.prompts.tolist() == [0] * 9 + [1] * 9
    assert found.answers[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 2
    assert found.answers[1].tolist() == [3, 4, 5] * 6
    assert {*found.attributes} == {"chosen_style", "rejected_style", "domain", "answer lengths"}
    # Nor does the id become one where prompts are told apart by something else.
    again = from_table(table, "table", prompt_column="domain")
    assert {"prompt_id", "chosen_answer"}.isdisjoint(again.attributes)


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("score_chosen", "score_rejected"),
        ("scores_chosen", "scores_rejected"),
        ("chosen_scores", "rejected_scores"),
        ("chosen", "rejected"),
    ],
)
def test_score_files_of_rm_bench(tmp_path, chosen, rejected):
    rows = [
        {"id": 1, "domain": "math", chosen: [3.0, 2.0, 1.0], rejected: [0.0, 2.5, 1.0]},
        {"id": 2, "domain": "code", chosen: [1.0, 1.0, 1.0], rejected: [0.0, 0.0, 9.0]},
    ]
    found = load_scores(written(tmp_path, rows, ".json"))
    assert found.margin.tolist() == [3, 0.5, 2, 2, -0.5, 1, 1, -1.5, 0, *[1, 1, -8] * 3]
    assert found.prompts.tolist() == [0] * 9 + [1] * 9 and found.rows == 18
    names = ("concise", "detailed", "markdown")
    styles = [found.attributes[name] for name in ("chosen_style", "rejected_style")]
    assert all(one.names == names for one in styles)
    assert styles[0].codes.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 2
    assert styles[1].codes.tolist() == [0, 1, 2] * 6
    assert found.answers[0].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] * 2
    assert found.answers[1].tolist() == [3, 4, 5] * 6
    assert found.attributes["domain"].names == ("math", "code")


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (
            ([1.0, 2.0, 3.0], [1.0, 2.0]),
            "row 2: .* several scores, here 3 beside 2 in 'score_rejec",
        ),
        (([1.0], [0.0]), "row 2: .* several scores, here 1 beside 1 in .*expected 3 and 3"),
        (
            ([1.0, 2.0, 3.0], None),
            "row 2: .* several scores, here 3 beside 0 in .*expected 3 and 3",
        ),
        (([1.0, 2.0, 3.0], ["a", "b", "c"]), "row 2: .*must hold a list of 3 numbers"),
        (([1.0, 2.0, 3.0], 2.0), "row 2: .*must hold a list of 3 numbers, .*holds '2'"),
    ],
)
def test_score_files_of_rm_bench_that_are_broken(tmp_path, scores, message):
    good = {"score_chosen": [1.0, 2.0, 3.0], "score_rejected": [2.0, 2.0, 2.0]}
    bad = dict(zip(good, scores, strict=True))
    with pytest.raises(DataError, match=message):
        load_scores(written(tmp_path, [good, bad]))


def test_score_files_of_reward_bench_2_say_which_answers(tmp_path):
    rows = [
        {"scores": [2.0, 1.0, 3.0, 0.0], "num_correct": 2},
        {"scores": None, "num_correct": 1},
        {"scores": [1.0, 0.0, 2.0], "num_correct": 1},
    ]
    found = load_scores(written(tmp_path, rows), max_nan=0.5)
    assert found.margin.tolist() == [-1, 2, -2, 1, 1, -1] and found.dropped == 1
    assert found.answers[0].tolist() == [0, 0, 1, 1, 0, 0]
    assert found.answers[1].tolist() == [2, 3, 2, 3, 1, 2]
    assert {"chosen_style", "rejected_style"}.isdisjoint(found.attributes)


def test_answers_are_not_known_where_a_pair_of_the_prompt_was_lost(tmp_path):
    rows = [
        {"scores": [2.0, float("nan"), 3.0], "num_correct": 1},
        {"scores": [1.0, 0.0, 2.0], "num_correct": 1},
    ]
    found = load_scores(written(tmp_path, rows), max_nan=0.5)
    assert found.margin.tolist() == [-1, 1, -1]
    assert found.answers[0].tolist() == [-1, 0, 0] and found.answers[1].tolist() == [-1, 1, 2]


def test_columns_of_answers_that_name_none(tmp_path):
    rows = [{"margin": 1.0 - i % 3, "chosen_answer": f"t{i % 2}"} for i in range(6)]
    found = load_scores(written(tmp_path, rows))
    assert found.answers is None and not found.attributes
    assert "no column 'rejected_answer'" in found.ignored["chosen_answer"]
    both = load_scores(written(tmp_path, [row | {"rejected_answer": "u"} for row in rows]))
    assert both.answers is None and "of type string" in both.ignored["rejected_answer"]
