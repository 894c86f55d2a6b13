"""The run of the tests on a GPU, without one: its steps, its logs, its ends."""

from __future__ import annotations

import ast
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gpu
import pytest

RUNNER = Path(gpu.__file__)
ROOT = RUNNER.parent.parent
FAKE = """#!/bin/sh
echo "$@" >> {record}
while [ "$1" != {python} ]; do shift; done
exec "$@"
"""


@pytest.fixture
def sanitizer(tmp_path, monkeypatch):
    """Stands for compute-sanitizer: notes how it was called, and runs the rest."""
    program, record = tmp_path / "sanitizer", tmp_path / "calls"
    program.write_text(FAKE.format(record=record, python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("COMPUTE_SANITIZER", str(program))
    return record


def write(tmp_path, text):
    file = tmp_path / "tests" / "test_some.py"
    file.parent.mkdir(exist_ok=True)
    file.write_text(text)
    return str(file)


def start(tmp_path, *arguments, command=(RUNNER,)):
    command = [sys.executable, *command, "--device", "cpu", "--cores", "2"]
    environment = os.environ | {"PYTEST_ADDOPTS": "", "PYTHONPATH": str(RUNNER.parent)}
    return subprocess.Popen(
        [*map(str, command), "--output", str(tmp_path / "out"), *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def runs(process):
    """Whether there is such a process, other than one that nobody has asked about its end."""
    stat = Path(f"/proc/{process}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def summary(tmp_path):
    return json.loads((tmp_path / "out" / "summary.json").read_text())


def test_files_of_the_run_need_what_an_image_with_pytorch_has():
    """Of what else they use, a test says so where it is: `pytest.importorskip`."""
    make = (ROOT / "Makefile").read_text()
    (listed,) = re.findall(r"TESTS_OF_OPS := .*?%\.py,(.*?)\)", make.replace("\\\n", " "))
    files = [Path(__file__).with_name(f"test_{name}.py") for name in listed.split()]
    files.append(ROOT / "tests" / "trl" / "test_row_attention.py")
    own = {path.stem for folder in ("support", "cases") for path in ROOT.glob(f"tests/{folder}/*")}
    there = {*sys.stdlib_module_names, *own, "drrlhf", "tests", "tools"}
    there |= {"torch", "triton", "numpy", "scipy", "pytest", "hypothesis"}
    for file in files:
        begun = [node for node in ast.parse(file.read_text()).body if hasattr(node, "names")]
        names = [getattr(node, "module", None) or node.names[0].name for node in begun]
        assert {name.split(".")[0] for name in names} <= there, file


def test_a_failure_stops_nothing_and_is_told(tmp_path, sanitizer):
    tests = write(tmp_path, "def test_bad():\n    assert 0\ndef test_good():\n    assert 1\n")
    absent = tmp_path / "tests" / "test_absent.py"
    absent.write_text("import no_such_package\n")  # nor does a file that needs what is not there
    run = start(tmp_path, str(absent), tests)
    output, _ = run.communicate(timeout=300)
    assert run.returncode == 1, output
    found = summary(tmp_path)
    assert set(found) == {"cpu", "memcheck", "racecheck"}
    assert found["cpu"]["passed"] == 1 and found["cpu"]["failed"] == 1
    for tool in gpu.TOOLS:
        assert found[tool]["status"] == "ok" and found[tool]["passed"] > 12, output
    calls = sanitizer.read_text().splitlines()
    assert len(calls) == 2, "a process for each tool"
    for call in calls:
        assert "-m sanitized" in call and "kns=drrlhf" in call and "--error-exitcode" in call
    assert (tmp_path / "out" / "cpu.xml").exists()


def test_a_sanitizer_that_breaks_does_not_hide_what_comes_after(tmp_path, monkeypatch):
    """As one did on an H200: in one test, every time."""
    tests, program = write(tmp_path, "def test_good():\n    assert 1\n"), tmp_path / "sanitizer"
    cases = tmp_path / "tests" / "test_cases.py"
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = sanitized: its own\n")
    cases.write_text(
        "import os, pytest\n@pytest.mark.sanitized\n"
        "@pytest.mark.parametrize('x', ['a', 'b b', 'c'])\n"
        "def test_it(x):\n    if x == 'b b':\n        os._exit(9)\n"
    )
    told = FAKE.format(record=tmp_path / "calls", python=sys.executable)
    broken = (
        f'"$@"; code=$?\n[ $code != 9 ] || echo "========= {gpu.ITS_OWN}: of hardware"\nexit $code'
    )
    program.write_text(told.replace('exec "$@"', broken))
    program.chmod(0o755)
    monkeypatch.setenv("COMPUTE_SANITIZER", str(program))
    monkeypatch.setattr(gpu, "SANITIZED", cases)
    monkeypatch.setattr(gpu, "ROOT", tmp_path)
    monkeypatch.setattr(gpu, "TOOLS", ("racecheck",))
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    out = tmp_path / "out"
    assert gpu.main(["--device", "cpu", "--output", str(out), "--cores", "2", tests]) == 1
    found = summary(tmp_path)
    assert found["racecheck"]["status"].startswith("the tool itself failed, in ")
    assert found["racecheck"]["status"].endswith("test_cases.py::test_it[b b]")
    assert found["racecheck"]["passed"] == found["racecheck-2"]["passed"] == 1
    assert found["racecheck-2"]["status"] == "ok" and "racecheck-3" not in found


def test_the_time_limit_ends_a_step_and_keeps_what_there_is(tmp_path, monkeypatch):
    tests = write(
        tmp_path,
        "import time\ndef test_good():\n    assert 1\ndef test_long():\n    time.sleep(600)\n",
    )
    monkeypatch.setattr(gpu, "TOOLS", ())
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    out = tmp_path / "out"
    for seconds in (4, 40):  # the first may be over before pytest has begun
        began = time.monotonic()
        arguments = ["--device", "cpu", "--output", str(out), "--cores", "2"]
        assert gpu.main([*arguments, "--seconds", str(seconds), tests]) == 1
        assert time.monotonic() - began < seconds + 20
        found = summary(tmp_path)["cpu"]
        assert found["status"] == "ended by the time limit"
        if found.get("passed"):
            break
    assert found["passed"] == 1


def test_an_interrupt_leaves_no_process_behind(tmp_path):
    mark = tmp_path / "mark"
    tests = write(
        tmp_path,
        "import pathlib, subprocess\ndef test_long():\n"
        "    child = subprocess.Popen(['sleep', '600'])\n"
        f"    pathlib.Path({str(mark)!r}).write_text(str(child.pid))\n    child.wait()\n",
    )
    # Two workers, and what they started; the sanitizers, which import torch, are not needed.
    code = "import gpu, sys; gpu.TOOLS = (); sys.exit(gpu.main())"
    run = start(tmp_path, tests, "--cores", "6", command=["-c", code])
    while not (mark.exists() and mark.read_text()):
        assert run.poll() is None, run.stdout.read()
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    run.communicate(timeout=60)
    assert run.returncode == 1 and summary(tmp_path)["cpu"]["status"] == "interrupted"
    began = time.monotonic()
    while runs(int(mark.read_text())):
        assert time.monotonic() - began < 10, "it goes on without its run"
        time.sleep(0.1)


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "ASK", "raise RuntimeError('no device')")
    monkeypatch.setattr(gpu.signal, "signal", lambda *_: None)
    tests = write(tmp_path, "def test_good():\n    assert 1\n")
    monkeypatch.setattr(gpu, "WRONG", tests)
    out = tmp_path / "out"
    arguments = ["--device", "cuda", "--output", str(out), "--cores", "2", "-k", "nothing", tests]
    assert gpu.main(arguments) == 1
    assert "no device" in summary(tmp_path)["build"]["status"]
