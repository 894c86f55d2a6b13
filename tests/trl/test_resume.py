"""Whatever ends a run, its checkpoints are whole, and who resumes it gets its numbers or a refusal.

`make test-kill` does it with kill -9, a hundred times; here the same places fail by an exception.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("trl")

from trl_fixtures import quiet, tiny_pairs  # isort: skip

import steps
import torch
import trl
from accelerate.data_loader import prepare_data_loader, skip_first_batches
from torch.utils.data import DataLoader
from transformers import AutoTokenizer
from trl.trainer.utils import RepeatSampler

from drrlhf.cli import rundir
from drrlhf.trl import prompts, state

SAVED = {"save_strategy": "steps", "save_steps": 1}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*checkpoint*"))


def test_the_size_that_was_found_is_that_of_the_step(models, tmp_path):
    """Of auto_find_batch_size, which halves it where memory does not do and keeps it in the state
    of a checkpoint."""
    options = {
        "ambiguity": "tv:0.1",
        "auto_find_batch_size": True,
        "per_device_train_batch_size": 8,
    }
    options |= SAVED | {"max_steps": 1, "data": tiny_pairs(16)}
    trainer = steps.trainer("reward", models["reward"], str(tmp_path), **options)
    forward, failed = trainer.model.forward, []

    def small(*args, **kwargs):
        if not failed:
            failed.append(True)
            raise RuntimeError("CUDA out of memory.")
        return forward(*args, **kwargs)

    trainer.model.forward = small
    trainer.train()
    assert failed and trainer._train_batch_size < 8
    told = state.facts(tmp_path / "checkpoint-1")["pairs per step"]
    assert told == str(trainer._train_batch_size)


# ---- checkpoints -------------------------------------------------------------------------------


def test_a_checkpoint_has_its_name_when_it_is_whole(models, tmp_path, monkeypatch):
    options = {"ambiguity": "group:3", "data": tiny_pairs(16, group=[0, 1, 2, 1] * 4)}
    options |= SAVED | {"max_steps": 3, "save_total_limit": 2}
    whole = steps.run("reward", models["reward"], str(tmp_path / "whole"), **options)
    assert names(tmp_path / "whole") == ["checkpoint-2", "checkpoint-3"]

    def fail(*_):
        raise OSError("the disk is full")

    out, save = tmp_path / "out", state.save
    monkeypatch.setattr(state, "save", lambda f, *a: (fail if "-2" in f.name else save)(f, *a))
    with pytest.raises(OSError, match="disk is full"):
        steps.run("reward", models["reward"], str(out), **options)
    assert names(out) == [state.UNFINISHED, "checkpoint-1"]
    monkeypatch.undo()
    resumed = steps.run(
        "reward", models["reward"], str(out), resume_from_checkpoint=True, **options
    )
    assert names(out) == ["checkpoint-2", "checkpoint-3"]
    assert torch.equal(resumed["parameters"], whole["parameters"])


@pytest.mark.parametrize("limit", [1, 2, None])
def test_trl_keeps_the_same_checkpoints_and_the_same_best(models, tmp_path, limit):
    """The loss falls, and the largest counts as the best: the first checkpoint stays."""
    found = []
    for name, config, kind in (
        ("ours", steps.RewardConfig, steps.RewardTrainer),
        ("theirs", trl.RewardConfig, trl.RewardTrainer),
    ):
        arguments = quiet(
            max_steps=3,
            save_total_limit=limit,
            eval_strategy="steps",
            eval_steps=1,
            metric_for_best_model="eval_loss",
            greater_is_better=True,
            **SAVED,
        ) | {"save_strategy": "steps"}
        out = tmp_path / name
        trainer = kind(
            model=models["reward"],
            args=config(str(out), **arguments),
            train_dataset=tiny_pairs(4),
            eval_dataset=tiny_pairs(4),
            processing_class=AutoTokenizer.from_pretrained(models["reward"]),
        )
        trainer.train()
        best = Path(trainer.state.best_model_checkpoint)
        assert best.parent == out
        for saved in out.glob("checkpoint-*/trainer_state.json"):
            assert json.loads(saved.read_text())["best_model_checkpoint"] == str(best)
        found.append((names(out), best.name))
    assert found[0] == found[1] and found[0][1] == "checkpoint-1"


def test_the_best_checkpoint_of_a_run_that_was_moved_is_kept(models, tmp_path):
    """The first checkpoint stays the best, under the name that it has now, as with TRL."""
    found = []
    for name, config, kind in (
        ("ours", steps.RewardConfig, steps.RewardTrainer),
        ("theirs", trl.RewardConfig, trl.RewardTrainer),
    ):
        arguments = quiet(eval_steps=1, metric_for_best_model="eval_loss", save_total_limit=2)
        arguments |= SAVED | {"eval_strategy": "steps", "greater_is_better": True}
        out = tmp_path / name
        for step in (2, 4):
            trainer = kind(
                model=models["reward"],
                args=config(str(out), **arguments | {"max_steps": step}),
                train_dataset=tiny_pairs(4),
                eval_dataset=tiny_pairs(4),
                processing_class=AutoTokenizer.from_pretrained(models["reward"]),
            )
            trainer.train(resume_from_checkpoint=str(out / "checkpoint-2") if step > 2 else None)
            out = out if step > 2 else out.rename(tmp_path / f"{name}-moved")
        best = out / "checkpoint-1"
        assert trainer.state.best_model_checkpoint == str(best)
        told = json.loads((out / "checkpoint-4" / "trainer_state.json").read_text())
        assert told["best_model_checkpoint"] == str(best)
        found.append(names(out))
    assert found[0] == found[1] == ["checkpoint-1", "checkpoint-4"]


def test_prompts_come_in_the_order_of_the_epoch():
    arguments = list(range(10)), 2, 3, 2, True, 7
    theirs = RepeatSampler(*arguments)
    epochs = [list(theirs) for _ in range(3)]
    assert epochs[0] != epochs[1] != epochs[2]
    for begin in range(3):  # resumed in epoch `begin`
        ours = prompts.PromptSampler.like(RepeatSampler(*arguments))
        for epoch in range(begin, 3):
            ours.set_epoch(epoch)
            assert list(ours) == epochs[epoch] and len(ours) == len(epochs[epoch])


@pytest.mark.parametrize("processes", [1, 2])
def test_the_order_of_an_epoch_reaches_the_sampler_behind_what_skips_and_shares(processes):
    """The loader is made, and skips, as in a run that was resumed; its own epoch is the first."""

    def loader():
        sampler = prompts.PromptSampler(range(32), 1, 4, 1, shuffle=True, seed=3)
        return prepare_data_loader(
            DataLoader(range(32), batch_size=4, sampler=sampler),
            device=torch.device("cpu"),
            num_processes=processes,
            process_index=0,
            put_on_device=False,
            rng_types=[],
        )

    whole = loader()
    epochs = []
    for epoch in range(2):
        prompts.begin_epoch(whole, epoch)
        epochs.append([batch.tolist() for batch in whole])
    resumed = loader()
    prompts.begin_epoch(resumed, 1)
    rest = skip_first_batches(resumed, 2)
    rest.set_epoch(1)  # as transformers does, which reaches one sampler less
    assert [batch.tolist() for batch in rest] == epochs[1][2:] != epochs[0][2:]


# ---- the directory of a run --------------------------------------------------------------------


def _finished_run(out: Path) -> Path:
    for step in (1, 2):
        (out / f"checkpoint-{step}").mkdir(parents=True)
        for name in ("optimizer.pt", "trainer_state.json"):
            (out / f"checkpoint-{step}" / name).write_text(json.dumps({"global_step": step}))
    for name in ("run.json", "metrics.jsonl", "config.json", "model.safetensors", "training.png"):
        (out / name).write_text("{}")
    return out


def test_a_run_whose_removal_was_interrupted_can_be_removed(tmp_path, monkeypatch):
    left = None
    for moment in range(100):
        out = _finished_run(tmp_path / str(moment))
        if _interrupted(monkeypatch, moment, rundir.clear, out):
            break
        left = sorted(path.name for path in out.iterdir() if not path.name.startswith("."))
        assert "run.json" in left, moment  # or --overwrite would take it for someone else's
        for checkpoint in out.glob("checkpoint-*"):
            assert len(list(checkpoint.iterdir())) == 2, moment  # whole, if --resume finds it
        rundir.sweep(out)
        rundir.clear(out)
        assert not list(out.iterdir())
    assert moment > 8 and left == ["run.json"]


def test_a_model_is_put_beside_its_run_file_by_file_whole(tmp_path, monkeypatch):
    checkpoint = tmp_path / "checkpoint-2"
    checkpoint.mkdir()
    files = {"config.json": "{}", "model.safetensors": "weights" * 1000, "tokenizer.json": "{}"}
    for name, text in (files | {"optimizer.pt": "x", "rng_state.pth": "x"}).items():
        (checkpoint / name).write_text(text)
    copied = shutil.copy2
    out = tmp_path / "out"
    out.mkdir()

    def torn(source, target):
        Path(target).write_text("half")
        raise OSError("no space")

    monkeypatch.setattr(
        shutil, "copy2", lambda s, t: (torn if s.suffix == ".safetensors" else copied)(s, t)
    )
    with pytest.raises(OSError, match="no space"):
        rundir.promote(checkpoint, out)
    assert [path.name for path in out.iterdir()] == ["config.json"]
    monkeypatch.undo()
    rundir.promote(checkpoint, out)
    assert {path.name: path.read_text() for path in out.iterdir()} == files


def _interrupted(monkeypatch, moment, function, *arguments):
    """Call `function`, but raise before the file operation of that number; whether it was done."""
    done = 0

    def counted(original):
        def call(*a, **k):
            nonlocal done
            done += 1
            if done > moment:
                raise InterruptedError
            return original(*a, **k)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", counted(Path.unlink))
        patch.setattr(Path, "rename", counted(Path.rename))
        patch.setattr(shutil, "rmtree", counted(shutil.rmtree))
        try:
            function(*arguments)
        except InterruptedError:
            return False
    return True


@pytest.mark.slow
def test_killed_runs(request):
    if "slow" not in request.config.getoption("markexpr"):
        pytest.skip("10 seconds; run with -m slow")
    run = (
        Path(__file__).parents[1] / "support" / "kill.py",
        "--kills",
        "3",
        "--runs",
        "reward, group",
    )
    command = [sys.executable, *map(str, run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
