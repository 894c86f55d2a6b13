"""Forms of preference data: groups of all kinds, tools, conversations that hold their prompt."""

from __future__ import annotations

import json
import logging

import pytest

pytest.importorskip("trl")
from trl_fixtures import (  # isort: skip  (first: it settles the environment)
    quiet,
    tiny_llama_dir,
    tiny_reward_dir,
    tiny_tokenizer,
)

from datasets import ClassLabel, Dataset, DatasetDict
from test_data import message, write
from trl.data_utils import extract_prompt

from drrlhf.data import DataError, load_preference_data, load_prompt_data
from drrlhf.stress import load_judge
from drrlhf.trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer

# ---- groups --------------------------------------------------------------------------------------


def grouped(tmp_path, suffix, groups, **options):
    rows = [{"chosen": "a", "rejected": "b", "group": group} for group in groups]
    data = load_preference_data(write(tmp_path / f"g{suffix}", rows), **options)
    return data.dataset["group"][:], data.group_names


@pytest.mark.parametrize("suffix", [".jsonl", ".csv", ".parquet"])
def test_codes_are_numbered_in_their_order(tmp_path, suffix):
    assert grouped(tmp_path, suffix, [20240115, 7, 20240115]) == ([1, 0, 1], ["7", "20240115"])
    assert grouped(tmp_path, suffix, [5, 0]) == ([1, 0], ["0", "5"])
    assert grouped(tmp_path, suffix, [10, 9, 11]) == ([1, 0, 2], ["9", "10", "11"])
    assert grouped(tmp_path, suffix, [1, 0, 1]) == ([1, 0, 1], None)


def test_cells_of_csv_are_numbers_only_where_all_are(tmp_path):
    def csv(*groups):
        return grouped(tmp_path, ".csv", groups)

    assert csv("1", "1b") == ([0, 1], ["1", "1b"])
    assert csv("1.0", "0.0", "0") == ([1, 0, 0], None)
    assert csv("00501", "501") == ([0, 1], ["00501", "501"])
    assert csv(2**53, 2**53 + 1) == ([0, 1], [str(2**53), str(2**53 + 1)])
    with pytest.raises(DataError, match=r"line 3: 'group' must be an integer from 0 up.*got -1"):
        csv("0", "-1")
    with pytest.raises(DataError, match="line 3: no 'group', but one in line 2"):
        csv("0", " ")


def test_columns_of_csv_that_are_kept_are_numbers_where_all_cells_are(tmp_path):
    cells = {
        "length": ("10", "9.5", ""),
        "chosen_answer": ("0", "1", "2"),
        "seen": ("true", "false", "true"),
        "zip": ("00501", "501", "502"),
        "level": ("1", "2", "high"),
        "question_id": ("1.10", "1.1", "2"),
        "chosen@long": ("1", "2", "3"),
        "group": ("4", "5", "4"),
    }
    rows = [dict(zip(cells, row, strict=True)) for row in zip(*cells.values(), strict=True)]
    path = write(tmp_path / "p.csv", [{"chosen": "a", "rejected": "b"} | row for row in rows])
    found = load_preference_data(path, keep_columns=True)
    kept = {name: found.dataset[name][:] for name in cells if name != "group"}
    numbers = {"length": [10.0, 9.5, None], "chosen_answer": [0, 1, 2], "seen": [True, False, True]}
    names = ("zip", "level", "question_id", "chosen@long")
    assert kept == numbers | {name: [*cells[name]] for name in names}
    assert found.group_names == ["4", "5"]
    # A reward function is given the cells: an answer to compare with is text.
    prompts = load_prompt_data(write(tmp_path / "q.csv", [{"prompt": "a"} | row for row in rows]))
    assert prompts.dataset["length"][:] == ["10", "9.5", None]


def test_codes_beyond_64_bits_are_names_like_others(tmp_path):
    assert grouped(tmp_path, ".jsonl", [2**70, 3]) == ([1, 0], ["3", str(2**70)])


def test_evaluation_data_takes_the_names_or_adds_to_them(tmp_path):
    names = ["7", "20240115"]
    for suffix in (".csv", ".parquet"):
        assert grouped(tmp_path, suffix, [20240115], group_names=names) == ([1], names)
        with pytest.raises(DataError, match=r"'group' must be one of 7, 20240115; got 0"):
            grouped(tmp_path, suffix, [7, 0], group_names=names)
        found = grouped(tmp_path, suffix, [7, 0], group_names=names, new_groups=True)
        assert found == ([0, 2], [*names, "0"])
    with pytest.raises(DataError, match=r"'group' must be one of 0, 1; got 2"):
        grouped(tmp_path, ".jsonl", [1, 2], group_names=["0", "1"])


def test_classes_of_a_data_set_keep_their_names(tmp_path):
    rows = Dataset.from_dict({"chosen": ["a", "b"], "rejected": ["c", "d"], "group": [1, 0]})
    named = rows.cast_column("group", ClassLabel(names=["tweets", "news"]))
    DatasetDict(train=named).save_to_disk(str(tmp_path / "d"))
    data = load_preference_data(tmp_path / "d")
    assert [data.group_names[g] for g in data.dataset["group"][:]] == ["news", "tweets"]
    assert data.dataset.features["group"].names == data.group_names == ["news", "tweets"]


def test_a_row_without_a_class_is_not_of_the_last_one(tmp_path):
    rows = Dataset.from_dict({"chosen": ["a", "b"], "rejected": ["c", "d"], "group": [0, -1]})
    rows.cast_column("group", ClassLabel(names=["x", "y"])).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match="row 2: no 'group', but one in row 1"):
        load_preference_data(tmp_path / "d")


# ---- tools ---------------------------------------------------------------------------------------

TEMPLATE = (
    "{% if tools %}<|system|> {{ tools | tojson }} <eos> {% endif %}{{ style }}"
    "{% for m in messages %}<|{{ m.role }}|> "
    "{% for key in ['content', 'tool_calls', 'name', 'tool_call_id'] if key in m %}"
    "{{ key }} {{ m[key] | tojson }} {% endfor %}"
    "<eos> {% endfor %}{% if add_generation_prompt %}<|assistant|> {% endif %}"
)


def tool(name, **properties):
    parameters = {"type": "object", "properties": {k: {"type": v} for k, v in properties.items()}}
    return {"type": "function", "function": {"name": name, "parameters": parameters}}


def call(name, **arguments):
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


# No two calls or schemas have the same keys, and only some messages and rows have any.
ROWS = [
    {
        "prompt": [
            message("user", "how was the film"),
            {"role": "assistant", "content": None, "tool_calls": [call("find", film="w1", year=1)]},
            {"role": "tool", "content": "great", "name": "find", "tool_call_id": "c1"},
        ],
        "chosen": [message("assistant", "really great")],
        "rejected": [message("assistant", "not good")],
        "tools": [tool("find", film="string", year="integer")],
        "chat_template_kwargs": {"style": "w5 "},
    },
    {
        "prompt": [message("user", "the book")],
        "chosen": [
            {"role": "assistant", "content": "yes", "tool_calls": [call("look", book="w2")]}
        ],
        "rejected": [{"role": "assistant", "content": "", "tool_calls": [call("find", book="w3")]}],
        "tools": [tool("look", book="string"), tool("find")],
    },
    {
        "prompt": [message("user", "so")],
        "chosen": [message("assistant", "do we")],
        "rejected": [message("assistant", "do i")],
    },
]


def tokenizer():
    found = tiny_tokenizer()
    found.chat_template = TEMPLATE
    # words alone, so that what differs in the text differs in the tokens
    found.add_tokens(
        sorted({w for texts in rendered(found).values() for t in texts for w in t.split()})
    )
    return found


def rendered(tokens):
    """The texts of ROWS, straight from the template."""

    def render(row, messages, **more):
        return tokens.apply_chat_template(
            messages,
            tools=row.get("tools"),
            tokenize=False,
            **row.get("chat_template_kwargs", {}),
            **more,
        )

    return {
        side: [render(row, row["prompt"] + row[side]) for row in ROWS]
        for side in ("chosen", "rejected")
    } | {"prompt": [render(row, row["prompt"], add_generation_prompt=True) for row in ROWS]}


def as_file(tmp_path, form):
    if form == "tools as text":
        rows = [
            row | {"tools": json.dumps(row["tools"])} if "tools" in row else row for row in ROWS
        ]
        return write(tmp_path / "pairs.jsonl", rows)
    if form == "json features":
        data = Dataset.from_list(ROWS, on_mixed_types="use_json")
        DatasetDict(train=data).save_to_disk(str(tmp_path / "pairs"))
        return tmp_path / "pairs"
    return write(tmp_path / f"pairs{form}", ROWS)


@pytest.mark.parametrize("form", [".jsonl", ".json", ".parquet", "tools as text", "json features"])
def test_trainers_and_judges_see_tools_calls_and_arguments(tmp_path, form):
    tokens = tokenizer()
    expected = {
        side: [tokens(text)["input_ids"] for text in texts]
        for side, texts in rendered(tokens).items()
    }
    data = load_preference_data(as_file(tmp_path, form), kind="dpo").dataset
    options = quiet(max_length=None)
    dpo = DPOTrainer(
        model=str(tiny_llama_dir(tmp_path)),
        args=DPOConfig(str(tmp_path / "d"), **options),
        train_dataset=data,
        processing_class=tokens,
    ).train_dataset
    assert dpo["prompt_ids"][:] == expected["prompt"]
    for side in ("chosen", "rejected"):
        whole = [p + a for p, a in zip(dpo["prompt_ids"], dpo[f"{side}_ids"], strict=True)]
        assert whole == expected[side]
    reward = RewardTrainer(
        model=str(tiny_reward_dir(tmp_path)),
        args=RewardConfig(str(tmp_path / "r"), **options),
        train_dataset=data,
        processing_class=tokens,
    ).train_dataset
    assert reward["chosen_ids"][:] == expected["chosen"]
    tokens.save_pretrained(tmp_path / "tiny-reward")
    judge = load_judge(tmp_path / "tiny-reward")
    for row, chosen, rejected in zip(data, expected["chosen"], expected["rejected"], strict=True):
        texts = judge._texts(row)
        assert [list(text.ids) for text in texts] == [chosen, rejected]


BAD = {
    "tools no list": ({"tools": {"a": 1}}, "'tools' must be a list of tools' schemas"),
    "tools no json": ({"tools": "[{"}, r"'tools' must be a list .* got '\[\{'"),
    "kwargs": ({"chat_template_kwargs": [1]}, "'chat_template_kwargs' must be an object"),
    "null": ({"prompt": [{"role": "user", "content": None}]}, "content null beside tool_calls"),
    "calls": (
        {"prompt": [{"role": "user", "content": "a", "tool_calls": "add"}]},
        "tool_calls must be a list; got 'add'",
    ),
    "surrogate": ({"tools": '[{"a": "\\ud83d"}]'}, "'tools' is not valid Unicode"),
}


@pytest.mark.parametrize("more, says", BAD.values(), ids=list(BAD))
def test_bad_tools_are_named_with_their_line(tmp_path, more, says):
    path = write(tmp_path / "a.jsonl", [ROWS[2], ROWS[2] | more])
    with pytest.raises(DataError, match=f"line 2: .*{says}"):
        load_preference_data(path)


def test_tools_of_prompts_go_to_the_reward_alone_and_that_is_said(tmp_path, caplog):
    rows = [{"prompt": row["prompt"], "tools": json.dumps([tool("find")])} for row in ROWS]
    with caplog.at_level(logging.WARNING, logger="drrlhf.data"):
        data = load_prompt_data(write(tmp_path / "a.jsonl", rows)).dataset
    assert data["prompt"][:] == [row["prompt"] for row in rows] and "tools" in data.column_names
    assert "GRPO writes prompts without it" in caplog.text


# ---- conversations that hold their prompt --------------------------------------------------------


def test_a_string_prompt_beside_whole_conversations_is_read_as_trl_reads_them(tmp_path):
    first = [message("system", "s"), message("user", "q"), message("assistant", "a")]
    asked = message("user", "again")
    pair = [message("assistant", "x")], [message("assistant", "y")]
    wholes = [
        ([message("user", "q"), *c], [message("user", "q"), *r]) for c, r in (pair, pair[:1] * 2)
    ]
    wholes.append(([*first, asked, *pair[0]], [*first, asked, *pair[1]]))
    rows = [{"prompt": "q", "chosen": c, "rejected": r} for c, r in wholes]
    data = load_preference_data(write(tmp_path / "u.jsonl", rows)).dataset
    for row, (chosen, rejected) in zip(data, wholes, strict=True):
        assert row == extract_prompt({"chosen": chosen, "rejected": rejected})
    other = rows[0] | {"prompt": "another"}
    with pytest.raises(DataError, match=r"line 2: 'prompt' is a string beside messages.*'another'"):
        load_preference_data(write(tmp_path / "v.jsonl", [rows[0], other]))
