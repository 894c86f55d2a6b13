"""kill -9 of `drrlhf train` at random moments, then --resume: the run that was never interrupted.

    python tests/support/kill.py --kills 100 --seed 0

Each run below is trained once undisturbed, and then again and again in chains of attempts. Every
attempt is killed, at a random time or at a random file operation in its output directory, until one
finishes; half of the chains begin by overwriting an older run. After every kill each file that a
reader would open must parse. The finished run must equal the undisturbed one bit for bit: weights,
states of optimizer, schedule, ambiguity set and generators, and every line of metrics.jsonl but for
the clock. Attempts are forks of this process, which saves each of them the imports.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # a fork has none of its parent's threads

from trl_fixtures import tiny_llama_dir, tiny_pairs, tiny_reward_dir  # isort: skip

import matplotlib.image
import numpy
import pyarrow.parquet
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from safetensors import safe_open

import drrlhf.trl  # noqa: F401
from drrlhf.cli import app

RUNS = {
    "reward, group": "reward --ambiguity group:3,step_size=0.5 --gradient-accumulation 2 "
    "--eval-data held_out.jsonl",
    "reward, kl momentum": "reward --ambiguity kl:temperature=0.5,momentum=0.9 "
    "--gradient-accumulation 2 --logging-steps 3",
    "dpo, tv": "dpo --ambiguity tv:0.2 --gradient-accumulation 2 --padding-free",
    "dpo, group, lora": "dpo --ambiguity group --lora --lora-r 4 --precompute-ref "
    "--eval-data held_out.jsonl",
    "dpo, kl momentum": "dpo --ambiguity kl:temperature=-0.5,momentum=0.8",
    "grpo, tv": "grpo --ambiguity tv:0.3 --gradient-accumulation 2 --beta 0.1 "
    "--eval-data asked.jsonl",
    "grpo, group by pass rate": "grpo --ambiguity group:3 --group-by pass_rate "
    "--pass-threshold 0.3",
}
EVERY = "--learning-rate 1e-3 --batch-size 4 --epochs 1.5 --save-steps 2 --output-dir out"
EACH = {
    "reward": "--data pairs.jsonl --model reward",
    "dpo": "--data pairs.jsonl --model policy",
    "grpo": "--data prompts.jsonl --model policy --reward kill_reward:score --num-generations 2 "
    "--max-completion-length 6",
}
REWARD = """
def score(prompts, completions, bonus, **_):
    return [len(set(c.split())) / 10 + b for c, b in zip(completions, bonus)]
"""
LIMIT = 300  # seconds for one attempt


def material(place: Path) -> int:
    """Models, with dropout where the trainer leaves it on, and data, in `place`."""
    place.mkdir(parents=True)
    for made, name in (
        (tiny_llama_dir(place, attention_dropout=0.2), "policy"),
        (tiny_reward_dir(place), "reward"),
    ):
        made.rename(place / name)
    groups = ["amazon", "movie", "tweets", "amazon"] * 6
    bonus = [0.1 * (i % 3) for i in range(24)]
    train = tiny_pairs(24, group=groups)
    prompts = tiny_pairs(24, group=groups, bonus=bonus).remove_columns(["chosen", "rejected"])
    for name, rows in (
        ("pairs", train),
        ("held_out", tiny_pairs(6, seed=1, group=groups[:6])),
        ("prompts", prompts),
        ("asked", prompts.select(range(4))),
    ):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (place / f"{name}.jsonl").write_text(lines, encoding="utf-8")
    (place / "kill_reward.py").write_text(REWARD, encoding="utf-8")
    return 0


# ---- one attempt -------------------------------------------------------------------------------


class Moment(NamedTuple):
    """When to kill: `seconds` after the start, or after file operation number `operation`."""

    seconds: float
    operation: int | None = None

    def __str__(self) -> str:
        if self.operation is None:
            return f"{self.seconds:.3f} s after the start"
        return f"{self.seconds * 1000:.1f} ms after file operation {self.operation}"


class Ended(NamedTuple):
    status: int  # of the command; negative: the signal that ended it
    seconds: float
    output: str


WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
CHANGES = {"os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link", "os.truncate"}


def _die(seconds: float) -> None:
    """End this process without another instruction of its own, after `seconds`."""
    if seconds:
        signal.setitimer(signal.ITIMER_REAL, seconds)  # SIGALRM has no handler here: it kills
    else:
        os.kill(os.getpid(), signal.SIGKILL)


def _count_operations(folder: Path, moment: Moment | None) -> Callable[[], int]:
    """Count what changes a file in `folder`, and die at the operation of `moment`, if any, before
    it is done. (Libraries that are not Python's open files uncounted.)"""
    seen = 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        changes = event in CHANGES
        if event == "open":
            changes = isinstance(arguments[2], int) and bool(arguments[2] & WRITING)
        if changes and isinstance(arguments[0], (str, bytes, os.PathLike)):
            path = os.path.abspath(os.fsdecode(arguments[0]))
            if path.startswith(str(folder)):
                seen += 1
                if moment is not None and moment.operation == seen:
                    _die(moment.seconds)

    sys.addaudithook(hook)
    return lambda: seen


def in_a_fork(work: Callable[[], int]) -> int:
    """The exit status that `work` gives in a process of its own; negative: the signal that ended
    it, 70: an exception."""
    child = os.fork()
    if not child:
        status = 70
        try:
            status = work()
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def attempt(place: Path, command: str, moment: Moment | None = None) -> Ended:
    """Run ``drrlhf train command`` in `place`, in a process of its own that is killed at `moment`.

    What it prints and its number of file operations are left in `place`.
    """

    def work() -> int:
        os.chdir(place)
        sys.path.insert(0, str(place))
        log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.stdout, sys.stderr = (os.fdopen(n, "w", 1, closefd=False) for n in (1, 2))
        operations = _count_operations(place / "out", moment)
        timed = moment is not None and moment.operation is None
        _die(max(moment.seconds, 1e-4) if timed else LIMIT)
        try:
            app(["train", *command.split()], prog_name="drrlhf")
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        (place / "operations").write_text(str(operations()))
        return status

    start = time.monotonic()
    status = in_a_fork(work)
    seconds = time.monotonic() - start
    log = place / "log"
    output = log.read_text(errors="replace") if log.exists() else ""
    assert seconds < LIMIT, f"{command}: not done after {LIMIT} seconds\n{output}"
    return Ended(status, seconds, output)


# ---- what is left ------------------------------------------------------------------------------


def _json_lines(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert not text or text.endswith("\n"), "its last line is cut off"
    for line in text.splitlines():
        json.loads(line)


def _tensors(path: Path) -> dict[str, Any]:
    with safe_open(path, "pt") as file:
        return {"metadata": file.metadata()} | {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118


READERS: dict[str, Callable[[Path], Any]] = {
    ".json": lambda path: json.loads(path.read_text(encoding="utf-8")),
    ".jsonl": _json_lines,
    ".safetensors": _tensors,
    ".parquet": pyarrow.parquet.read_table,
    ".png": matplotlib.image.imread,
    **dict.fromkeys((".pt", ".pth", ".bin"), lambda path: torch.load(path, weights_only=False)),
}


def visible(folder: Path) -> list[Path]:
    """The files in `folder` that a reader would open: none whose path has a hidden part."""
    found = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [p for p in found if not any(n.startswith(".") for n in p.relative_to(folder).parts)]


def torn(folder: Path) -> list[str]:
    """The files in `folder` that do not parse, and why."""
    found = []
    for path in visible(folder):
        try:
            READERS.get(path.suffix, Path.read_bytes)(path)
        except Exception as error:
            found.append(f"{path.relative_to(folder)}: {type(error).__name__}: {error}")
    return found


CLOCK = ("seconds", "runtime", "per_second", "_time", "started", "finished", "resumed")
# TRL counts tokens anew after a resume, in the history that it keeps; metrics.jsonl goes on.
HISTORY, TOKENS = "trainer_state.json", ("num_tokens",)


def _without(names: tuple[str, ...], value: Any) -> Any:
    """`value` without the entries, at any depth, whose name ends so."""
    if isinstance(value, dict):
        return {k: _without(names, v) for k, v in value.items() if not str(k).endswith(names)}
    return [_without(names, v) for v in value] if isinstance(value, list) else value


def _same(one: Any, other: Any) -> bool:
    """Equality to the last bit, through what holds tensors."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        return one.dtype == other.dtype and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(v, other[k]) for k, v in one.items())
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(_same, one, other))
    if isinstance(one, numpy.ndarray):
        return bool(numpy.array_equal(one, other))
    return bool(one == other) or (one != one and other != other)


def differences(whole: Path, broken: Path) -> list[str]:
    """In what two finished runs differ, hidden files included; nothing that a clock decides, and
    no older checkpoint that there was no time to remove."""
    checkpoints = {path.name for path in whole.glob("checkpoint-*")}
    files = [{str(p.relative_to(f)) for p in f.rglob("*") if p.is_file()} for f in (whole, broken)]
    files[1] = {
        name
        for name in files[1]
        if not name.startswith("checkpoint-") or Path(name).parts[0] in checkpoints
    }
    found = [f"only in one: {name}" for name in sorted(files[0] ^ files[1])]
    for name in sorted(files[0] & files[1]):
        suffix, pair = Path(name).suffix, (whole / name, broken / name)
        if suffix == ".png" or Path(name).name == "training_args.bin":
            continue  # a picture of metrics.jsonl; settings, compared as run.json
        names = CLOCK + (TOKENS if Path(name).name == HISTORY else ())
        if suffix == ".jsonl":
            texts = [p.read_text().splitlines() for p in pair]
            values = [_without(names, [json.loads(line) for line in lines]) for lines in texts]
        elif suffix == ".json":
            values = [_without(names, json.loads(p.read_text())) for p in pair]
        else:
            values = [READERS.get(suffix, Path.read_bytes)(p) for p in pair]
        if not _same(*values):
            found.append(f"differs: {name}")
    return found


# ---- chains ------------------------------------------------------------------------------------


class Run:
    """One run of RUNS: trained undisturbed at once, then in chains of killed attempts."""

    def __init__(self, name: str, place: Path, draw: random.Random) -> None:
        self.name, self.draw = name, draw
        kind = RUNS[name].split()[0]
        self.command = f"{RUNS[name]} {EACH[kind]} {EVERY}"
        self.place = place / name.replace(" ", "-").replace(",", "")
        self.material = place / "material"
        self.whole = self._folder("whole")
        done = attempt(self.whole, self.command)
        assert done.status == 0, f"{name}: exit status {done.status}\n{done.output}"
        assert not (broken := torn(self.whole / "out")), broken
        self.seconds = done.seconds
        self.operations = int((self.whole / "operations").read_text())
        self.chains = 0

    def _folder(self, name: str) -> Path:
        folder = self.place / name
        folder.mkdir(parents=True)
        for path in self.material.iterdir():
            (folder / path.name).symlink_to(path)
        return folder

    def _moment(self) -> Moment:
        if self.draw.random() < 0.4:
            return Moment(self.draw.uniform(0, self.seconds))
        delay = self.draw.choice((0.0, self.draw.uniform(1e-4, 4e-3)))
        return Moment(delay, self.draw.randint(1, self.operations))

    def chain(self) -> Iterator[Moment]:
        """Kill attempt after attempt, until one is done before its moment has come; each kill.

        Raises:
            AssertionError: a file was half written, an attempt failed or refused to begin, or the
                finished run is another one.
        """
        self.chains += 1
        folder = self._folder(f"chain-{self.chains}")
        out = folder / "out"
        story = []
        ways = [""]
        if self.draw.random() < 0.5:
            shutil.copytree(self.whole / "out", out)
            earlier = json.loads((out / "run.json").read_text())
            earlier["settings"]["seed"] = 7  # another run
            (out / "run.json").write_text(json.dumps(earlier))
            ways = ["--overwrite"]
        while True:
            moment = self._moment()
            for way in ways:
                ended = attempt(folder, f"{self.command} {way}", moment)
                story.append(f"{way or 'start'}, {moment}: status {ended.status}")
                refused = ended.status == 2 and "\nerror: " in f"\n{ended.output}"
                if not (refused and way == "--resume"):
                    break
            history = "\n".join([f"{self.name}, in {folder}:", *story])
            if ended.status == 0:
                break
            killed = ended.status in (-signal.SIGKILL, -signal.SIGALRM)
            assert killed, f"{history}\n{ended.output}"
            yield moment
            assert not (broken := torn(out)), f"{history}\nhalf written: {broken}"
            ways = ["--resume", "--overwrite"]
        found = torn(out) + differences(self.whole / "out", out)
        assert not found, f"{history}\nanother run: {found}"
        shutil.rmtree(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", nargs="*", default=list(RUNS), choices=list(RUNS))
    parser.add_argument("--keep-going", action="store_true", help="after a failure")
    options = parser.parse_args()
    torch.set_num_threads(1)
    draw, kills, failures = random.Random(options.seed), Counter(), []
    console = Console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn()
    place = Path(tempfile.mkdtemp(prefix="drrlhf-kill-")).resolve()
    # In a fork too: a lock that is made here would be shared by all attempts, and stay locked when
    # one of them is killed.
    assert in_a_fork(lambda: material(place / "material")) == 0
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        task = progress.add_task("undisturbed", total=len(options.runs))
        runs = []
        for name in options.runs:
            runs.append(Run(name, place, draw))
            progress.advance(task)
        task = progress.add_task("kill -9", total=options.kills)
        while kills.total() < options.kills and (options.keep_going or not failures):
            run = runs[sum(r.chains for r in runs) % len(runs)]
            try:
                for _ in run.chain():
                    kills[run.name] += 1
                    progress.advance(task)
            except AssertionError as error:
                failures.append(str(error))
                console.print(f"{error}\n", markup=False, highlight=False)
    for run in runs:
        console.print(f"{run.name}: {kills[run.name]} kills in {run.chains} runs")
    if failures:
        console.print(f"{len(failures)} runs went wrong; they are in {place}")
        return 1
    shutil.rmtree(place)
    console.print(f"{kills.total()} kills: every run ended as if it had never been interrupted.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
