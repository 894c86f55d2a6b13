"""Preference files: all good formats are read alike, bad ones refused with file and line."""

from __future__ import annotations

import csv
import json
import logging
from decimal import Decimal
from pathlib import Path

import datasets
import pytest

from drrlhf.data import DataError, load_preference_data, load_prompt_data

STANDARD = [
    {"prompt": "Name a colour.", "chosen": "Blue — my pick.", "rejected": "Seven."},
    {"prompt": "Name a tree.", "chosen": "An oak,\nan old one.", "rejected": 'A "spoon".'},
    {"prompt": "Name a city.", "chosen": "Lima.", "rejected": "Soup."},
]
EXTRAS = [
    {"group": "news", "margin": 0.5, "weight": 1, "p_chosen": 0.75},
    {"group": "chat", "margin": -1, "weight": 0, "p_chosen": 1},
    {"group": "news", "margin": 2.0, "weight": 0.25, "p_chosen": 0},
]


def message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONAL = [
    {
        "prompt": [message("user", row["prompt"])],
        "chosen": [message("assistant", row["chosen"])],
        "rejected": [message("assistant", row["rejected"])],
    }
    for row in STANDARD
]
IMPLICIT = [
    {key: row["prompt"] + row[key] for key in ("chosen", "rejected")} for row in CONVERSATIONAL
]


def write(path: Path, rows: list) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, indent=1, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".parquet":
        datasets.Dataset.from_list(rows).to_parquet(str(path))
    else:
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
    return path


def lines(path: Path, *texts: str | bytes) -> Path:
    path.write_bytes(b"".join((t if isinstance(t, bytes) else t.encode()) + b"\n" for t in texts))
    return path


GOOD = json.dumps({"chosen": "yes", "rejected": "no"})


# ---- what is read --------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet", ".csv"])
def test_every_format_gives_the_same_rows_and_columns(tmp_path, suffix):
    rows = [a | b for a, b in zip(STANDARD, EXTRAS, strict=True)]
    data = load_preference_data(write(tmp_path / f"pairs{suffix}", rows))
    assert data.group_names == ["chat", "news"]
    assert data.dataset["group"][:] == [1, 0, 1]
    assert data.dataset["margin"][:] == [0.5, -1.0, 2.0]
    assert data.dataset["weight"][:] == [1.0, 0.0, 0.25]
    assert data.dataset["p_chosen"][:] == [0.75, 1.0, 0.0]
    assert data.dataset.features["group"].dtype == "int64"
    assert data.dataset.features["weight"].dtype == "float64"
    for key in ("prompt", "chosen", "rejected"):
        assert data.dataset[key][:] == [row[key] for row in STANDARD]


@pytest.mark.parametrize("rows", [CONVERSATIONAL, IMPLICIT], ids=["explicit", "implicit"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_conversations_are_read_as_they_are(tmp_path, suffix, rows):
    data = load_preference_data(write(tmp_path / f"pairs{suffix}", rows), kind="dpo")
    assert data.group_names is None
    assert data.dataset.to_list() == [
        {k: rows[i][k] for k in data.dataset.features} for i in range(3)
    ]
    assert set(data.dataset.features) == set(rows[0])


def test_the_prompt_may_be_implicit_in_strings(tmp_path):
    data = load_preference_data(lines(tmp_path / "a.jsonl", GOOD, "", GOOD, "  "))
    assert data.dataset.to_list() == [json.loads(GOOD)] * 2


def test_trl_sees_the_format_it_expects(tmp_path):
    trl = pytest.importorskip("trl.data_utils")
    row = load_preference_data(write(tmp_path / "a.jsonl", IMPLICIT)).dataset[0]
    assert trl.is_conversational(row)
    assert trl.extract_prompt(row) == CONVERSATIONAL[0]


@pytest.mark.parametrize("saved", ["to_json", "save_to_disk"])
def test_a_local_data_set_folder(tmp_path, saved):
    rows = datasets.Dataset.from_list([a | b for a, b in zip(STANDARD, EXTRAS, strict=True)])
    if saved == "save_to_disk":
        datasets.DatasetDict(test=rows).save_to_disk(str(tmp_path / "d"))
    else:
        rows.to_json(str(tmp_path / "d" / "test.jsonl"))
    data = load_preference_data(tmp_path / "d", split="test")
    assert data.group_names == ["chat", "news"]
    assert data.dataset["chosen"][:] == [row["chosen"] for row in STANDARD]
    with pytest.raises(DataError, match="split 'train' could be loaded"):
        load_preference_data(tmp_path / "d")


def test_spaces_around_a_group_of_csv_make_no_other_group(tmp_path):
    path = tmp_path / "g.csv"
    path.write_text("chosen,rejected,group\na,b,maths\nc,d,maths \ne,f, a code\n")
    data = load_preference_data(path)
    assert data.group_names == ["a code", "maths"]
    assert data.dataset["group"][:] == [1, 1, 0]


def test_a_saved_data_set_without_splits_refuses_one(tmp_path):
    """Else ``--eval-split test`` would evaluate the training data."""
    rows = datasets.Dataset.from_list(STANDARD)
    rows.save_to_disk(str(tmp_path / "none"))
    datasets.DatasetDict(test=rows).save_to_disk(str(tmp_path / "several"))
    with pytest.raises(DataError, match=r"none: split='test' was asked for, .* has no splits"):
        load_preference_data(tmp_path / "none", split="test")
    assert len(load_preference_data(tmp_path / "none").dataset) == len(STANDARD)
    own = datasets.Dataset.from_list(STANDARD, split="test")
    own.save_to_disk(str(tmp_path / "own"))
    assert len(load_preference_data(tmp_path / "own", split="test").dataset) == len(STANDARD)


def test_a_folder_may_be_called_as_files_are(tmp_path):
    folder = tmp_path / "home" / "d.csv"
    rows = [row | {"group": g} for row, g in zip(STANDARD, [2, 0, 1], strict=True)]
    datasets.Dataset.from_list(rows).to_json(str(folder / "train.jsonl"))
    assert load_preference_data(folder).dataset["group"][:] == [2, 0, 1]


def test_integer_groups_keep_their_ids(tmp_path):
    for suffix in (".jsonl", ".csv", ".parquet"):
        rows = [row | {"group": g} for row, g in zip(STANDARD, [2, 0, 1], strict=True)]
        data = load_preference_data(write(tmp_path / f"g{suffix}", rows))
        assert data.dataset["group"][:] == [2, 0, 1]
        assert data.group_names is None


def test_evaluation_data_takes_the_training_groups(tmp_path):
    rows = [row | {"group": "news"} for row in STANDARD]
    path = write(tmp_path / "eval.jsonl", rows)
    assert load_preference_data(path).dataset["group"][:] == [0, 0, 0]
    data = load_preference_data(path, group_names=["chat", "news"])
    assert data.dataset["group"][:] == [1, 1, 1]
    with pytest.raises(DataError, match="line 1: 'group' must be one of chat, talk; got 'news'"):
        load_preference_data(path, group_names=["chat", "talk"])


def test_other_columns_are_left_out_and_named_once(tmp_path, caplog):
    rows = [row | {"source": "x", "id": 1} for row in CONVERSATIONAL]
    rows[1]["chosen"] = [rows[1]["chosen"][0] | {"date": "2024"}]
    with caplog.at_level(logging.INFO, logger="drrlhf.data"):
        data = load_preference_data(write(tmp_path / "a.jsonl", rows))
    assert set(data.dataset.features) == {"prompt", "chosen", "rejected"}
    assert set(data.dataset[1]["chosen"][0]) == {"role", "content"}
    assert [r.message.split(": ", 1)[1] for r in caplog.records] == [
        "columns left out: date (of messages), id, source"
    ]


def test_dpo_leaves_the_margin_out_and_says_so_once(tmp_path, caplog):
    rows = [row | {"margin": "none of DPO's business"} for row in STANDARD]
    path = write(tmp_path / "a.jsonl", rows)
    data = load_preference_data(path, kind="dpo")
    assert "margin" not in data.dataset.features
    assert [r.message for r in caplog.records] == [
        f"{path}: column 'margin' left out: DPO does not use a margin"
    ]
    with pytest.raises(DataError, match="line 1: 'margin' must be a finite number"):
        load_preference_data(path, kind="reward")


def test_identical_completions_are_counted_not_refused(tmp_path, caplog):
    same = json.dumps({"chosen": "a", "rejected": "a"})
    data = load_preference_data(lines(tmp_path / "a.jsonl", GOOD, same, same))
    assert len(data.dataset) == 3
    assert "in 2 of 3 rows 'chosen' equals 'rejected'" in caplog.text


def test_a_byte_order_mark_windows_lines_and_line_separators_are_no_trouble(tmp_path):
    text = json.dumps({"chosen": "a\u2028b", "rejected": "c"}, ensure_ascii=False)
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + f"{text}\r\n{text}\r\n".encode() + b"{")
    with pytest.raises(DataError, match="line 3: broken JSON"):
        load_preference_data(path)
    path = tmp_path / "a.csv"
    path.write_bytes(b'\xef\xbb\xbfchosen,rejected,margin\r\n"a\r\n\r\nb",c,1\r\nx,y,\r\n')
    with pytest.raises(DataError, match="line 5: no 'margin', but one in line 2"):
        load_preference_data(path)


def test_a_csv_cell_may_be_longer_than_the_csv_module_allows(tmp_path):
    limit = csv.field_size_limit()
    rows = [{"chosen": "long " * 40_000, "rejected": "short"}]
    data = load_preference_data(write(tmp_path / "a.csv", rows))
    assert data.dataset.to_list() == rows
    assert csv.field_size_limit() == limit


# ---- what is refused, and where ------------------------------------------------------------------


def bad(**change) -> str:
    row = {"chosen": "yes", "rejected": "no"} | change
    return json.dumps({k: v for k, v in row.items() if v != "absent"})


BAD_ROWS = {
    "missing column": (
        bad(rejected="absent", margin=1),
        "missing column 'rejected'; found: chosen, m",
    ),
    "null column": (bad(chosen=None), "missing column 'chosen'"),
    "what is needed": (bad(chosen="absent"), r"needed: chosen, rejected \(optional: prompt, group"),
    "empty": (bad(chosen=""), "'chosen' is empty"),
    "blank": (bad(rejected=" \n\t"), "'rejected' is empty"),
    "broken": ('{"chosen": "a", "rejected" "b"}', r"broken JSON: .*\(column \d+\)"),
    "cut off": ('{"chosen": "a", "rej', "broken JSON"),
    "not an object": ('["a", "b"]', "expected an object with chosen and rejected; got"),
    "a number": (bad(chosen=5), "'chosen' is of type int"),
    "mixed": (
        bad(chosen=[message("assistant", "a")]),
        "'chosen' is a list, but 'chosen' of line 1",
    ),
    "prompt of another format": (
        bad(prompt=[message("user", "a")]),
        "a 'prompt', but not in line 1",
    ),
    "written out": (bad(chosen=str([message("user", "a")])), "conversation written out as text"),
    "surrogate": ('{"chosen": "\\ud800", "rejected": "a"}', "'chosen' is not valid Unicode"),
    "bytes": (b'{"chosen": "\xff", "rejected": "a"}', "not UTF-8"),
    "new column": (bad(weight=1), "there is a 'weight', but not in line 1; give it in every row"),
}


@pytest.mark.parametrize(("line", "says"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_with_its_line(tmp_path, line, says):
    path = lines(tmp_path / "pairs.jsonl", GOOD, "", line, GOOD)
    with pytest.raises(DataError, match=rf"pairs\.jsonl: line 3: .*{says}"):
        load_preference_data(path)


BAD_VALUES = {
    "group below 0": ("group", 1, -1, "'group' must be an integer from 0 up"),
    "group 1.5": ("group", 1, 1.5, "got 1.5"),
    "group bool": ("group", 1, True, "got True"),
    "group name after ids": ("group", 1, "news", "got 'news'"),
    "group id after names": ("group", "news", 1, "'group' must be a name"),
    "group blank": ("group", "news", " ", "'group' must be a name"),
    "group absent": ("group", 1, None, "no 'group', but one in line 1"),
    "margin NaN": ("margin", 1, float("nan"), "'margin' must be a finite number; got nan"),
    "margin inf": ("margin", 1, float("inf"), "got inf"),
    "margin string": ("margin", 1, "1", "got '1'"),
    "margin bool": ("margin", 1, False, "got False"),
    "weight NaN": ("weight", 1, float("nan"), "'weight' must be a finite number >= 0; got nan"),
    "weight inf": ("weight", 1, float("inf"), "got inf"),
    "weight below 0": ("weight", 1, -0.1, "got -0.1"),
    "no probability": (
        "p_chosen",
        1,
        1.1,
        r"'p_chosen' must be a probability in \[0, 1\]; got 1.1",
    ),
    "prompt number": ("prompt", "Say.", 3, "'prompt' is of type int"),
}


@pytest.mark.parametrize(("key", "good", "value", "says"), BAD_VALUES.values(), ids=BAD_VALUES)
def test_a_bad_value_is_named_with_its_line(tmp_path, key, good, value, says):
    path = lines(tmp_path / "pairs.jsonl", bad(**{key: good}), bad(**{key: value}))
    with pytest.raises(DataError, match=rf"pairs\.jsonl: line 2: .*{says}"):
        load_preference_data(path)


BAD_MESSAGES = {
    "no message": ("chosen", [], "'chosen' is empty; a completion needs an assistant message"),
    "no assistant": ("chosen", [message("user", "hi")], "'chosen' is empty"),
    "blank": ("rejected", [message("assistant", " ")], "'rejected' is empty"),
    "no content": ("chosen", [{"role": "assistant"}], "every message must be .*got {'role'"),
    "parts": ("chosen", [{"role": "assistant", "content": [{}]}], "every message must be"),
    "strings": ("chosen", ["hi"], "every message must be .*got 'hi'"),
    "a string": ("rejected", "hi", "'rejected' is a string, but 'chosen' of line 1 is messages"),
    "an object": ("prompt", message("user", "hi"), "'prompt' must be a string or a list"),
    "empty prompt": ("prompt", [], "'prompt' holds no message"),
}


@pytest.mark.parametrize(("key", "value", "says"), BAD_MESSAGES.values(), ids=BAD_MESSAGES)
def test_a_bad_conversation_is_named_with_its_line(tmp_path, key, value, says):
    rows = [CONVERSATIONAL[0], CONVERSATIONAL[1] | {key: value}]
    with pytest.raises(DataError, match=rf"pairs\.jsonl: line 2: .*{says}"):
        load_preference_data(write(tmp_path / "pairs.jsonl", rows))


def test_bad_rows_of_an_array_are_named_with_their_line(tmp_path):
    path = lines(tmp_path / "a.json", "[", GOOD, ",", bad(chosen=""), "]")
    with pytest.raises(DataError, match=r"a\.json: line 4: 'chosen' is empty"):
        load_preference_data(path)
    path = lines(tmp_path / "a.json", "[", GOOD, GOOD, "]")
    with pytest.raises(DataError, match=r"a\.json: line 3: broken JSON"):
        load_preference_data(path)


def test_decimals_are_numbers(tmp_path):
    """Databases export them, as they keep what people typed."""
    rows = [{"chosen": "a", "rejected": "b", "weight": Decimal("0.25"), "p_chosen": Decimal("1")}]
    found = load_preference_data(write(tmp_path / "a.parquet", rows)).dataset[0]
    assert found["weight"] == 0.25 and found["p_chosen"] == 1
    rows[0]["p_chosen"] = Decimal("1.5")
    with pytest.raises(DataError, match="'p_chosen' must be a probability in"):
        load_preference_data(write(tmp_path / "b.parquet", rows))


def test_bad_rows_of_parquet_are_named_with_their_row(tmp_path):
    rows = [*STANDARD, {"prompt": "a", "chosen": "b", "rejected": " "}]
    with pytest.raises(DataError, match=r"a\.parquet: row 4: 'rejected' is empty"):
        load_preference_data(write(tmp_path / "a.parquet", rows))
    with pytest.raises(DataError, match=r"a\.parquet: cannot be read as Parquet"):
        load_preference_data(lines(tmp_path / "a.parquet", "no parquet"))


BAD_CSV = {
    "header": ("chosen,text", "a,b", "line 2: missing column 'rejected'; found: chosen, text"),
    "doubled": (
        "chosen,rejected,chosen",
        "a,b,c",
        "line 1: column 'chosen' is there more than once",
    ),
    "fields": ("chosen,rejected", "a,b,c", "line 4: 3 fields, but the header names 2 columns"),
    "quote": ("chosen,rejected", 'a,"b', "line 4: broken CSV"),
    "empty": ("chosen,rejected", ",b", "line 4: 'chosen' is empty"),
    "group": ("chosen,rejected,group", "a,b,1.5", "line 4: 'group' must be an integer .*got 1.5"),
    "margin": ("chosen,rejected,margin", "a,b,nan", "line 4: 'margin' must be a finite .*got nan"),
    "weight": ("chosen,rejected,weight", "a,b,much", "line 4: 'weight' must be .*got 'much'"),
}


@pytest.mark.parametrize(("header", "row", "says"), BAD_CSV.values(), ids=BAD_CSV)
def test_bad_csv_is_named_with_its_line(tmp_path, header, row, says):
    good = '"two\nlines",b' + ",1" * (header.count(",") - 1)  # lines 2 and 3
    with pytest.raises(DataError, match=rf"a\.csv: {says}"):
        load_preference_data(lines(tmp_path / "a.csv", header, good, row))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b""),
        ("a.jsonl", b"\n\n"),
        ("a.json", b"[]"),
        ("a.csv", b""),
        ("a.csv", b"chosen,rejected\n"),
    ],
)
def test_an_empty_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=rf"{name}: empty; expected rows with chosen and rejected"):
        load_preference_data(tmp_path / name)


def test_weights_that_are_all_zero_are_refused(tmp_path):
    path = lines(tmp_path / "a.jsonl", bad(weight=0), bad(weight=0))
    with pytest.raises(DataError, match=r"a\.jsonl: every 'weight' is 0"):
        load_preference_data(path)


def test_a_missing_file_and_an_unknown_suffix_are_refused(tmp_path):
    for name in ("pairs.jsonl", "pairs.parquet", "folder/pairs"):
        with pytest.raises(DataError, match=f"{name}: no such file"):
            load_preference_data(tmp_path / name)
    with pytest.raises(
        DataError, match=r"pairs\.txt: unknown suffix '.txt'; expected one of .jsonl"
    ):
        load_preference_data(lines(tmp_path / "pairs.txt", GOOD))


def test_a_data_set_that_cannot_be_loaded_is_a_data_error(monkeypatch):
    def offline(name, split):
        raise ConnectionError("could not reach the hub")

    monkeypatch.setattr(datasets, "load_dataset", offline)
    with pytest.raises(DataError, match=r"some/pairs: neither a data file here .*reach the hub"):
        load_preference_data("some/pairs")


def test_a_data_set_name_is_loaded_by_its_split(monkeypatch):
    def load(name, split):
        return (
            datasets.Dataset.from_list(STANDARD)
            if (name, split) == ("some/pairs", "test")
            else None
        )

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert load_preference_data("some/pairs", split="test").dataset["prompt"][0] == "Name a colour."


def test_arguments_that_make_no_sense_are_refused(tmp_path):
    path = lines(tmp_path / "a.jsonl", GOOD)
    with pytest.raises(ValueError, match="kind must be one of reward, dpo; got 'ppo'"):
        load_preference_data(path, kind="ppo")
    with pytest.raises(DataError, match="split='test' was asked for, but a file holds one split"):
        load_preference_data(path, split="test")


def test_other_forms_of_a_text_are_kept_and_checked(tmp_path):
    path = tmp_path / "d.jsonl"
    rows = [
        {"chosen": "a", "rejected": "b", "chosen@long": "aa"},
        {"chosen": "c", "rejected": "d", "rejected@long": "dd", "note": "x"},
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    found = load_preference_data(path).dataset
    assert found["chosen@long"][:] == ["aa", None] and found["rejected@long"][:] == [None, "dd"]
    assert "note" not in found.column_names
    path.write_text("\n".join(map(json.dumps, [*rows, rows[0] | {"chosen@long": 3}])))
    with pytest.raises(DataError, match=r"line 3: 'chosen@long'"):
        load_preference_data(path)
    path.write_text("\n".join(map(json.dumps, [rows[0] | {"chosen@long": " "}])))
    with pytest.raises(DataError, match=r"line 1: 'chosen@long' is empty"):
        load_preference_data(path)


@pytest.mark.parametrize("value", [5, ["a"], "", "  ", [{"role": "user", "content": "a"}]])
@pytest.mark.parametrize("key", ["chosen@para", "rejected@para", "prompt@para"])
def test_other_forms_are_checked_where_all_columns_are_kept(tmp_path, key, value):
    path, row = tmp_path / "d.jsonl", {"prompt": "p", "chosen": "a", "rejected": "b"}
    path.write_text(json.dumps(row | {"note": "x"}) + "\n" + json.dumps(row | {key: value}))
    with pytest.raises(DataError, match=f"line 2: '{key}'"):
        load_preference_data(path, keep_columns=True)
    path.write_text("".join(json.dumps({"prompt": "p", key: one}) + "\n" for one in (None, value)))
    if key == "prompt@para":
        with pytest.raises(DataError, match=f"line 2: '{key}'"):
            load_prompt_data(path)
    else:  # of another kind of data: the reward function may take it
        assert load_prompt_data(path).dataset[key][1] == value


def test_the_prompt_is_taken_out_of_other_forms_too(tmp_path):
    def said(*texts):
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]

    path = tmp_path / "d.jsonl"
    row = {"prompt": "q", "chosen": said("q", "a"), "rejected": said("q", "b")}
    path.write_text(json.dumps(row | {"chosen@long": said("q", "aa")}))
    found = load_preference_data(path).dataset[0]
    assert found["chosen"] == said("q", "a")[1:] and found["chosen@long"] == said("q", "aa")[1:]
    path.write_text(json.dumps(row | {"chosen@long": said("other", "aa")}))
    with pytest.raises(DataError, match="'chosen@long' does not begin with the prompt"):
        load_preference_data(path)
