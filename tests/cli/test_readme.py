"""Every snippet, command and number of README.md and docs/, as they stand."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from trl_fixtures import tiny_llama_dir, tiny_pairs
from typer.testing import CliRunner

from drrlhf.bench.results import newest
from drrlhf.cli import app
from drrlhf.files import json_lines
from drrlhf.seeds import mean_and_error
from evidence.shift import findings, page, radius, summary
from evidence.shift.methods import METHODS
from tools import api, generated

ROOT = Path(__file__).parents[2]
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in generated.pages()}
README = PAGES["README.md"]
EVIDENCE = [path.relative_to(ROOT).as_posix() for path in generated.evidence_pages()]


def blocks(language: str, text: str = README) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", text, re.DOTALL)


COMMANDS = [
    command
    for text in PAGES.values()
    for block in blocks("sh", text)
    for command in block.strip().splitlines()
]
PYTHON = [(name, block) for name, text in PAGES.items() for block in blocks("python", text)]
INSTALL = [c for c in COMMANDS if c.startswith("pip ")]
MAKE = [c for c in COMMANDS if c.startswith("make ")]
MADE_BY_TRAINING = ("metrics.jsonl", "training.png")
SHELL = [c for c in COMMANDS if c.startswith("drrlhf ")]
PROCESS = "drrlhf doctor"  # run as a process of its own, the others in this one


def test_every_command_is_of_a_kind_that_is_tested():
    assert set(COMMANDS) == {*INSTALL, *MAKE, *SHELL}
    assert len(blocks("python")) == 1 and len(blocks("diff")) == 1 and MAKE and INSTALL
    assert PROCESS in SHELL and len(SHELL) > 5 and len(PYTHON) > 4
    languages = {one for text in PAGES.values() for one in re.findall(r"^```(\w+)$", text, re.M)}
    assert languages == {"sh", "python", "diff", "yaml"}


@pytest.mark.parametrize("name", [*PAGES, "CONTRIBUTING.md", *EVIDENCE])
def test_what_links_and_paths_name_is_there(name):
    text, folder = (ROOT / name).read_text(), (ROOT / name).parent
    links = {link for link in re.findall(r"\]\(([^)#]+)[^)]*\)", text) if "://" not in link}
    whole = r"`((?:benchmarks|csrc|drrlhf|evidence|kernels|tests|tools)/[\w./-]*)`"
    paths = {ROOT / path for path in re.findall(whole, text)}
    modules = re.findall(r"python -m ((?:evidence|tools|drrlhf)\.[\w.]+)", text)
    paths |= {ROOT / f"{module.replace('.', '/')}.py" for module in modules}
    assert links or paths
    assert [path for path in sorted(paths) if not path.exists()] == []
    assert [link for link in sorted(links) if not (folder / link).exists()] == []


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A place with the files that the commands name."""
    path = tmp_path_factory.mktemp("readme")
    tiny_llama_dir(path).rename(path / "DIR")
    tiny_llama_dir(path, rms_norm_eps=0.1).rename(path / "my_policy")
    rows = [dict(row) for row in tiny_pairs(8)]
    (path / "my_pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    prompts = ({"prompt": row["prompt"]} for row in rows)
    (path / "my_prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in prompts))
    scores = ({"margin": 3.0 - i, "domain": "ab"[i % 2]} for i in range(4) for _ in range(16))
    (path / "my_scores.jsonl").write_text("".join(json.dumps(r) + "\n" for r in scores))
    candidates = {"candidates": ["a", "b", "c"], "gold": [0.1, 0.9, 0.4], "scores": [1, 2, 3]}
    lines = (json.dumps({"prompt": f"p{i}"} | candidates) + "\n" for i in range(4))
    (path / "my_candidates.jsonl").write_text("".join(lines))
    score = "def score(completions, **_):\n    return [len(set(c.split())) for c in completions]\n"
    (path / "my_module.py").write_text(score)
    return path


def run(command: list[str], cwd: Path) -> str:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.mark.parametrize("command", SHELL)
def test_shell_commands(command, folder, monkeypatch):
    words = shlex.split(command)
    if command == PROCESS:
        run([sys.executable, "-m", "drrlhf", *words[1:]], folder)
    else:
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "path", [*sys.path])  # the reward function's folder is put there
        done = CliRunner().invoke(app, words[1:], prog_name="drrlhf")
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.stderr}"
    if "--output-dir" in words:
        out = folder / words[words.index("--output-dir") + 1]
        made = ("report.html", "report.json") if "stress" in words[:2] else MADE_BY_TRAINING
        assert all((out / name).stat().st_size for name in made)


def test_the_gate_of_a_workflow(folder, monkeypatch):
    """It runs as it stands, and leaves what the next step reads, whether gates are met or not."""
    (block,) = re.findall(r"^```yaml\n(.*?)^```$", PAGES["docs/stress.md"], re.M | re.S)
    command = block[block.index("drrlhf") : block.index("- uses")].replace("\\\n", " ")
    monkeypatch.chdir(folder)
    done = CliRunner().invoke(app, shlex.split(command)[1:], prog_name="drrlhf")
    assert done.exit_code in (0, 1), done.output
    assert "<testcase" in (folder / "gates.xml").read_text()
    assert (folder / "stress" / "report.html").stat().st_size


@pytest.mark.parametrize("name, code", PYTHON, ids=[f"{n}-{i}" for i, (n, _) in enumerate(PYTHON)])
def test_python_snippets(name, code, folder, monkeypatch, capsys):
    """Each runs by itself, as a reader copies it."""
    monkeypatch.chdir(folder)
    exec(compile(code, name, "exec"), {"__name__": "__main__"})
    assert ("print(" in code) == bool(capsys.readouterr().out)


def test_diff_snippet(folder):
    """What the diff leaves behind is a script that runs, once its three inputs exist."""
    added = [line[1:] for line in blocks("diff")[0].splitlines() if line[:1] in ("+", " ")]
    script = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from trl_fixtures import tiny_pairs\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained('DIR')\n"
        "tokenizer = AutoTokenizer.from_pretrained('DIR')\n"
        "dataset = tiny_pairs(8)\n" + "\n".join(added)
    )
    if not torch.cuda.is_available():  # TRL's own default asks for a GPU
        script = script.replace('output_dir="out"', 'output_dir="out", use_cpu=True')
    assert "'train_loss'" in run(
        [sys.executable, "-c", script, str(ROOT / "tests" / "support")], folder
    )


@pytest.mark.parametrize("command", MAKE)
def test_make_targets_exist_and_run_in_ci(command):
    target = command.split()[1]
    run(["make", "-n", target], ROOT)
    assert f"make {target}" in (ROOT / ".ci" / "run").read_text()


def test_install_command_in_pure_python(tmp_path):
    """`pip install .` where nothing can be compiled: it works, and `doctor` says so."""
    assert 'pip install --no-build-isolation ".[trl]"' in INSTALL
    source, site = tmp_path / "source", tmp_path / "site"
    ignored = {".git", ".venv", "build", "demo", "__pycache__", "drrlhf.egg-info"}

    def skip(folder, names):
        top = Path(folder) == ROOT
        return [n for n in names if (top and n in ignored) or n.endswith((".so", "_build.json"))]

    shutil.copytree(ROOT, source, ignore=skip)
    environment = {**os.environ, "DRRLHF_BUILD": "none"}
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    subprocess.run([*pip, "--target", str(site), "."], cwd=source, env=environment, check=True)
    assert not list(site.rglob("_C*.so"))
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        # An editable install beside it would lend its compiled module.
        "sys.meta_path = [f for f in sys.meta_path if 'ditable' not in repr(f)]\n"
        "import torch, drrlhf, drrlhf.cli\n"
        f"assert drrlhf.__file__.startswith({str(site)!r})\n"
        "print(drrlhf.robust_risk(torch.tensor([1.0, 3.0]), 'cvar:0.5').value.item())\n"
        "print(drrlhf.backends.build_info()['reason'])"
    )
    value, reason = run([sys.executable, "-c", code], tmp_path).strip().splitlines()
    assert value == "3.0" and reason == "DRRLHF_BUILD=none was set"


def test_an_unknown_build_mode_is_refused(tmp_path):
    environment = {**os.environ, "DRRLHF_BUILD": "gpu"}
    done = subprocess.run(
        [sys.executable, "setup.py", "--version"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode and "expected auto, cpu, cuda or none, got 'gpu'" in done.stderr


def test_changelog_names_the_version():
    from drrlhf import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_every_block_is_what_the_kept_results_generate():
    known, used = generated.blocks(), set()
    evidence = {name: (ROOT / name).read_text() for name in EVIDENCE}
    for name, text in (PAGES | evidence).items():
        used |= {*generated.names(text)}
        assert text.count("<!-- generated: ") == text.count("<!-- end -->")
        assert len(generated.names(text)) == text.count("<!-- generated: ")
        fresh = generated.rewritten(text, known)
        assert fresh == text, f"{name}: run python -m tools.generated --write"
    assert used == {*known}, "everything that is generated stands on a page"


def test_a_block_that_nothing_generates_is_refused():
    text = "<!-- generated: nothing -->\nx\n<!-- end -->"
    with pytest.raises(ValueError, match="expected one of a, b, got 'nothing'"):
        generated.rewritten(text, {"a": "", "b": ""})


def test_an_empty_block_is_filled_and_leaves_the_next_alone():
    mark = "<!-- generated: {} -->\n{}<!-- end -->\n"
    known = {"a": "new", "b": "other"}
    filled = mark.format("a", "new\n") + "## Between\n" + mark.format("b", "other\n")
    empty = mark.format("a", "") + "## Between\n" + mark.format("b", "old\n")
    assert generated.rewritten(empty, known) == filled


def test_the_generator_finds_and_mends_a_stale_block(tmp_path, monkeypatch, capsys):
    fresh = "before\n<!-- generated: a -->\n| new |\n<!-- end -->\nafter\n"
    (tmp_path / "README.md").write_text(fresh.replace("new", "old"))
    monkeypatch.setattr(generated, "ROOT", tmp_path)
    monkeypatch.setattr(generated, "blocks", lambda: {"a": "| new |"})
    monkeypatch.setattr(sys, "argv", ["generated"])
    with pytest.raises(SystemExit):
        generated.main()
    assert "out of date: README.md" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["generated", "--write"])
    generated.main()
    assert (tmp_path / "README.md").read_text() == fresh
    monkeypatch.setattr(sys, "argv", ["generated"])
    generated.main()


# What looks like a measured result: a number before a unit, a decimal fraction, or an error.
WORD = r"\b(?:one|two|three|four|five|six|eight|ten|hundreds?|thousands?)(?: of)?[\s-]+"
UNIT = (
    r"(?:ms|µs|us|ns|s|seconds?|minutes?|hours?|%|per cent|percent|points?|nats?|times|x"
    r"|MiB|GiB|MB|GB|GB/s|TFLOP/s|tokens/s)(?![\w/])"
)
MEASURED = re.compile(rf"(?:\d[\s-]*|{WORD}){UNIT}|\d\.\d|±")
# Definitions, settings and versions.
NO_RESULTS = (
    "arXiv 2503.00539",
    "arXiv 1911.08731",
    "Python ≥ 3.10",
    "Apache-2.0",
    "compute capability 8.0",
    "10 % of the probability mass",
    "the worst 30 %",
    "the highest 5 % of the losses",
    "p < 0.05",
    "95 % intervals",
)


def measured(text: str) -> list[str]:
    """What a page's prose says in numbers that no block holds."""
    text = generated.BLOCK.sub("", text)
    text = re.sub(r"```.*?```|`[^`]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    text = " ".join(text.split())
    for phrase in NO_RESULTS:
        text = text.replace(phrase, "")
    return [found[0] for found in MEASURED.finditer(text)]


@pytest.mark.parametrize("name", PAGES)
def test_results_stand_in_blocks_alone(name):
    assert measured(PAGES[name]) == []


def test_a_result_in_prose_is_found():
    for text in (
        "It takes 15.7 ms.",
        "in 95 % of runs",
        "gained 2 points",
        "1,000 tokens/s",
        "five seconds",
        "ten times as fast",
        "50 MiB",
        "1.2 ± 0.7",
        "a ratio of 0.31",
        "300 GB/s",
        "2x",
        "95%",
    ):
        assert measured(text), text
    assert not measured("`tv:0.1` on 2 cores, 8 sequences of 256 tokens, at p < 0.05, two steps")
    everything = " ".join(" ".join(PAGES.values()).split())
    assert [phrase for phrase in NO_RESULTS if phrase not in everything] == []


def test_the_advice_on_sets_is_that_of_the_evidence():
    """The words around the generated tables, in README.md and docs/sets.md, say this."""
    _, records, dpo, suggestions = page.load(page.HERE / "results")

    def methods(shift, word, measure="out", of=records):
        found = findings.findings(findings.table(of, shift, measure))
        return {name for name, one in found.items() if one.word == word}

    assert {s for s in findings.FAMILIES if methods(s, "helps")} == {"rare"}
    assert methods("rare", "helps") == {"group", "balanced"}
    assert methods("unseen", "hurts") == set()
    assert {"tv", "tv-trim"} == methods("votes", "hurts")
    assert {"tv", "kl", "chi2"} == methods("close", "hurts")
    assert (
        methods("dpo-far", "helps", of=dpo) == methods("dpo-far", "helps", "worst", dpo) == {"kl"}
    )
    assert not any(methods("dpo-far", word, "in", dpo) for word in ("helps", "hurts"))
    assert not any(methods("dpo-votes", word, of=dpo) for word in ("helps", "hurts"))
    for shift in findings.FAMILIES:
        found = findings.findings(radius.suggested(records, suggestions, shift, "out"))
        assert not any(one.word == "helps" for one in found.values())
    seeds = {record["seed"] for record in records}
    assert len(seeds) == len({record["seed"] for record in dpo}) == 10
    assert len(findings.FAMILIES) == 6 and len(findings.DPO_FAMILIES) == 2


def test_the_recommended_method_is_one_that_helped():
    """The rule of the generated table, on findings of our own."""

    def one(difference, p):
        return findings.Finding(0.8, difference, difference, difference, p)

    found = {"a": one(0.01, 0.01), "b": one(0.02, 0.01), "c": one(0.03, 0.2), "d": one(-0.01, 0.01)}
    assert summary._list(found, "helps") == "`b` +2.0, `a` +1.0"
    assert summary._list(found, "hurts") == "`d` -1.0"
    assert summary._advice(found) == "`b` or `a`"
    assert summary._advice({"c": found["c"], "d": found["d"]}) == "plain training"


def test_the_tables_of_the_evidence():
    """By hand from the records, for one row of each."""
    _, records, dpo, suggestions = page.load(page.HERE / "results")
    made = summary.tables(page.HERE / "results")

    def row(name, start):
        (found,) = (line for line in made[name].splitlines() if line.startswith(start))
        return found

    def one(shift, method, measure, of=records):
        return 100 * findings.findings(findings.table(of, shift, measure))[method].difference

    gained = [f"{one('dpo-far', 'kl', measure, dpo):+.1f}" for measure in ("out", "worst", "in")]
    assert f"`kl` {gained[0]} |" in row("shift", "| `dpo-far`")
    cells = row("shift_helped", "| `dpo-far`").split(" | ")
    assert [cell.strip("*|").split()[0].strip("*") for cell in cells[2:]] == gained
    assert f"`close` {one('close', 'chi2', 'out'):+.1f} |" in row("shift_hurt", "| `chi2`")
    worse = f"`optimistic` {one('unseen', 'optimistic', 'out nll') / 100:+.2f}"
    assert worse in row("shift_calibration", "| `unseen`")
    covered, median = radius.coverage(suggestions, "rare", "groups", "tv")[0], "`tv:0.02`"
    assert f"| {median} | " in row("suggest_radius", "| `--group-by")
    assert f" | {covered:.0%} | " in row("suggest_radius", "| `--group-by")
    configs = METHODS["chi2"]
    index = next(i for i, c in enumerate(configs) if (c.ambiguity, c.lr) == ("chi2:0.5", 3e-4))
    tried = findings.table(records, "close", "out", {"chi2": index})["chi2"]
    alike = [(c.lr, c.weight_decay) for c in METHODS["erm"]].index(
        (3e-4, configs[index].weight_decay)
    )
    plain = findings.table(records, "close", "out", {"erm": alike})["erm"]
    assert row("shift_strength", "| `chi2:0.5`").endswith(
        f"| {100 * (tried - plain).mean():+.1f} |"
    )
    methods = row("shift_methods", "| `kl` ")
    assert methods == "| `kl` | `kl:0.02`, `kl:0.05`, `kl:0.2` | `kl:0.05` |"


def test_the_tables_of_the_demos_and_the_gpu():
    def of(*values):
        return {"mean": values[0], "standard_error": values[1]}

    reward = {
        name: {"accuracy": {"a": of(accuracy, 0.0)}, "worst_minus_erm": of(gain, 0.01)}
        for name, accuracy, gain in (("erm", 0.8, 0.0), ("tv", 0.75, -0.05))
    }
    made = generated._reward_demo({"protocol": {"seeds": 5}, "methods": reward})
    assert made.splitlines()[2:] == ["| `erm` | 80.0 | – |", "| `tv` | 75.0 | -5.0 ± 1.0 |"]
    runs = [("erm", [0.25, 0.5]), ("tv:0.1", [0.5, 0.5])]
    made = generated._grpo_demo(
        {
            "settings": {"steps": 3, "seeds": 2},
            "start": {"a": [0.1, 0.3]},
            "domains": {"a": "seen"},
            "runs": [{"ambiguity": name, "rewards": {"a": values}} for name, values in runs],
        }
    )
    assert made.splitlines()[2:] == ["| a (seen) | 0.20 | 0.38 | 0.50 | +0.125 ± 0.125 |"]
    of_prompts, alone = (metric for metric, _ in generated._GPU_STEPS)
    step = {"unit": "ms", "spread": 2.4, "peak_mib": 1536.0}
    records = [
        step
        | {"contender": name, "metric": metric, "shape": [1, 16, tokens], "value": 2e6 / speed}
        | {"tokens_per_s": speed}
        for metric, tokens, name, speed in (
            (of_prompts, 1792, "drrlhf (shared)", 4e4),
            (of_prompts, 1792, "drrlhf (shared, liger)", 5e4),
            (of_prompts, 1792, "trl", 2e4),
            (of_prompts, 1792, "trl with liger", 2.5e4),
            (alone, 512, "drrlhf (erm)", 1.23e4),
            (alone, 512, "drrlhf (erm, liger)", 1.5e4),
            (alone, 512, "trl", 1e4),
            (alone, 512, "trl with liger", 1.25e4),
        )
    ]
    about = {"versions": {"trl": "1.16.0"}, "device": "X", "date": "D", "commit": "C" * 40}
    titles = (
        "16 pairs, prompts of 1536, answers of 256",
        "16 pairs of 512 tokens, no prompt in common",
    )
    made = generated._gpu_speed({**about, "records": records}).splitlines()
    head = "| DPO step, tokens/s, X | drrlhf | TRL 1.16 | drrlhf, Liger's layers | TRL 1.16,"
    assert made[0].startswith(head)
    assert made[2:] == [
        f"| {titles[0]} | 40.0k | 20.0k | 50.0k | 25.0k |",
        f"| {titles[1]} | 12.3k | 10.0k | 15.0k | 12.5k |",
    ]
    made = generated._gpu_step({**about, "records": records}).splitlines()
    assert made[0] == f"| X, D, commit {'C' * 7}; median ± IQR | {titles[0]} | {titles[1]} |"
    assert made[2:5] == [
        "| drrlhf, `shared` | 50 ± 2 ms, 1.5 GiB | – |",
        "| drrlhf, `shared, liger` | 40 ± 2 ms, 1.5 GiB | – |",
        "| TRL 1.16.0 | 100 ± 2 ms, 1.5 GiB | 200 ± 2 ms, 1.5 GiB |",
    ]
    part = {**about, "records": [r for r in records if "trl" not in r["contender"]][:1]}
    assert generated._gpu_speed(part).splitlines()[2:] == [f"| {titles[0]} | 40.0k | – | – | – |"]
    made = generated._gpu_step(part).splitlines()
    assert made[0].endswith(f" | {titles[0]} |") and made[2:] == [
        "| drrlhf, `shared` | 50 ± 2 ms, 1.5 GiB |"
    ]


def test_the_words_around_the_tables_are_what_these_say():
    results = ROOT / "benchmarks" / "results"
    rewards = generated._read("reward_demo")["methods"]
    gains = [method["worst_minus_erm"] for name, method in rewards.items() if name != "erm"]
    # "neither costs nor clearly gains accuracy"
    assert all(abs(gain["mean"]) < 2 * gain["standard_error"] for gain in gains)
    grpo = generated._read("grpo_demo")
    plain, robust = (run["rewards"] for run in grpo["runs"])

    def difference(domain):
        pairs = zip(plain[domain], robust[domain], strict=True)
        return mean_and_error([b - a for a, b in pairs])

    mean, error = difference("movie")  # "slowed learning"
    assert mean < -2 * error and "95" in grpo["domains"]["movie"]
    unseen = [domain for domain, share in grpo["domains"].items() if share == "unseen"]
    assert len(unseen) == 2 and all(mean < error for mean, error in map(difference, unseen))
    gpu: dict[str, dict[str, float]] = {}
    for r in generated.gpu_steps()["records"]:
        gpu.setdefault(r["metric"], {})[r["contender"]] = r["value"]
    for metric, times in ((metric, gpu[metric]) for metric, _ in generated._GPU_STEPS):
        of_sets = [[t for n, t in times.items() if "liger" not in n and n.startswith("drrlhf")]]
        of_sets.append([t for n, t in times.items() if "liger" in n and n.startswith("drrlhf")])
        for ours, theirs in zip(of_sets, (times["trl"], times["trl with liger"]), strict=True):
            assert max(ours) < 1.01 * theirs  # "ours takes about as long", the sets too
        robust, plain = (
            [t for n, t in times.items() if n.startswith("drrlhf") and n.endswith(end)]
            for end in ("tv:0.1)", "(shared)" if metric != "step in one forward" else "(erm)")
        )
        assert max(robust) < 1.01 * min(plain)  # "take as long"
    lines = json_lines(generated._kept("gpu-ops", ".jsonl"))
    head = {(one["who"], one["kind"]): one.get("ms") for one in lines if one["item"] == "head"}
    times = " | ".join(f"{head['trl', kind]:.1f} ms" for kind in ("forward", "frozen"))
    assert f"| TRL | {times} |" in PAGES["docs/head.md"]
    for ours in ("triton", "cuda"):
        assert head[ours, "frozen"] < head["trl", "frozen"]
        assert head[ours, "forward"] > head["trl", "forward"]
    trained = {
        record["contender"]: record["value"]
        for record in newest(results, "linear_token_logprobs")["records"]
        if record["op"] == "linear_token_logprobs"
        and record["axis"] is None
        and (record["dtype"], record["head"]) == ("float32", "trained")
        and record["metric"] == "forward+backward"
    }
    ours = [time for name, time in trained.items() if name.startswith("drrlhf")]
    assert len(ours) == 2 and trained["torch.compile"] < min(ours)


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


def test_a_name_is_listed_with_its_arguments_and_first_sentence(monkeypatch):
    def shown(x, *rest, y=1, **options):
        """The sum of x and y. More
        of it.

        And more.
        """

    def bare():
        pass

    home = types.SimpleNamespace(__all__=["shown", "LIMIT"], shown=shown, LIMIT=3)
    monkeypatch.setitem(sys.modules, "home", home)
    assert api.listed("home") == "- `shown(x, *rest, y, **options)`: The sum of x and y."
    # As its type checker's: nothing that exists when it runs.
    shown.__annotations__["options"] = "Unpack[Listed]"
    monkeypatch.setitem(globals(), "Listed", types.SimpleNamespace(__annotations__={"z": int}))
    assert api.listed("home") == "- `shown(x, *rest, y, z)`: The sum of x and y."
    home.__all__.append("bare")
    home.bare = bare
    with pytest.raises(ValueError, match="expected a docstring, got none"):
        api.listed("home")
