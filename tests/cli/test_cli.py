"""The shell, on tiny random models: every run here trains for real."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from ranks import on_ranks
from rich.console import Console
from safetensors import safe_open
from safetensors.torch import save_file
from trl_fixtures import tiny_encoder_dir, tiny_llama_dir, tiny_pairs
from typer.testing import CliRunner

from drrlhf import __version__
from drrlhf.cli import app, run, rundir
from drrlhf.files import json_lines

GROUPS = ["amazon", "movie", "tweets", "amazon"] * 6
FAST = "--learning-rate 1e-3 --batch-size 4"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """Models and data that every run here reads."""
    root = tmp_path_factory.mktemp("cli")
    llama = tiny_llama_dir(root)
    encoder = tiny_encoder_dir(root, with_eos=False)  # as most real encoders
    pairs, held_out = root / "pairs.jsonl", root / "held_out.jsonl"
    _write(pairs, tiny_pairs(24, group=GROUPS))
    _write(held_out, tiny_pairs(6, seed=1, group=["tweets", "movie"] * 3))
    return SimpleNamespace(root=root, dpo=llama, reward=encoder, pairs=pairs, held_out=held_out)


def _write(path: Path, rows) -> Path:
    path.write_text("".join(json.dumps(dict(row)) + "\n" for row in rows), encoding="utf-8")
    return path


def _arguments(place, kind: str, out: Path, more: str = "") -> list[str]:
    given = f"--data {place.pairs} --model {getattr(place, kind)} --output-dir {out} {FAST} {more}"
    return ["train", kind, *given.split()]


def _run(arguments: list[str]):
    return CliRunner().invoke(app, arguments, prog_name="drrlhf")


def _train(place, kind: str, out: Path, more: str = ""):
    result = _run(_arguments(place, kind, out, more))
    assert result.exit_code == 0, result.output + result.stderr
    return result


def _refused(result, *words: str) -> str:
    """One line on standard error with `words`, exit status 2, no traceback."""
    assert result.exit_code == 2, result.output
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and "Traceback" not in result.output, result.output
    for word in words:
        assert word in lines[0]
    return lines[0]


def _numbers(out: Path) -> list[dict]:
    """The metric lines without what a clock decides."""
    clock = ("seconds", "runtime", "per_second", "step_time")
    return [
        {name: value for name, value in line.items() if not name.endswith(clock)}
        for line in json_lines(out / "metrics.jsonl")
    ]


def _weights(out: Path) -> dict:
    from safetensors.torch import load_file

    return {path.name: load_file(path) for path in out.glob("*.safetensors")}


def _assert_same_weights(one: Path, other: Path) -> None:
    ours, theirs = _weights(one), _weights(other)
    assert ours and ours.keys() == theirs.keys()
    for file, tensors in ours.items():
        assert all((tensors[name] == theirs[file][name]).all() for name in tensors)


# ---- the happy path ----------------------------------------------------------------------------


def test_reward_model(place, tmp_path):
    given = f"--ambiguity tv:0.1 --eval-data {place.held_out}"
    result = _train(place, "reward", tmp_path / "out", given)
    for word in ("reward, ambiguity tv:0.1", "held out", "effective sample size", "training.png"):
        assert word in result.output
    lines = json_lines(tmp_path / "out/metrics.jsonl")
    assert [line["step"] for line in lines if line["event"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if line["event"] == "eval"] == [6]
    # of the training set's groups this one has two: movie and tweets
    assert "eval_group/tweets/weight" in lines[-1] and "eval_group/amazon/weight" not in lines[-1]
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert record["settings"]["ambiguity"] == "tv:0.1" and record["data"]["rows"] == 24
    assert record["data"]["group_names"] == ["amazon", "movie", "tweets"]
    assert record["result"]["train"] == lines[-2] and record["result"]["eval"] == lines[-1]
    assert (tmp_path / "out/training.png").read_bytes().startswith(b"\x89PNG")

    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    start = AutoModelForSequenceClassification.from_pretrained(place.reward)
    assert model.config.num_labels == 1
    assert (model.classifier.weight != start.classifier.weight).any()
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("w1 w2")["input_ids"]


def test_dpo_with_adapters_and_groups_from_the_data(place, tmp_path):
    more = "--ambiguity group --lora --lora-r 4 --dtype bf16 --max-steps 2 --precompute-ref"
    result = _train(place, "dpo", tmp_path / "out", more)
    assert "dpo, ambiguity group:3" in result.output
    assert (tmp_path / "out/adapter_model.safetensors").is_file()
    assert not (tmp_path / "out/model.safetensors").exists()
    assert "group/tweets/state" in json_lines(tmp_path / "out/metrics.jsonl")[-1]


def test_the_set_and_the_learning_rate_reach_the_trainer(place, tmp_path):
    for name, ambiguity in (("plain", "erm"), ("robust", "cvar:0.3")):
        _train(place, "dpo", tmp_path / name, f"--ambiguity {ambiguity} --max-steps 3")
    plain, robust = _numbers(tmp_path / "plain"), _numbers(tmp_path / "robust")
    assert plain[0]["loss"] == robust[0]["loss"]  # before the first step every loss is log 2
    assert plain[-1]["loss"] != robust[-1]["loss"]
    assert "robust/max_weight" in robust[0] and "robust/max_weight" not in plain[0]
    assert [line["learning_rate"] for line in plain] == pytest.approx([1e-3, 2e-3 / 3, 1e-3 / 3])


def test_pairs_that_do_not_fit_are_counted(place, tmp_path):
    result = _train(place, "dpo", tmp_path / "out", "--max-length 5 --max-steps 1")
    assert "of 24 pairs left out: longer than --max-length 5 tokens" in result.output
    result = _run(_arguments(place, "dpo", tmp_path / "none", "--max-length 2"))
    _refused(result, "no pair fits", "all 24", "max_length=2 tokens")


def test_paths_with_brackets_and_a_home(place, tmp_path, monkeypatch):
    """No shell expands the ~ of --output-dir=~/out, and what rich prints may look like markup."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(place.dpo, tmp_path / "m[" / "v2]")
    given = [f"--data={place.pairs}", "--model=~/m[/v2]", "--output-dir=~/out", *FAST.split()]
    result = _run(["train", "reward", *given, "--max-steps", "1"])
    assert result.exit_code == 0, result.output + result.stderr
    assert "m[/v2] (LlamaForCausalLM) is no reward model" in result.output
    assert not (tmp_path / "~").exists()
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert json.loads((tmp_path / "out" / "run.json").read_text())["result"]


# ---- what is refused ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"prompt": "w1", "chosen": "w2"}\n', ("line 1", "'rejected'")),
        ('{"chosen": "w1", "rejected": "w2"}\n{"chosen": "w1",\n', ("line 2", "broken JSON")),
    ],
)
def test_bad_data_trains_and_overwrites_nothing(place, tmp_path, text, words):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text)
    out = tmp_path / "out"
    out.mkdir()
    (out / "run.json").write_text("{}")
    more = f"--data {bad} --overwrite"
    _refused(_run(_arguments(place, "dpo", out, more)), "bad.jsonl", *words)
    assert [path.name for path in out.iterdir()] == ["run.json"]
    assert (out / "run.json").read_text() == "{}"


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--ambiguity tvv:0.1", ("tvv:0.1", "did you mean 'tv'?")),
        ("--ambiguity=", ("unknown ambiguity ''", "known sets")),  # a variable that is not set
        ("--ambiguity tv:1.5", ("radius", "[0, 1]", "1.5")),
        ("--ambiguity group:4", ("3 groups (amazon, movie, tweets)", "group:3")),
        ("--model ./nowhere", ("--model ./nowhere", "no such directory")),
        ("--data nowhere.jsonl", ("nowhere.jsonl",)),
        ("--eval-data nowhere.jsonl", ("nowhere.jsonl",)),
        ("--loss-type sigmoit", ("loss_type", "sigmoit")),
        ("--beta -1", ("beta: expected a number > 0",)),
        ("--epochs 0", ("--epochs",)),
        ("--max-steps 0", ("--max-steps",)),
        ("--resume", ("holds no run to continue",)),
        ("--resume --overwrite", ("contradict",)),
    ],
)
def test_what_the_user_can_mend_is_one_line(place, tmp_path, more, words):
    _refused(_run(_arguments(place, "dpo", tmp_path / "out", more)), *words)
    assert not (tmp_path / "out/run.json").exists()


def test_group_needs_the_column(place, tmp_path):
    bare = _write(tmp_path / "bare.jsonl", tiny_pairs(4))
    more = f"--data {bare} --ambiguity group"
    _refused(_run(_arguments(place, "dpo", tmp_path / "out", more)), "no column 'group'")


def test_missing_options_are_named():
    _refused(_run(["train", "dpo", "--model", "x"]), "--data", "--output-dir", "--demo")
    _refused(_run(["train", "dpo", "--demo", "--beta", "1"]), "--demo", "--beta")
    _refused(_run(["train", "reward", "--quick"]), "--quick", "--demo")


def test_missing_extra_is_named(place, tmp_path, monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "trl" else find(name, *a)
    )
    result = _run(_arguments(place, "dpo", tmp_path / "out"))
    _refused(result, "this needs trl,", "pip install 'drrlhf[trl]'")


def test_an_occupied_directory_is_refused_then_overwritten(place, tmp_path):
    out = tmp_path / "out"
    _train(place, "reward", out, "--max-steps 2")
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    result = _run(_arguments(place, "reward", out, "--max-steps 1"))
    _refused(result, str(out), "run.json", "--resume", "--overwrite")
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    _train(place, "reward", out, "--max-steps 1 --overwrite --lora")
    assert [line["step"] for line in json_lines(out / "metrics.jsonl")] == [1]
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert [path.name for path in out.glob("*.safetensors")] == ["adapter_model.safetensors"]


def test_the_start_model_is_never_overwritten(place, tmp_path):
    model = shutil.copytree(place.dpo, tmp_path / "model")
    for out in (model, tmp_path):
        result = _run(_arguments(place, "dpo", out, f"--model {model} --overwrite"))
        _refused(result, "lies in --output-dir")
    result = _run(_arguments(place, "dpo", model, "--overwrite"))
    _refused(result, "config.json", "no run of drrlhf")
    _assert_same_weights(model, place.dpo)


# ---- going on ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("dpo", "--ambiguity group:3,step_size=0.5"),
        ("dpo", "--lora --precompute-ref --gradient-accumulation 2"),
        ("reward", "--ambiguity kl:0.1 --epochs 2 --logging-steps 2"),
    ],
)
def test_resume_gives_the_numbers_of_an_uninterrupted_run(place, tmp_path, kind, more):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    more += f" --save-steps 3 --max-steps 5 --eval-data {place.held_out}"
    _train(place, kind, whole, more)
    shutil.copytree(whole, broken)
    for path in [*broken.glob("*.safetensors"), broken / "training.png"]:
        path.unlink()
    # the newest checkpoint was cut off while it was written, and so was the last line
    (broken / "checkpoint-5/trainer_state.json").write_text('{"global_step": 5, "log_')
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "lo')
    _train(place, kind, broken, more + " --resume")
    assert _numbers(broken) == _numbers(whole)
    _assert_same_weights(broken, whole)
    clock = [
        [line["seconds"] for line in json_lines(out / "metrics.jsonl") if line["step"] <= 3]
        for out in (whole, broken)
    ]
    assert clock[0] == clock[1], "the first three steps were trained again"
    record = rundir.read_record(broken)
    assert [entry["step"] for entry in record["resumed"]] == [3]


def test_resume_refuses_another_run_and_names_the_difference(place, tmp_path):
    out = tmp_path / "out"
    _train(place, "dpo", out, "--max-steps 3 --save-steps 2 --ambiguity tv:0.2")
    shutil.rmtree(out / "checkpoint-3")
    other = _write(tmp_path / "other.jsonl", tiny_pairs(24, seed=5, group=GROUPS))
    same = "--max-steps 3 --ambiguity tv:0.2 --resume"
    for more, words in (
        (f"{same} --ambiguity tv:0.3", ("ambiguity was 'tv:0.2', now 'tv:0.3'",)),
        (f"{same} --learning-rate 0.1", ("learning_rate was 0.001, now 0.1",)),
        (f"{same} --seed 7 --beta 0.5", ("seed was 42, now 7", "beta was 0.1, now 0.5")),
        (f"{same} --data {other}", ("data sha256",)),
        (f"{same} --model {tiny_llama_dir(tmp_path, attention_dropout=0.1)}", ("model finger",)),
    ):
        _refused(_run(_arguments(place, "dpo", out, more)), *words)
    saved = out / "checkpoint-2" / "drrlhf_state.safetensors"
    with safe_open(saved, "pt") as file:
        facts = file.metadata()
    save_file({}, saved, facts | {"processes": "2"})
    _refused(_run(_arguments(place, "dpo", out, same)), "saved with processes: 2, resumed with 1")
    assert not (out / "checkpoint-3").exists()


def test_resume_of_a_finished_run_trains_nothing(place, tmp_path):
    out = tmp_path / "out"
    _train(place, "dpo", out, "--max-steps 2")  # not at the end of an epoch
    numbers, weights = _numbers(out), tmp_path / "copy"
    shutil.copytree(out, weights)
    (out / "model.safetensors").unlink()  # as if it had been killed between checkpoint and model
    result = _train(place, "dpo", out, "--max-steps 2 --resume")
    assert "held out" not in result.output and "2 steps" in result.output
    assert _numbers(out) == numbers
    _assert_same_weights(out, weights)
    (out / "metrics.jsonl").write_text("")
    again = _run(_arguments(place, "dpo", out, "--max-steps 2 --resume"))
    _refused(again, "metrics.jsonl", "says nothing of the steps of this run")


def test_resume_without_a_usable_checkpoint(place, tmp_path):
    out = tmp_path / "out"
    _train(place, "dpo", out, "--max-steps 1")
    (out / "checkpoint-1/trainer_state.json").unlink()
    result = _run(_arguments(place, "dpo", out, "--max-steps 1 --resume"))
    _refused(result, "no usable checkpoint", "--overwrite")


def test_ctrl_c_leaves_a_checkpoint_that_continues_to_the_same_numbers(place, tmp_path):
    out, whole = tmp_path / "out", tmp_path / "whole"
    more = "--max-steps 40 --ambiguity chi2:0.5"
    root = str(Path(__file__).resolve().parents[2])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, "-m", "drrlhf", *_arguments(place, "dpo", out, more)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as run:
        while run.poll() is None and len(_lines(out / "metrics.jsonl")) < 3:
            time.sleep(0.01)
        run.send_signal(signal.SIGINT)
        told, errors = (stream.decode() for stream in run.communicate(timeout=120))
    assert run.returncode == 130, told + errors
    steps = [line["step"] for line in json_lines(out / "metrics.jsonl")]
    assert 3 <= len(steps) < 40, "the run was too fast for this test: raise its steps"
    assert f"checkpoint-{steps[-1]}" in told and "Stopping after this step" in errors
    assert (out / "training.png").is_file() and not (out / "model.safetensors").exists()

    resume = told.strip().splitlines()[-1]
    assert resume.startswith("drrlhf train dpo --data") and resume.endswith(" --resume")
    result = _run(resume.split()[1:])
    assert result.exit_code == 0, result.output
    _train(place, "dpo", whole, more)
    assert _numbers(out) == _numbers(whole)
    _assert_same_weights(out, whole)


def _lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.is_file() else []


def test_a_second_ctrl_c_stops_at_once_and_handlers_come_back():
    from drrlhf.callbacks import InterruptCallback

    before = signal.getsignal(signal.SIGINT)
    callback = InterruptCallback()
    with pytest.raises(KeyboardInterrupt), callback.installed():
        os.kill(os.getpid(), signal.SIGINT)
        assert callback.signum == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def _signalled(rank: int) -> list:
    """What two steps' ends ask for, where a signal reaches one process in the first step and the
    others after it, as a launcher sends it: whether the run stops, and by which signal."""
    from drrlhf.callbacks import InterruptCallback

    callback, args, asked = InterruptCallback(), SimpleNamespace(device="cpu"), []
    with callback.installed():
        for step in range(2):
            if step == 1 and rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            control = SimpleNamespace(should_save=False, should_training_stop=False)
            callback.on_step_end(args, None, control)
            asked.append((control.should_save, control.should_training_stop))
        os.kill(os.getpid(), signal.SIGTERM) if rank == 0 else None  # the first one here
    return [asked, callback.signum]


def test_a_signal_to_one_process_stops_all_after_the_same_step():
    stops = [[(False, False), (True, True)], signal.SIGTERM]
    assert on_ranks(2, _signalled) == [stops, stops]


@pytest.mark.parametrize("first", [True, False])
def test_one_of_several_processes_says_how_to_go_on(tmp_path, first):
    (tmp_path / "checkpoint-3").mkdir()
    (tmp_path / "checkpoint-3" / "trainer_state.json").write_text('{"global_step": 3}')
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path), world_size=2),
        state=SimpleNamespace(global_step=3, max_steps=5),
        train=lambda **_: None,
        is_world_process_zero=lambda: first,
    )
    interrupt = SimpleNamespace(installed=contextlib.nullcontext, signum=signal.SIGINT)
    callbacks = None, interrupt, SimpleNamespace(stop=lambda: None)
    console = Console(file=io.StringIO(), width=200)
    assert run._train(trainer, callbacks, None, {}, console, "drrlhf train ... --resume") == 130
    lines = console.file.getvalue().splitlines()
    said = ["Continue with, by the same launcher on 2 processes:", "drrlhf train ... --resume"]
    assert lines[1:] == (said if first else [])


# ---- demonstrations ----------------------------------------------------------------------------


def test_demos_get_their_options_and_explain_missing_material(monkeypatch):
    from drrlhf.demo import dpo, material, reward

    calls = []
    monkeypatch.setattr(reward, "run", lambda out, **options: calls.append((out, options)))
    monkeypatch.setattr(dpo, "run", lambda out, **options: calls.append((out, options)))
    for line in (
        "reward --demo --seeds 7 --quick --output-dir here",
        "dpo --demo",
        "dpo --demo --steps 3 --ambiguity cvar:0.5 --seed 9 --output-dir there",
    ):
        result = _run(["train", *line.split()])
        assert result.exit_code == 0, result.output
    for _, options in calls:
        options.pop("console")
    assert calls == [
        (Path("here"), {"seeds": 7, "quick": True}),
        (Path("demo-dpo"), {"ambiguity": "tv:0.1", "seed": 42}),
        (Path("there"), {"ambiguity": "cvar:0.5", "seed": 9, "steps": 3}),
    ]

    def offline(*_, **__):
        raise material.MaterialError("could not fetch the model.\nIs the network reachable?")

    monkeypatch.setattr(dpo, "run", offline)
    _refused(_run(["train", "dpo", "--demo"]), "could not fetch the model. Is the network")


# ---- doctor and the rest -----------------------------------------------------------------------


def test_doctor_tells_versions_build_and_who_serves_what():
    result = _run(["doctor"])
    assert result.exit_code == 0
    for word in (__version__, "torch", "trl", "built", "robust_risk", "reference", "triton"):
        assert word in result.output
    report = json.loads(_run(["doctor", "--json"]).output)
    assert report["versions"]["drrlhf"] == __version__
    served = {(row["op"], row["device"]) for row in report["ops"] if row["chosen"]}
    assert served == {(row["op"], row["device"]) for row in report["ops"]}
    assert all(row["reason"] for row in report["ops"] if not row["chosen"])


BASE_INSTALL = """
import importlib.metadata, sys
from importlib.machinery import PathFinder
extras = "trl", "transformers", "datasets", "peft", "accelerate", "matplotlib", "numpy"
class Path(PathFinder):
    @classmethod
    def find_spec(cls, name, *rest):
        return None if name.partition(".")[0] in extras else super().find_spec(name, *rest)
sys.meta_path[sys.meta_path.index(PathFinder)] = Path
version = importlib.metadata.version
def installed(name):
    if name in extras:
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = installed
sys.argv = ["drrlhf", *sys.argv[1:]]
from drrlhf.cli import main
main()
"""


def test_doctor_works_on_the_base_install():
    done = subprocess.run(
        [sys.executable, "-c", BASE_INSTALL, "doctor"],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "pip install 'drrlhf[trl]'" in done.stdout


def test_doctor_says_when_drrlhf_cannot_be_imported():
    done = subprocess.run(
        [sys.executable, "-m", "drrlhf", "doctor"],
        capture_output=True,
        text=True,
        env=os.environ | {"DRRLHF_BACKEND": "nonsense"},
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert done.returncode == 1 and "nonsense" in done.stderr and "Traceback" not in done.stderr


def test_help_and_version_are_light():
    code = (
        "import sys\nfrom drrlhf.cli import app\n"
        "app(['train', 'dpo', '--help'], standalone_mode=False)\n"
        "heavy = {'torch', 'transformers', 'trl', 'matplotlib', 'datasets'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "tv:0.1" in done.stdout and "Example" in done.stdout
    assert _run(["--version"]).output.strip() == f"drrlhf {__version__}"
