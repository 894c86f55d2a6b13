"""The C++ core and the CPU kernels under sanitizers: python tests/sanitizers/run.py [TEST ...]

1. The extension, built with AddressSanitizer and UndefinedBehaviorSanitizer, runs the tests of the
   ops that are named; any report ends the process.
2. `every_op.py` runs under valgrind's memcheck with the extension that is installed. Python and
   torch are full of reports; what counts is a report with a frame of ours in it, or about memory
   that we made. valgrind knows no AVX-512 and no AMX, so the kernels of narrower vectors run.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
import xml.etree.ElementTree as ElementTree
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.cpp_extension import include_paths, library_paths

from drrlhf import backends

ROOT = Path(__file__).resolve().parents[2]
BUILD = ROOT / "build" / "sanitized"
SOURCES = [ROOT / "csrc/ops.cpp", *sorted((ROOT / "csrc/cpu").glob("*.cpp"))]
COMPILER = os.environ.get("CXX", "c++")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
FLAGS = [
    *SANITIZE,
    "-std=c++20",
    "-O1",
    "-g",
    "-fPIC",
    "-fno-omit-frame-pointer",
    "-fopenmp",
    "-ffp-contract=off",
    "-fvisibility=hidden",
    "-DTORCH_EXTENSION_NAME=_C",
]
# Where the compiler finds its run-time libraries, which must come first in the process.
RUNTIMES = ("libasan.so", "libubsan.so")
CHOSEN = "cpp and not opcheck and not compile"


def runtimes() -> list[str]:
    ask = [COMPILER, "-print-file-name="]
    found = [
        subprocess.run([ask[0], ask[1] + name], capture_output=True, text=True).stdout.strip()
        for name in RUNTIMES
    ]
    return [path for path in found if Path(path).is_absolute() and Path(path).exists()]


def missing() -> str:
    """What this machine lacks, in one line; empty where nothing is missing."""
    if shutil.which(COMPILER) is None:
        return f"the compiler {COMPILER} is missing; apt-get install g++"
    if len(runtimes()) < len(RUNTIMES):
        return f"{COMPILER} has no {' or '.join(RUNTIMES)}; apt-get install libasan8 libubsan1"
    if shutil.which("valgrind") is None:
        return "valgrind is missing; apt-get install valgrind"
    if not backends.build_info()["built"]:
        return f"the C++ extension is missing: {backends.build_info()['reason']}"
    return ""


def build() -> Path:
    """Compiles what changed; the sanitized extension."""
    BUILD.mkdir(parents=True, exist_ok=True)
    library = BUILD / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"
    newest = max(path.stat().st_mtime for path in (ROOT / "csrc").rglob("*.*"))
    includes = [f"-isystem{p}" for p in (*include_paths(), sysconfig.get_path("include"))]

    def compiled(source: Path) -> str:
        out = BUILD / f"{source.parent.name}.{source.stem}.o"
        if not out.exists() or out.stat().st_mtime < newest:
            command = [COMPILER, *FLAGS, *includes, "-c", str(source), "-o", str(out)]
            subprocess.run(command, check=True)
        return str(out)

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, SOURCES))
    folders = library_paths()
    libraries = ["-lc10", "-ltorch", "-ltorch_cpu", "-ltorch_python"]
    command = [COMPILER, "-shared", *SANITIZE, "-fopenmp", *objects, "-o", str(library)]
    command += [*(f"-L{p}" for p in folders), *(f"-Wl,-rpath,{p}" for p in folders), *libraries]
    subprocess.run(command, check=True)
    return library


def run_tests(library: Path, tests: list[str]) -> int:
    settings = {
        "LD_PRELOAD": " ".join(runtimes()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=1",
        "UBSAN_OPTIONS": "print_stacktrace=1",
        "DRRLHF_EXTENSION": str(library),
        "DRRLHF_FILL": "1",
        "OMP_NUM_THREADS": "2",
    }
    # A sanitizer writes its report past Python, to where pytest must not capture it.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--capture=sys", "-k", CHOSEN, *tests]
    return subprocess.run(command, cwd=ROOT, env=os.environ | settings).returncode


def ours(stack: ElementTree.Element) -> list[bool]:
    """For each frame, the innermost first, whether it lies in our extension."""
    return ["drrlhf/_C" in (frame.findtext("obj") or "") for frame in stack.iter("frame")]


def counts(error: ElementTree.Element) -> bool:
    """Whether a report is about us.

    A value that nothing wrote is, where we use it or where it lies on the heap and we asked for the
    memory. On the stack it may be the empty half of a std::optional that torch's own header made
    in our function, and that torch compares together with its flag.
    """
    kind, stacks = error.findtext("kind") or "", [ours(stack) for stack in error.iter("stack")]
    if kind.startswith("Leak"):  # with --xml it looks for them unasked; Python frees little at exit
        return False
    if not kind.startswith("Uninit"):
        return any(any(stack) for stack in stacks)
    on_the_heap = "heap allocation" in (error.findtext("auxwhat") or "")
    return stacks[0][0] or (on_the_heap and any(any(stack) for stack in stacks[1:]))


def findings(report: Path) -> list[str]:
    """What memcheck wrote about our extension, a line each."""
    found = []
    for error in ElementTree.parse(report).getroot().iter("error"):
        if counts(error):
            names = [frame.findtext("fn") or "?" for frame in error.iter("frame")][:6]
            what = error.findtext("what") or error.findtext("xwhat/text")
            found.append(f"{error.findtext('kind')}: {what}: {' < '.join(names)}")
    return found


def memcheck() -> int:
    report = BUILD / "memcheck.xml"
    options = ["--track-origins=yes", "--num-callers=30", "--error-limit=no"]
    command = ["valgrind", *options, "--xml=yes", f"--xml-file={report}"]
    command += [sys.executable, str(Path(__file__).with_name("every_op.py"))]
    settings = {"PYTHONMALLOC": "malloc", "OMP_NUM_THREADS": "1", "DRRLHF_BACKEND": "cpp"}
    done = subprocess.run(command, cwd=ROOT, env=os.environ | settings)
    if done.returncode:
        return done.returncode
    found = findings(report)
    print("\n".join(found) or "memcheck: nothing found")
    return len(found) > 0


if __name__ == "__main__":
    if reason := missing():
        sys.exit(f"test-sanitizers: {reason}")
    sys.exit(run_tests(build(), sys.argv[1:]) or memcheck())
