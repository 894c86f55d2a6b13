"""Groups as data name them: codes, text and classes in the trainers, from batch to checkpoint."""

from __future__ import annotations

import pytest

from trl_fixtures import (  # isort: skip  (first: it settles the environment)
    quiet,
    tiny_llama_dir,
    tiny_pairs,
    tiny_tokenizer,
)

import pyarrow as pa
import torch
from datasets import ClassLabel, Dataset, concatenate_datasets
from steps import trainer as built

from drrlhf.groups import Groups, from_data, named, of_values, with_count
from drrlhf.trl import DPOConfig, DPOTrainer, columns

CODES = [20240115, 7, 20240115, 300]
NUMBERS = [2, 0, 2, 1]  # of CODES, in the order of their values
NAMES = ["tweets", "news", "tweets", "q/a"]  # sorted: news, q/a, tweets


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return str(tiny_llama_dir(tmp_path_factory.mktemp("groups")))


def dpo(model, folder, groups, evaluation=None, **options):
    data = groups if hasattr(groups, "column_names") else tiny_pairs(len(groups), group=groups)
    return DPOTrainer(
        model=model,
        args=DPOConfig(str(folder), **quiet(**{"max_steps": 2, **options})),
        train_dataset=data,
        eval_dataset=evaluation,
        processing_class=tiny_tokenizer(),
    )


def classes(groups, names, n=None):
    numbers = [names.index(group) for group in groups]
    return tiny_pairs(n or len(groups), group=numbers).cast_column("group", ClassLabel(names=names))


def test_a_column_of_large_ids_trains_without_a_set(llama, tmp_path):
    """Ids of 64 bits: torch has no such integers, and processes tell each other doubles."""
    ids = Dataset(pa.table({"group": pa.array([2**63 + 5, 2**53, 2**53 + 1, 2**53], pa.uint64())}))
    trainer = dpo(llama, tmp_path, concatenate_datasets([tiny_pairs(4), ids], axis=1), max_steps=1)
    trainer.train()
    numbers = columns.group_numbers([*ids["group"], 3, -7, "a", None], None)
    assert numbers[4:] == [3, columns.NO_GROUP, columns.NO_GROUP, columns.NO_GROUP]
    told = torch.tensor(numbers).double()
    assert len(told.unique()) == 5 and told[1] == told[3] and (told[:4] >= 0).all()


# ---- what a value is called and numbered ---------------------------------------------------------


def test_values_are_numbered_in_their_order():
    assert of_values(CODES) == Groups(3, ("7", "300", "20240115"))
    assert of_values(NAMES) == Groups(3, ("news", "q/a", "tweets"))
    assert of_values([1, 0, 2, 1]) == of_values([2.0, 1.0, 0.0]) == Groups(3)
    assert of_values(["1b", "1"]).names == ("1", "1b")
    assert of_values([2**70, 0]).names == ("0", str(2**70))
    assert [of_values(CODES).number(code) for code in CODES] == NUMBERS
    assert of_values(CODES).number("300") == of_values(CODES).number(300.0) == 1


BAD = {
    "'a'": [0, "a"],
    "0": ["a", 0],
    "True": [0, True],
    "None": [0, None],
    "' '": ["a", " "],
    "-1": [-1, 0],
    "0.5": [0.5],
    "nan": [float("nan")],
    "inf": [float("inf")],
}


@pytest.mark.parametrize("held, values", BAD.items(), ids=list(BAD))
def test_what_names_no_group(held, values):
    with pytest.raises(ValueError, match=f"holds {held}: expected"):
        of_values(values)


def test_integers_are_numbers_or_names():
    with pytest.raises(ValueError, match=r"expected one of the groups 7, 300, 20240115"):
        of_values(CODES).number(0)
    assert named(["b", "a"], encoded=True).number(0) == 0
    assert named(["b", "a"], encoded=True).number("a") == 1
    assert named(["0", "1"]) == Groups(2) and named(["1", "0"]).names == ("1", "0")
    assert Groups(2, ("b", "a")).label(1) == "a" and Groups(2).label(1) == "1"


def test_text_that_is_a_number_of_groups_without_names():
    """A column of text "0", "1", ... has numbers for names, and stays text."""
    groups = of_values(["1", "0", "0"])
    assert (
        [groups.number(text) for text in ("0", "1")] == [0, 1] == [groups.number(i) for i in (0, 1)]
    )
    for other in ("2", "01", "-1", "1.0", " 1", "one", "9" * 5000):  # no group of that column
        with pytest.raises(ValueError, match=r"expected an integer in \[0, 2\)"):
            groups.number(other)
    with pytest.raises(ValueError, match="expected one of the groups None, a"):
        of_values(["a", "None"]).number(0.5)


def test_a_set_without_its_number_of_groups():
    for bare in ("group", " Group ", "group:step_size=0.5", "group:trim=0.1,step_size=1"):
        assert from_data(bare), bare
    for counted in ("group:3", "group:3,step_size=1", "group:num_groups=3", "tv:0.1", 3):
        assert not from_data(counted), counted
    assert str(with_count("group:step_size=0.5", 4)) == "group:4,step_size=0.5"
    with pytest.raises(ValueError, match="unknown key 'stepsize'"):
        DPOConfig("out", **quiet(ambiguity="group:stepsize=0.5"))


# ---- in the trainers -----------------------------------------------------------------------------


@pytest.mark.parametrize("kind, given", [("dpo", "codes"), ("reward", "text"), ("grpo", "classes")])
def test_named_groups_train_as_their_numbers_do(llama, tmp_path, kind, given):
    """The numbers were written by hand above; only what the metrics call a group differs."""
    values, names = {
        "codes": (CODES, ["7", "300", "20240115"]),
        "text": (NAMES, ["news", "q/a", "tweets"]),
        "classes": (NAMES, ["news", "q/a", "tweets"]),
    }[given]
    data = classes(NAMES * 2, names) if given == "classes" else tiny_pairs(8, group=values * 2)
    plain = tiny_pairs(8, group=NUMBERS * 2)
    logs, states = [], []
    for part, set_, one in (
        ("plain", "group:3,step_size=0.5", plain),
        ("named", "group:step_size=0.5", data),
    ):
        trained = built(
            kind, llama, str(tmp_path / part), one, ambiguity=set_, per_device_train_batch_size=8
        )
        trained.train()
        logs.append(
            {k: v for k, v in trained.state.log_history[0].items() if k.startswith("group/")}
        )
        states.append(trained.group_state.weights)
    assert (
        torch.equal(*states)
        and len(states[0]) == 3
        and not torch.equal(states[0], torch.full((3,), 1 / 3, dtype=torch.float64))
    )
    renamed = {}
    for name, value in logs[0].items():
        _, number, metric = name.split("/")
        renamed[f"group/{names[int(number)]}/{metric}"] = value
    assert logs[1] == renamed and len(renamed) >= 7


def test_evaluation_is_numbered_as_the_training_data(llama, tmp_path):
    unknown = tiny_pairs(4, seed=1, group=[7, 7, 300, 8])
    with pytest.raises(ValueError, match="eval_dataset holds 8: expected one of the groups 7, 300"):
        dpo(llama, tmp_path, CODES, unknown, ambiguity="group")
    held_out = tiny_pairs(4, seed=1, group=[300, 300, 7, 300])
    trainer = dpo(llama, tmp_path, CODES, held_out, ambiguity="group:3")
    found = {name.split("/")[1] for name in trainer.evaluate() if name.startswith("eval_group/")}
    assert found == {"7", "300"}
    with pytest.raises(ValueError, match="'group' holds 8: expected one of the groups"):
        trainer.evaluate(unknown)


def test_classes_name_the_metrics_of_any_set_and_agree_between_datasets(llama, tmp_path):
    data = classes(NAMES, ["tweets", "news", "q/a"])
    other = classes(NAMES, ["news", "q/a", "tweets"])
    with pytest.raises(
        ValueError, match=r"numbers the groups news, q/a, tweets.*tweets, news, q/a"
    ):
        dpo(llama, tmp_path, data, other, ambiguity="tv:0.1")
    trainer = dpo(llama, tmp_path, data, data, ambiguity="tv:0.1")
    assert "eval_group/q/a/loss" in trainer.evaluate()
    with pytest.raises(ValueError, match="cast it with cast_column"):
        trainer.evaluate(other)


def test_streamed_groups(llama, tmp_path):
    streamed = tiny_pairs(8, group=NAMES * 2).to_iterable_dataset()
    with pytest.raises(ValueError, match=r"train_dataset is streamed.*ambiguity='group:4'"):
        dpo(llama, tmp_path, streamed, ambiguity="group")
    with pytest.raises(
        ValueError, match=r"'group' holds 'tweets': expected an integer in \[0, 3\)"
    ):
        dpo(llama, tmp_path, streamed, ambiguity="group:3").train()
    labelled = classes(NAMES * 2, ["news", "q/a", "tweets"]).to_iterable_dataset()
    trainer = dpo(llama, tmp_path, labelled, ambiguity="group")
    trainer.train()
    assert trainer.group_state.weights.shape == (3,)
    assert "group/news/state" in trainer.state.log_history[0]


def test_a_checkpoint_knows_its_groups(llama, tmp_path):
    options = {"ambiguity": "group", "save_strategy": "steps", "save_steps": 1}
    whole = dpo(llama, tmp_path / "a", CODES, **options)
    whole.train()
    checkpoint = str(tmp_path / "a/checkpoint-1")
    same = dpo(llama, tmp_path / "b", CODES, **options)
    same.train(resume_from_checkpoint=checkpoint)
    assert torch.equal(same.group_state.weights, whole.group_state.weights)
    for other in ([20240115, 7, 20240115, 301], NUMBERS):
        with pytest.raises(ValueError, match=r"groups are .*300.*: the kept weights"):
            dpo(llama, tmp_path / "c", other, **options).train(resume_from_checkpoint=checkpoint)


def test_pass_rates_need_a_number_of_groups(llama, tmp_path):
    with pytest.raises(ValueError, match="write how many, as in 'group:4'"):
        built("grpo", llama, str(tmp_path), ambiguity="group", group_by="pass_rate")


@pytest.mark.parametrize("kind", ["dpo", "reward", "grpo"])
def test_without_a_set_of_groups_a_pair_may_have_none(llama, tmp_path, kind):
    """Every batch tells of groups or none does: processes wait for each other there."""
    data = tiny_pairs(16, group=[0, 1, None, 1] * 4)
    options = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 4}
    trainer = built(kind, llama, str(tmp_path), data, ambiguity="cvar:0.9", max_steps=4, **options)
    trainer.train()
    logs = [log for log in trainer.state.log_history if "loss" in log]
    assert len(logs) == 4
    for log in logs:
        found = {name.split("/")[1] for name in log if name.startswith("group/")}
        assert found and found <= {"0", "1"}


def test_what_a_batch_has_does_not_depend_on_its_rows(llama, tmp_path):
    some = dpo(llama, tmp_path, [0, None, 1, None])
    rows = list(some.train_dataset)
    assert [some.data_collator([row])["group"].tolist() for row in rows] == [[0], [-1], [1], [-1]]
    texts = dpo(llama, tmp_path, NAMES)
    assert "group" not in texts.data_collator(list(texts.train_dataset))
