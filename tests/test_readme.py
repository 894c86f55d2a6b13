"""Every snippet and command of the README, as it stands."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from trl_fixtures import tiny_llama_dir, tiny_pairs
from typer.testing import CliRunner

from drrlhf.bench.heads import COMPILED, PLAIN, TRL
from drrlhf.bench.results import newest
from drrlhf.bench.table import readme_tables
from drrlhf.cli import app
from evidence.shift import findings, page, radius

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


COMMANDS = [c for block in blocks("sh") for c in block.strip().splitlines()]
INSTALL = [c for c in COMMANDS if c.startswith("pip ")]
MAKE = [c for c in COMMANDS if c.startswith("make ")]
MADE_BY_TRAINING = ("metrics.jsonl", "training.png")
SHELL = [c for c in COMMANDS if c.startswith("drrlhf ")]


def test_every_command_is_of_a_kind_that_is_tested():
    assert set(COMMANDS) == {*INSTALL, *MAKE, *SHELL}
    assert len(blocks("python")) == 1 and len(blocks("diff")) == 1 and SHELL and MAKE and INSTALL


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md", "evidence/shift/README.md"])
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
    rows = [dict(row) for row in tiny_pairs(8)]
    (path / "my_pairs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    prompts = ({"prompt": row["prompt"]} for row in rows)
    (path / "my_prompts.jsonl").write_text("".join(json.dumps(r) + "\n" for r in prompts))
    scores = ({"margin": 3.0 - i, "domain": "ab"[i % 2]} for i in range(4) for _ in range(16))
    (path / "my_scores.jsonl").write_text("".join(json.dumps(r) + "\n" for r in scores))
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
    """The first by a process of its own, which takes seconds to start."""
    words = shlex.split(command)
    if command == SHELL[0]:
        run([sys.executable, "-m", "drrlhf", *words[1:]], folder)
    else:
        monkeypatch.chdir(folder)
        done = CliRunner().invoke(app, words[1:], prog_name="drrlhf")
        assert done.exit_code == 0, f"{command}\n{done.output}\n{done.stderr}\n{done.exception!r}"
    if "--output-dir" in words:
        out = folder / words[words.index("--output-dir") + 1]
        made = ("report.html", "report.json") if "stress" in words[:2] else MADE_BY_TRAINING
        assert all((out / name).stat().st_size for name in made)


def test_python_snippet(tmp_path):
    assert "tensor(" in run([sys.executable, "-c", blocks("python")[0]], tmp_path)


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
    assert "'train_loss'" in run([sys.executable, "-c", script, str(ROOT / "tests")], folder)


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
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode and "expected auto, cpu, cuda or none, got 'gpu'" in done.stderr


def test_changelog_names_the_version():
    from drrlhf import __version__

    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_the_tables_are_the_kept_measurements():
    """Every table that a kept result has the records for, as `drrlhf bench --readme` prints it."""
    tables = readme_tables(ROOT / "benchmarks" / "results")
    assert "robust_risk" in tables
    for name, table in tables.items():
        assert table in README, f"drrlhf bench --readme prints the current {name} table"


def test_the_sentences_about_the_head_are_the_kept_measurements():
    folder, text = ROOT / "benchmarks" / "results", " ".join(README.split())

    def kept(op, metric, contender, key="value"):
        (found,) = (
            record[key]
            for record in newest(folder, op)["records"]
            if record["op"] == op and record["metric"] == metric and record["axis"] is None
            and record["dtype"] == "bfloat16" and record["contender"] == contender
        )  # fmt: skip
        return found

    for metric, sentence in (
        ("forward", "take {} ms where plain PyTorch takes {} and `torch.compile` {}"),
        ("forward+backward", "gradient {} ms where these take {} and {}"),
    ):
        found = [
            kept("token_logprobs", metric, name) for name in ("drrlhf", "log_softmax", COMPILED)
        ]
        assert sentence.format(*(f"{t:.3g}" for t in found)) in text
    found = [
        kept("linear_token_logprobs", "peak memory, forward+backward", name, "peak_mib")
        for name in ("drrlhf", PLAIN)
    ]
    assert "takes {:.0f} MiB of memory beyond its inputs, {:.0f} with".format(*found) in text
    speeds = [
        kept("dpo_step", "tv:0.1, forward+backward", name, "tokens_per_s")
        for name in ("drrlhf", PLAIN, TRL)
    ]
    sentence = (
        "{:.0f} tokens/s with the total-variation adversary, {:.0f} with full logits, and {:.0f}"
    )
    assert sentence.format(*speeds) in text


def test_the_advice_on_sets_is_that_of_the_evidence():
    _, records, dpo, suggestions = page.load(page.HERE / "results")
    text = " ".join(README.split())

    def points(shift, word, measure="out"):
        found = findings.findings(findings.table(records, shift, measure))
        return {name: abs(100 * one.difference) for name, one in found.items() if one.word == word}

    rare = points("rare", "helps")
    assert set(rare) == {"group", "balanced"}
    assert f"gained {rare['group']:.1f} and {rare['balanced']:.1f} points" in text
    inside = findings.findings(findings.table(records, "rare", "in"))
    lost = [f"{-100 * inside[name].difference:.1f}" for name in ("group", "balanced")]
    assert "for {} and {} in the other 95 %".format(*lost) in text
    assert not any(points(shift, "helps") for shift in findings.FAMILIES if shift != "rare")
    assert not points("unseen", "helps") and not points("unseen", "hurts")
    less = {name: -values for name, values in findings.table(records, "unseen", "out nll").items()}
    nats = {n: -f.difference for n, f in findings.findings(less).items() if f.word == "hurts"}
    assert set(nats) == {"kl-trim", "cvar-trim", "optimistic"}
    low, high = min(nats.values()), max(nats.values())
    assert f"by {low:.2f} to {high:.2f} nats" in text
    votes, close = points("votes", "hurts"), points("close", "hurts")
    assert set(votes) == {"tv", "tv-trim"} and set(close) == {"tv", "kl", "chi2"}
    lost = f"`tv` lost a reward model {votes['tv']:.1f} points, `tv` with `trim` "
    assert f"{lost}{votes['tv-trim']:.1f}" in text
    assert f"lost {min(close.values()):.1f} to {max(close.values()):.1f} points" in text
    gained = [findings.findings(findings.table(dpo, "dpo-far", m)) for m in ("out", "worst", "in")]
    said = [{n: f"{100 * f.difference:.1f}" for n, f in one.items() if f.word != "nothing"}
            for one in gained]  # fmt: skip
    assert [set(one) for one in said] == [{"kl"}, {"kl"}, set()]
    assert all(one["kl"].difference > 0 for one in gained)
    assert f"gained {said[0]['kl']} points of accuracy, {said[1]['kl']} in the worst" in text
    in_votes = findings.findings(findings.table(dpo, "dpo-votes", "out"))
    assert {one.word for one in in_votes.values()} == {"nothing"}
    share = {
        (rule, shift): radius.coverage(suggestions, shift, rule, "tv")
        for rule in radius.RULES for shift in ("rare", "unseen", "wide", None)
    }  # fmt: skip
    covered = {key: f"{100 * value[0]:.0f} %" for key, value in share.items()}
    assert f"`{share['groups', None][1]}` in the median" in text
    groups = (covered["groups", shift] for shift in ("rare", "unseen"))
    assert "in {} of runs and on one never trained on in {};".format(*groups) in text
    chance = f"{100 * share['bootstrap', 'rare'][0]:.0f} and {covered['bootstrap', 'unseen']}"
    assert f"covered {chance}" in text
    assert covered["groups", "wide"] == covered["bootstrap", "wide"] == "0 %"
    for shift in findings.FAMILIES:
        found = findings.findings(radius.suggested(records, suggestions, shift, "out"))
        assert not any(one.word == "helps" for one in found.values())


def test_the_sentence_about_packing_is_the_kept_measurement():
    speeds = {
        record["contender"]: record["tokens_per_s"]
        for record in newest(ROOT / "benchmarks" / "results", "trainer_step")["records"]
        if record["op"] == "trainer_step" and record["metric"] == "step of mixed lengths"
    }
    ratio = speeds["drrlhf (packed)"] / speeds["drrlhf (padded)"]
    assert f"at {ratio:.2f} times the tokens/s with `padding_free=True`" in " ".join(README.split())


def test_the_sentence_about_the_policy_loss_is_the_kept_measurement():
    ratios = [
        f"{record['ratio']:.2f}"
        for record in newest(ROOT / "benchmarks" / "results", "policy_loss")["records"]
        if record["op"] == "policy_loss" and record["contender"] == "drrlhf"
    ]
    sentence = (
        "takes {} of the time of TRL's own with the total-variation adversary, {} with a reference "
        "policy and {} with sequence-level ratios; from hidden states (bfloat16, head of SmolLM2) "
        "{}."
    )
    assert sentence.format(*ratios) in " ".join(README.split())


def test_the_demo_sentence_is_the_kept_result():
    (path,) = (ROOT / "benchmarks" / "results").glob("reward_demo_*.json")
    methods = json.loads(path.read_text())["methods"]
    gains = {m: 100 * r["worst_minus_erm"]["mean"] for m, r in methods.items() if m != "erm"}
    error = 100 * methods["group"]["worst_minus_erm"]["standard_error"]
    others = [gain for method, gain in gains.items() if method != "group"]
    text = " ".join(README.split())
    assert f"`group` gains {gains['group']:.1f} ± {error:.1f} points" in text
    assert f"between {min(others):.1f} and {max(others):+.1f}" in text
    assert f"]({path.with_suffix('.png').relative_to(ROOT)})" in README


def test_the_sentence_about_the_grpo_demo_is_the_kept_result():
    from drrlhf.demo.grpo import mean_and_error

    (path,) = (ROOT / "benchmarks" / "results").glob("grpo_demo_*.json")
    result = json.loads(path.read_text())
    plain, robust = (run["rewards"] for run in result["runs"])
    start, after, worst = (
        mean_and_error(rewards["movie"])[0] for rewards in (result["start"], plain, robust)
    )
    text = " ".join(README.split())
    assert f"from {start:.2f} to {after:.2f}, and `tv:0.1` to {worst:.2f}" in text
    gains = []
    for name in ("amazon", "nyt"):
        pairs = zip(robust[name], plain[name], strict=True)
        mean, error = mean_and_error([r - p for r, p in pairs])
        gains.append(f"{mean:+.3f} ± {error:.3f}")
    assert "difference is {} and {}".format(*gains) in text
