"""All that a GPU has to say, in one command and five minutes: python tests/gpu.py

1. Builds the CUDA kernels for this GPU into the checkout, and meanwhile
2. runs the tests of the ops on Triton's, then on those of CUDA, in half of the cores each; and
   the tests of wrong ids on plain PyTorch; and
3. every CUDA kernel once under compute-sanitizer's memcheck and racecheck, a process for each.

A failure stops nothing. Everything is on disk as it happens: DIR/<step>.log has a line for every
test that ended, DIR/summary.json what became of each step so far. A step that the time leaves
unfinished is ended and says so. Exit status 1 unless all is well.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("memcheck", "racecheck")
SANITIZED = ROOT / "tests" / "ops" / "test_every_kernel.py"
WRONG = ROOT / "tests" / "ops" / "test_wrong_values.py"
# A test that has begun, in the lines of pytest -v; and what a sanitizer says of its own defects.
BEGUN = re.compile(r"^(\S*tests/\S+::.*?\]) ", re.MULTILINE)
ITS_OWN = "Internal Sanitizer Error"
ENDED = re.compile(r"\b(PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b")
# What this GPU needs: its architecture, and why what is installed does not run on it.
ASK = (
    "import torch\nfrom drrlhf import backends\n"
    "print('.'.join(map(str, torch.cuda.get_device_capability())))\nprint(backends._no_cuda())"
)


class Run:
    """The steps of one run: their logs, their processes, and what became of them."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self.folder = folder
        self.began, self.seconds = time.monotonic(), seconds
        self.steps: dict[str, dict[str, Any]] = {}
        self.processes: list[subprocess.Popen[bytes]] = []
        self.lock = threading.Lock()
        self.stopped = False
        folder.mkdir(parents=True, exist_ok=True)

    @property
    def left(self) -> float:
        return self.seconds - (time.monotonic() - self.began)

    def note(self, name: str, **facts: Any) -> None:
        """Add facts of a step to the summary, which is whole at any time."""
        with self.lock:
            self.steps.setdefault(name, {}).update(facts)
            part = self.folder / "summary.json.part"
            part.write_text(json.dumps(self.steps, indent=1) + "\n")
            part.replace(self.folder / "summary.json")

    def step(self, name: str, command: list[str], **environment: str) -> int:
        """Run a command to its end, or that of the time; its exit status."""
        with self.lock:
            if self.stopped or self.left <= 0:
                process = None
            else:
                log = (self.folder / f"{name}.log").open("wb")
                process = subprocess.Popen(
                    command,
                    cwd=ROOT,
                    env=os.environ | environment,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
                self.processes.append(process)
        if process is None:
            self.note(name, status="not begun: no time was left")
            return 1
        began = time.monotonic()
        self.note(name, status="running", command=" ".join(command))
        try:
            code = process.wait(timeout=max(1.0, self.left))
            status = "ok" if code == 0 else f"exit status {code}"
        except subprocess.TimeoutExpired:
            code, status = 1, "ended by the time limit"
            end(process)
        if self.stopped:
            status = "interrupted"
        self.note(name, status=status, seconds=round(time.monotonic() - began, 1))
        self.note(name, **counts(self.folder / f"{name}.log"))
        print(f"{name}: {self.steps[name]}", flush=True)
        return code

    def stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.processes:
                end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """End a process of ours and all that it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def counts(log: Path) -> dict[str, int]:
    """How many tests ended how, from the lines of pytest -v."""
    found: dict[str, int] = {}
    for line in log.read_text(errors="replace").splitlines():
        if "tests/" in line and "::" in line and (hit := ENDED.search(line)):
            found[hit[1].lower()] = found.get(hit[1].lower(), 0) + 1
    return found


def pytest(*arguments: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "pytest",
        "-o",
        "addopts=--strict-markers",
        "-rN",
        "-v",
        "--tb=short",
        "--continue-on-collection-errors",
        "-p",
        "no:cacheprovider",
        *arguments,
    ]


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("tests", nargs="+", help="files of tests")
    parser.add_argument("--device", default=os.environ.get("DRRLHF_TEST_DEVICE", "cuda"))
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu", metavar="DIR")
    parser.add_argument("--seconds", type=float, default=290.0, help="all steps together")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("-k", default="", help="as pytest's")
    parser.add_argument("--built", action="store_true", help="the extension is: build none")
    given = parser.parse_args(arguments)
    run = Run(given.output, given.seconds)
    # A wait for a thread does not hear of signals; this ends what the threads wait for.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: threading.Thread(target=run.stop).start())

    workers = max(1, given.cores // 2 - 1)
    failed: list[str] = []

    def test(backend: str, files: list[str]) -> None:
        # On a CPU there is one run of all its backends, to try the rest of this file.
        # All layers: nothing else proves anything about this chip.
        names = {"DRRLHF_TEST_DEVICE": given.device, "DRRLHF_TEST_BACKEND": backend}
        names["DRRLHF_ALL"] = "1"
        side_by_side = ["-n", str(workers)] if workers > 1 else ["-p", "no:xdist"]
        chosen = ["-k", given.k] if given.k else []
        junit = f"--junitxml={run.folder / backend}.xml"
        command = pytest(*side_by_side, *chosen, junit, *files)
        if run.step(backend, command, OMP_NUM_THREADS="1", **names):
            failed.append(backend)

    def sanitize(tool: str) -> None:
        program = os.environ.get("COMPUTE_SANITIZER", "compute-sanitizer")
        if shutil.which(program) is None:
            run.note(tool, status=f"left out: there is no {program}")
            failed.append(tool)
            return
        # Kernels of ours alone: those of torch are many, and known.
        command = [program, "--tool", tool, "--error-exitcode", "9", "--kernel-name", "kns=drrlhf"]
        command += pytest("-p", "no:xdist", "-m", "sanitized", str(SANITIZED))
        names = {"DRRLHF_TEST_DEVICE": given.device, "DRRLHF_TEST_BACKEND": "cuda"}
        begun: list[str] = []
        for number in itertools.count(1):
            name = tool if number == 1 else f"{tool}-{number}"
            left = [f"--deselect={test}" for test in begun]
            if run.step(name, command + left, PYTORCH_NO_CUDA_MEMORY_CACHING="1", **names):
                failed.append(name)
            log = (run.folder / f"{name}.log").read_text(errors="replace") if run.left > 0 else ""
            here = [test for test in BEGUN.findall(log) if test not in begun]
            if ITS_OWN not in log or not here:
                return
            # Its end says nothing of the kernel; what comes after that test is still to be seen.
            run.note(name, status=f"the tool itself failed, in {here[-1]}")
            begun += here

    def build() -> bool:
        asked = subprocess.run(
            [sys.executable, "-c", ASK], cwd=ROOT, capture_output=True, text=True, check=False
        )
        if asked.returncode:
            run.note("build", status=f"no GPU: {asked.stderr.strip().splitlines()[-1]}")
            return False
        architecture, reason = asked.stdout.rstrip("\n").split("\n", 1)
        command = [sys.executable, "setup.py", "build_ext", "--inplace"]
        command += ["--force"] if reason.strip() else []
        return not run.step(
            "build",
            command,
            DRRLHF_BUILD="cuda",
            TORCH_CUDA_ARCH_LIST=architecture,
            MAX_JOBS=str(given.cores),
        )

    def cuda() -> None:
        if given.device != "cpu" and not given.built and not build():
            failed.append("build")
            return
        tools = [threading.Thread(target=sanitize, args=(tool,)) for tool in TOOLS]
        for thread in tools:
            thread.start()
        if given.device != "cpu":
            test("cuda", given.tests)
        for thread in tools:
            thread.join()

    def others() -> None:
        if given.device == "cpu":
            test("cpu", given.tests)
            return
        test("triton", given.tests)
        # Plain PyTorch serves where there is no kernel; what is its own there is wrong ids.
        test("reference", [str(WRONG)])

    threads = [threading.Thread(target=cuda), threading.Thread(target=others)]
    for thread in threads:
        thread.start()
    for thread in threads:
        while thread.is_alive():
            thread.join(0.2)
    return 1 if failed or run.stopped else 0


if __name__ == "__main__":
    sys.exit(main())
