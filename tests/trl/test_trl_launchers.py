"""Two ranks that a launcher started, beside one process: their steps, and their checkpoints.

A start of two processes that import trl takes some fifteen seconds of a core: what the tests here
ask of torchrun goes into one.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("trl")

from trl_fixtures import tiny_llama_dir, tiny_pairs, tiny_reward_dir  # isort: skip

import steps
import torch
from safetensors.torch import load_file
from test_resume import SAVED
from test_trl_grpo import robust
from test_trl_step import WHOLE, assert_same_step, columns

SUPPORT = Path(__file__).parents[1] / "support"
LAUNCHERS = {
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"],
    # its way of starting several processes on one machine, GPUs or not
    "accelerate": [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes=2",
        "--num_machines=1",
        "--mixed_precision=no",
        "--dynamo_backend=no",
        "--main_process_port=0",
    ],
}


def launched(launcher, place, runs):
    """What `steps.outcome` gives for each of runs on each of two ranks."""
    torch.save({"runs": runs}, place / "arguments")
    command = [sys.executable, *LAUNCHERS[launcher], str(SUPPORT / "steps.py")]
    done = subprocess.run(
        [*command, str(place / "found"), str(place / "arguments")],
        capture_output=True,
        text=True,
        timeout=150,
        env=os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        check=False,
    )
    lines = [line for line in done.stderr.splitlines() if "Warning" not in line]
    assert done.returncode == 0, "\n".join(lines[-150:])
    return [torch.load(place / f"found.{rank}", weights_only=False) for rank in range(2)]


# What the tests ask: runs on two ranks, and what one process makes of the same.


def pairs(models, place, method, ambiguity, accumulation, packed):
    """A run of two steps of a paired loss."""
    arguments = {
        "method": method,
        "model": models[method],
        "folder": str(place / f"{method}-{ambiguity}"),
        "data": tiny_pairs(16, **columns(16)),
        "ambiguity": ambiguity,
        "max_steps": 2,
    }
    cut = {
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    arguments |= VIEWS if packed else {}
    return arguments | cut | {"padding_free": packed}, steps.run(**arguments, **WHOLE)


def completions(models, place, ambiguity, accumulation):
    """A run of two steps of GRPO."""
    arguments = {
        "method": "grpo",
        "model": models["grpo"],
        "folder": str(place / f"grpo-{ambiguity}"),
        "data": tiny_pairs(8, group=[0, 1] * 4),
        "max_steps": 2,
        "beta": 0.1,
        "ambiguity": ambiguity,
    }
    cut = {
        "per_device_train_batch_size": 4 // accumulation,
        "gradient_accumulation_steps": accumulation,
    }
    return arguments | cut, steps.run(**arguments, **WHOLE)


def resumed(models, place):
    """Runs by name in one process, saved after each of two steps; then on two ranks the same, and
    the second step of them again from the checkpoint of one process."""
    data = tiny_pairs(16, group=[0, 1, 2, 1] * 4)
    runs = {
        "group": {"method": "reward", "ambiguity": "group:3", "data": data},
        "weights": {"method": "dpo", "ambiguity": "erm", "data": tiny_pairs(16, weight=[1, 2] * 8)},
        "grpo": {"method": "grpo", "ambiguity": "tv:0.3", "data": data},
        "plain": {"method": "dpo", "ambiguity": "erm", "data": tiny_pairs(16)},
    }
    for name, run in runs.items():
        run |= {"model": models[run["method"]], "max_steps": 2, **SAVED}
        run |= {"per_device_train_batch_size": 8, "folder": str(place / f"{name}-one")}
    whole = {name: steps.run(**run) for name, run in runs.items()}
    two = [run | {"per_device_train_batch_size": 4} for run in runs.values()]
    first = [run | {"folder": run["folder"].replace("-one", "-two")} for run in two]
    again = [run | {"resume_from_checkpoint": f"{run['folder']}/checkpoint-1"} for run in two]
    again = [run | {"folder": str(place / "resumed")} for run in again]
    return runs, whole, first + again


def with_the_best(models, place):
    """A run at whose end the first of its checkpoints is loaded: the loss falls."""
    return {
        "method": "reward",
        "model": models["reward"],
        "folder": str(place / "best"),
        "data": tiny_pairs(8),
        "trainer_eval_dataset": tiny_pairs(8),
        "max_steps": 2,
        "per_device_train_batch_size": 4,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": True,
        "load_best_model_at_end": True,
        **SAVED,
    }


# What is drawn of a pair is the same on whatever rank it lies.
VIEWS = {"views": ["handle", "repeated", "prompt_preamble"], "views_scored": 0.75}
PAIRS = [("dpo", "cvar:0.3", 2, False), ("reward", "group:3,step_size=0.5", 2, True)]
COMPLETIONS = [("cvar:0.5", 1), ("group:2,step_size=0.5", 2)]


def models_in(place):
    llama = str(tiny_llama_dir(place))
    return {"dpo": llama, "grpo": llama, "reward": str(tiny_reward_dir(place))}


@pytest.fixture(scope="module")
def on_torchrun(tmp_path_factory):
    """Of all that is asked, what one process found, and what each rank did."""
    place = tmp_path_factory.mktemp("torchrun")
    models = models_in(place)
    cut, whole = zip(
        *(pairs(models, place, *one) for one in PAIRS),
        *(completions(models, place, *one) for one in COMPLETIONS),
        strict=True,
    )
    runs, saved, twice = resumed(models, place)
    best = with_the_best(models, place)
    ranks = launched("torchrun", place, [*cut, *twice, best])
    return SimpleNamespace(
        place=place,
        pairs=(whole[: len(PAIRS)], [rank[: len(PAIRS)] for rank in ranks]),
        completions=(whole[len(PAIRS) :], [rank[len(PAIRS) : len(cut)] for rank in ranks]),
        runs=runs,
        saved=saved,
        resumed=[rank[len(cut) + len(runs) : -1] for rank in ranks],
        best=[rank[-1]["parameters"] for rank in ranks],
    )


def assert_pairs_are(whole, ranks):
    for of_first, of_other, expected in zip(*ranks, whole, strict=True):
        for step in range(2):
            assert_same_step(of_first, expected, step)
            torch.testing.assert_close(
                of_other["gradients"][step], expected["gradients"][step], rtol=0, atol=1e-5
            )


def test_pairs_on_two_ranks_are_those_of_one_process(on_torchrun):
    assert_pairs_are(*on_torchrun.pairs)


def test_pairs_on_two_ranks_of_accelerate(tmp_path):
    run, whole = pairs(models_in(tmp_path), tmp_path, "dpo", "tv:0.2", 1, True)
    assert_pairs_are([whole], launched("accelerate", tmp_path, [run]))


def test_completions_on_two_ranks_are_those_of_one_process(on_torchrun):
    wholes, ranks = on_torchrun.completions
    for i, whole in enumerate(wholes):
        for rank in ranks:
            ours = rank[i]["gradients"]
            for mine, expected in zip(ours, whole["gradients"], strict=True):
                torch.testing.assert_close(mine, expected, rtol=0, atol=1e-5)
        logs = [found["logs"][-1] for found in (ranks[0][i], whole)]
        assert robust(logs[0]) == pytest.approx(robust(logs[1]), rel=1e-4)


def test_every_rank_loads_the_best_checkpoint(on_torchrun):
    weights = load_file(on_torchrun.place / "best" / "checkpoint-1" / "model.safetensors")
    for parameters in on_torchrun.best:
        assert torch.equal(parameters.sort().values, steps.whole([*weights.values()]).sort().values)


def test_another_number_of_processes_is_refused_or_the_same(on_torchrun, tmp_path):
    """From one to two and from two to one, with 8 pairs a step in both: a run with a set is refused
    (its generators, and the last digits of its sums, are those of its processes); plain training
    goes on as TRL's does, over the same pairs in the same order."""
    runs, saved = on_torchrun.runs, on_torchrun.saved
    for found in on_torchrun.resumed:
        for name, done in zip(runs, found, strict=True):
            _refused_or_same(name, done, saved, "saved with processes: 1, resumed with 2")
    for name, run in runs.items():
        checkpoint = str(on_torchrun.place / f"{name}-two" / "checkpoint-1")
        done = steps.outcome(
            **run | {"folder": str(tmp_path / "back"), "resume_from_checkpoint": checkpoint}
        )
        _refused_or_same(name, done, saved, "saved with processes: 2, resumed with 1")


def _refused_or_same(name, done, saved, words):
    if name == "plain":  # SGD: float32 rounding of one gradient, times the learning rate
        torch.testing.assert_close(done["parameters"], saved[name]["parameters"], rtol=0, atol=1e-7)
    else:
        assert words in done, done
