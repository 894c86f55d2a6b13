"""Processes of their own, for what may end the process (a device assert ends its CUDA context) or
must be the first to import drrlhf."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# What such a process does is mostly the import of torch, and of what it compiles with: once for
# all, then a fork each.
FORKS = """
import json, os, sys
import torch, torch._dynamo
folder, statuses = sys.argv[1], []
for number, (code, environment, arguments) in enumerate(json.load(sys.stdin)):
    if not (process := os.fork()):
        for descriptor in (1, 2):
            told = os.open(f"{folder}/{number}.{descriptor}", os.O_WRONLY | os.O_CREAT)
            os.dup2(told, descriptor)
        os.environ.update(environment)
        sys.argv[1:] = arguments
        break
    statuses.append(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))
else:
    print(json.dumps(statuses))
    sys.exit()
exec(compile(code, "-c", "exec"), {"__name__": "__main__"})
"""


def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Python code in a child, with these environment variables besides those of the tests."""
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def run_each(
    cases: list[tuple[str, dict[str, str], list[str]]],
) -> list[subprocess.CompletedProcess[str]]:
    """Each (code, environment, arguments) in a child in which torch is imported, and no more."""
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-c", FORKS, folder],
            input=json.dumps(cases),
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        told = [[Path(folder, f"{k}.{d}").read_text() for d in (1, 2)] for k in range(len(cases))]
    statuses = json.loads(done.stdout)
    return [
        subprocess.CompletedProcess(code, status, *text)
        for (code, *_), status, text in zip(cases, statuses, told, strict=True)
    ]
