"""The report page: what it shows, that no text of the data is markup, and how a browser has it."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
import zipfile
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from drrlhf.stress import Attribute, Scores, stress_test
from drrlhf.stress.differences import marked
from drrlhf.stress.examples import LONGEST
from drrlhf.stress.report import PAGE, render
from drrlhf.stress.view import TEXTS, band, change_rows, gates, heat, percent

ROOT = Path(__file__).parent.parent.parent
EVIL = "<script>alert('evil')</script>"
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
NAN = float("nan")
NOTHING = {"value": NAN, "low": NAN, "high": NAN}


def number(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 0.05, "high": value + 0.05}


def scores(pairs: int = 60, group: str = "law") -> Scores:
    margin = np.round(np.random.default_rng(0).normal(0.5, 1.0, pairs), 2)
    codes = np.arange(pairs) % 2
    return Scores(
        margin=margin,
        prompts=np.arange(pairs),
        rows=pairs,
        attributes={"domain": Attribute(codes, ("film", group))},
    )


def plain(name: str = "model", **more) -> dict:
    return stress_test({name: scores(**more)}, resamples=20, min_support=5)


def use(change: str, sides: str, lost: float, kind: str = "form", pairs: int = 60) -> dict:
    return {
        "change": change,
        "sides": sides,
        "kind": kind,
        "what": f"what {change} does",
        "keeps": "not in code",
        "pairs": pairs,
        "accuracy_before": 0.7,
        "accuracy": number(0.7 - lost),
        "lost": number(lost),
        "success": number(abs(lost)),
        "flipped": abs(lost),
    }


def pair(text: str = "good film", new: str = "GOOD film") -> dict:
    return {
        "prompt": f"prompt {text}",
        "chosen": f"chosen {text}",
        "rejected": text,
        "margin": 0.8,
        "margin_after": -1.2,
        "after": {"rejected": new},
    }


def full(name: str = "model", text: str = "good film", **more) -> dict:
    """A result with every part, as a model with texts has it."""
    result = plain(name, **more)
    (model,) = result["models"].values()
    liked = {"prompt": text, "answer": text, "changed": f"- {text}"}
    liked |= {"reward": 0.5, "reward_after": 2.0}
    model["changes"] = [
        use("upper_case", "rejected", 0.3),
        use("typos", "both", 0.2, pairs=50),
        use("upper_case", "chosen", -0.1),
        use("typos", "chosen", 0.05),
        use("prompt_preamble", "prompt", 0.01),
        use("flattery", "rejected", 0.0, kind="attack"),
    ]
    model["examples"] = {
        "": [{key: one for key, one in pair(text).items() if "after" not in key}],
        "upper_case/rejected": [pair(text)],
        "upper_case/preferred": [liked],
    }
    model["worst_change"] = use("", "both", 0.6) | {
        "changes": ["upper_case", "typos"],
        "by": {"chosen": {"as it is": 0.7, "typos": 0.3}, "rejected": {"upper_case": 1.0}},
    }
    model["attacks"] = use("", "rejected", 0.4) | {"changes": ["flattery"]}
    model["biases"] = [
        {"change": "bold", "what": "bold words", "answers": 120, "preferred": number(0.9)},
        {"change": "list", "what": "a list", "answers": 0, "preferred": NOTHING},
    ]
    cells = [[number(0.6), number(0.3), NOTHING] for _ in range(3)]
    model["styles"] = {
        "styles": ["concise", "detailed", "markdown"],
        "matrix": cells,
        **{"easy": number(0.91), "normal": number(0.55), "hard": number(0.31)},
    }
    model["requirements"] = [
        {"requirement": "typos accuracy>=0.4", "found": number(0.5), "met": True},
        {"requirement": "upper_case accuracy>=0.9", "found": number(0.4), "met": False},
    ]
    model["verdict"] = "1 of 2 gates are met; 1 missed."
    model["findings"] = [
        {"text": f"Finding about {subject}.", "costs": 0.3, "subject": subject, "examples": some}
        for subject, some in (("changes", [pair(text)]), ("biases", [liked]), ("groups", []))
    ]
    result["best_of"] = {
        "curves": {
            name: {
                "points": [
                    {"n": n, "kl": kl, "gold": number(gold), "best_possible": best}
                    for n, kl, gold, best in (
                        (1, 0.0, 0.1, 0.1),
                        (2, 0.19, 0.625, 0.7),
                        (4, 0.64, 0.2, 0.9),
                    )
                ],
                "turns_over": {"n": 2, "difference": number(-0.4), "beyond_band": True},
                "prompts": 200,
                "candidates": {"smallest": 4, "largest": 4},
            }
        },
        "kendall": {name: {"tau": number(0.31)}},
    }
    result["command"] = f'drrlhf stress --require "tv:0.1 accuracy>=0.6" {text}'
    result["versions"] = {"torch": "9.9.9"}
    result["date"] = "2031-02-03"
    return result


class Elements(HTMLParser):
    """The elements of a page by name, each with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))

    def named(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.found if tag in names]


# ---- what it shows -------------------------------------------------------------------------------


def test_sections_are_there_in_order():
    page = render(full())
    ids = [one["id"] for one in Elements(page).named("section", "footer")]
    assert ids == ["verdict", "numbers", "curves", "changes", "groups", "best-of", "reading"]
    links = [one["href"] for one in Elements(page).named("a")]
    assert links == [f"#{one}" for one in ids]


def test_verdict_has_gates_and_findings_with_an_example():
    page = render(full())
    verdict = page[page.index('id="verdict"') : page.index('id="numbers"')]
    assert "1 of 2 gates missed" in verdict and 'class="verdict missed"' in verdict
    for said in ("typos accuracy&gt;=0.4", "0.5000", "[0.4500, 0.5500]", "✓ met", "✗ missed"):
        assert said in verdict
    assert verdict.count("Finding about") == 3
    assert verdict.count('class="example"') == 2
    assert '<mark class="gone">good</mark>' in verdict
    assert '<mark class="new">GOOD</mark>' in verdict
    assert "+0.80 before, -1.20 after" in verdict and "+0.50 as it is, +2.00 changed" in verdict


def test_every_part_of_a_full_report():
    page = render(full())
    for said in (
        "bold words",
        'style="width:90.0%"',
        "Easy, the chosen answer is the more adorned one: 91.0%",
        "Hard, the chosen answer is the plainer one: 31.0%",
        "it overtakes in\n40.0%",
        "what typos does (30.0% of pairs)",
        "as it is (70.0% of pairs)",
        "most clearly ranked wrongly (1)",
        "domain = law",
        "0.625",
        "torch 9.9.9",
        "2031-02-03",
        "drrlhf stress --require &#34;tv:0.1 accuracy&gt;=0.6&#34;",
    ):
        assert said in page, said
    assert page.count("<svg") == 2


def test_a_change_has_one_row_with_all_its_uses():
    (model,) = full()["models"].values()
    rows = change_rows(model)
    assert [row["change"] for row in rows] == ["upper_case", "typos", "prompt_preamble", "flattery"]
    assert set(rows[0]["uses"]) == {"rejected", "chosen"}
    assert rows[0]["success"]["value"] == 0.3  # of the rejected answer, not of the chosen one
    assert rows[1]["success"]["value"] == 0.2
    assert (rows[1]["fewest"], rows[1]["pairs"]) == (50, 60)
    assert [len(row["examples"]) for row in rows] == [2, 0, 0, 0]


def test_scores_alone_make_a_page():
    """No text, no change, no style, no command: those parts are said to be missing or left out."""
    page = render(plain())
    ids = [one["id"] for one in Elements(page).named("section")]
    assert ids == ["verdict", "numbers", "curves", "changes", "groups"]
    assert "No gate was set" in page and 'class="verdict none"' in page
    assert "No change was tried" in page
    for absent in ('class="example"', "Accuracy by style", "Attacks", "The command that made"):
        assert absent not in page


@pytest.mark.parametrize("missing", [NAN, None])
def test_what_is_not_known_is_a_dash(missing):
    assert percent(missing) == "–" and heat(missing) == ""
    assert band({"value": missing, "low": missing, "high": missing}) == "–"
    result = full()
    (model,) = result["models"].values()
    unknown = dict.fromkeys(("value", "low", "high"), missing)
    for change in model["changes"]:
        change |= {"lost": unknown, "success": unknown}
    model["worst_change"] |= {"accuracy": unknown}
    model["styles"] |= {"hard": unknown, "matrix": [[unknown] * 3] * 3}
    result["best_of"]["curves"]["model"]["points"][2]["gold"] = unknown
    body = render(result).partition("<body>")[2].rpartition("<script>")[0]
    shown = re.sub(r"<[^>]*>", " ", body)
    assert not re.search(r"\b(nan|NaN|None)\b", shown)
    assert "nan" not in " ".join(re.findall(r'(?:data-v|style)="([^"]*)"', body)).lower()


def test_gates_of_all_models_make_the_verdict():
    def models(*met):
        return {"m": {"requirements": [{"met": one} for one in met]}}

    assert gates(models()) == {"text": "No gate was set", "class": "none"}
    assert gates(models(True, True)) == {"text": "All gates are met", "class": "met"}
    assert gates(models(True, False))["class"] == "missed"


@pytest.mark.parametrize("share", np.linspace(0, 1, 41))
def test_heat_can_be_read(share):
    """The contrast of text on its colour is 4.5 or more, as WCAG AA asks."""
    found = re.fullmatch(r"background:rgb\((\d+),(\d+),(\d+)\);color:#(.{6})", heat(share))
    assert found is not None
    colors = [[int(one) for one in found.groups()[:3]], [*bytes.fromhex(found.group(4))]]
    light, dark = sorted((luminance(color) for color in colors), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 4.5


def luminance(color) -> float:
    parts = [
        c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in np.array(color) / 255
    ]
    return float(np.dot(parts, [0.2126, 0.7152, 0.0722]))


def style_colors(dark: bool) -> dict[str, str]:
    blocks = re.findall(r":root \{(.*?)\}", (PAGE / "page.css").read_text(), re.DOTALL)
    both = [dict(re.findall(r"--([\w-]+): (#\w{6});", block)) for block in blocks[:2]]
    return both[0] | both[1] if dark else both[0]


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_text_and_lines_have_contrast(dark):
    """4.5 for text on whatever stands behind it; the dark page's lines 3, as WCAG AA asks."""
    colors = style_colors(dark)
    rgb = {name: luminance([*bytes.fromhex(color[1:])]) for name, color in colors.items()}

    def contrast(a, b):
        light, low = sorted((rgb[a], rgb[b]), reverse=True)
        return (light + 0.05) / (low + 0.05)

    assert rgb["page"] < 0.05 if dark else rgb["page"] == 1
    for text in ("ink", "dim", "met", "missed", "link"):
        for behind in ("page", "card"):
            assert contrast(text, behind) >= 4.5, (text, behind)
    for text, behind in (("ink", "lost"), ("dim", "lost"), ("ink", "gone"), ("ink", "new")):
        assert contrast(text, behind) >= 4.5, (text, behind)
    for number in range(8) if dark else (0, 2, 3, 7):
        assert contrast(f"line-{number}", "page") >= 3, number


# ---- texts are texts -----------------------------------------------------------------------------


def test_no_text_of_the_data_is_markup():
    result = full(f"model {EVIL}", text=f"good {EVIL} film", group=EVIL)
    (model,) = result["models"].values()
    model["source"] = model["notes"] = EVIL
    model["ignored_columns"] = {EVIL: EVIL}
    model["changes"][0]["what"] = model["changes"][0]["keeps"] = EVIL
    model["findings"][0]["text"] = model["verdict"] = EVIL
    model["styles"]["styles"][0] = EVIL
    result["versions"] = {EVIL: EVIL}
    page = render(result)
    assert page.count(html.escape(EVIL, quote=True).replace("&#x27;", "&#39;")) > 20
    elements = Elements(page)
    assert len(elements.named("script")) == 1 and "<script>alert" not in page
    allowed = {"id", "class", "style", "href", "lang", "charset", "name", "content", "http-equiv"}
    for tag, attributes in elements.found:
        assert not any(name.startswith("on") for name in attributes), tag
        if tag in ("html", "head", "meta", "a"):
            assert set(attributes) <= allowed


def test_nothing_is_fetched():
    for result in (plain(), full(text="see https://example.org/ and http://example.org")):
        for tag, attributes in Elements(render(result)).found:
            assert tag not in ("link", "img", "iframe", "object", "embed", "base"), tag
            for name in ("src", "href", "xlink:href", "action"):
                assert (attributes.get(name) or "#").startswith("#"), (tag, attributes)
            assert "url(http" not in (attributes.get("style") or "")
    style = (PAGE / "page.css").read_text()
    assert "url(" not in style and "@import" not in style


def test_names_with_dollars_are_no_formulas():
    page = render(stress_test({"a$b$": scores(), "$\\frac$": scores()}, resamples=20))
    assert "a$b$" in page and "$\\frac$" in page


def test_differences_by_words():
    old, new = marked("the film was good", "the film was very Good")
    assert old == 'the film was <mark class="gone">good</mark>'
    assert new == 'the film was <mark class="new">very Good</mark>'
    old, new = marked("a <b> c", "a <i> c")
    assert old == 'a &lt;<mark class="gone">b</mark>&gt; c'
    assert new == 'a &lt;<mark class="new">i</mark>&gt; c'
    assert marked("我喜欢电影", "我讨厌电影")[1] == '我<mark class="new">讨厌</mark>电影'


def test_differences_that_show_nothing_are_named():
    assert "U+200B" in marked("film", "fi\u200blm")[1]
    assert "↵" in marked("a b", "a\nb")[1] and "\n" in marked("a b", "a\nb")[1]


def test_the_end_of_a_cut_text_is_not_a_difference():
    """What stands before moves the end of a text beyond where it is cut; nobody took it away."""
    words = [f"word{i}" for i in range(200)]
    whole = " ".join(words)
    old, new = (text[: LONGEST - 1] + "…" for text in (whole, f"in front {whole}"))
    shown_old, shown_new = marked(old, new)
    assert "<mark" not in shown_old
    assert re.findall("<mark.*?</mark>", shown_new) == ['<mark class="new">in front </mark>']


def test_a_page_with_every_text_stays_small():
    """Longest texts in signs of three bytes, eight models: examples stop at their share."""
    result = full(text="字" * LONGEST)
    (model,) = result["models"].values()
    model["changes"] = [
        use(f"change_{i}", side, 0.1) for i in range(50) for side in ("chosen", "rejected", "both")
    ]
    long = pair("字" * LONGEST, "詞" * LONGEST)
    model["examples"] = {f"{one['change']}/{one['sides']}": [long] * 2 for one in model["changes"]}
    result["models"] = {f"model {i}": model for i in range(8)}
    page = render(result)
    assert len(page.encode()) < 5_000_000 and "Examples are in report.json" in page
    rows = change_rows(model, 8)
    assert rows[0]["examples"] and rows[-1]["left_out"] == 6
    assert sum(len(row["examples"]) for row in rows) * 600 * 3 < TEXTS / 8


def test_size_does_not_grow_with_pairs():
    small, large = (len(render(plain(pairs=pairs))) for pairs in (2_000, 100_000))
    assert large < small + 5_000


# ---- in the package ------------------------------------------------------------------------------


def test_a_wheel_has_the_page(tmp_path):
    """The files beside the code come along, by the same list of package data as pip reads."""
    source = tmp_path / "source"
    source.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for folder in ("kernels", "drrlhf", "drrlhf/stress", "drrlhf/stress/page"):
        (source / folder).mkdir()
    for name in ("__init__.py", "version.py", "stress/__init__.py"):
        shutil.copy(ROOT / "drrlhf" / name, source / "drrlhf" / name)
    for one in PAGE.iterdir():
        shutil.copy(one, source / "drrlhf" / "stress" / "page")
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation"]
    subprocess.run(
        [*pip, "-w", tmp_path, source],
        check=True,
        env=os.environ | {"DRRLHF_BUILD": "none"},
        timeout=300,
    )
    (wheel,) = tmp_path.glob("*.whl")
    packed = set(zipfile.ZipFile(wheel).namelist())
    wanted = {f"drrlhf/stress/page/{one.name}" for one in PAGE.iterdir()}
    templates = {"frame.html", "page.html", "generated.html", "macros.html"}
    assert templates | {"page.css", "page.js"} == {one.name for one in PAGE.iterdir()}
    assert wanted <= packed


# ---- in a browser --------------------------------------------------------------------------------


def with_script(page: str, script: str) -> str:
    """A copy of the page that runs another script at its end, as its policy would not allow."""
    page = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page)
    return page.replace("</body>", f"<script>{{{script}}}</script></body>")


def browse(page: str, folder: Path, *, dark: bool = False) -> tuple[str, list[str]]:
    """The page after it has run, and what the browser's console said."""
    if BROWSER is None:
        pytest.skip("no chromium, chromium-browser or google-chrome on PATH")
    file = folder / "page.html"
    file.write_text(page, encoding="utf-8")
    done = subprocess.run(
        [
            BROWSER,
            "--headless",
            "--no-sandbox",
            "--disable-gpu",
            "--enable-logging=stderr",
            "--virtual-time-budget=3000",
            f"--blink-settings=preferredColorScheme={0 if dark else 1}",
            f"--user-data-dir={folder / 'profile'}",
            "--window-size=1200,900",
            "--dump-dom",
            file.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert "<main>" in done.stdout, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


def test_a_browser_says_nothing_and_runs_nothing_of_the_data(tmp_path):
    """The policy lets the page's own script run: it makes the headers buttons."""
    dom, console = browse(render(full(f"model {EVIL}", text=EVIL, group=EVIL)), tmp_path)
    assert not console
    assert Elements(dom).named("button") and len(Elements(dom).named("script")) == 1


def test_the_policy_stops_other_scripts(tmp_path):
    """Were a text not escaped, its script would still not run."""
    page = render(full()).replace("</main>", "<script>document.title = 'evil'</script></main>")
    dom, console = browse(page, tmp_path)
    assert "<title>Stress test: model</title>" in dom and console


MEASURE = """
for (const one of document.querySelectorAll("details")) one.open = true;
const color = getComputedStyle(document.body).backgroundColor;
const wide = [...document.querySelectorAll(".scroll")].some((one) => one.scrollWidth > 360);
parent.postMessage([innerWidth, document.documentElement.scrollWidth, color, wide].join("/"), "*");
"""


@pytest.mark.parametrize("dark", [False, True], ids=["light", "dark"])
def test_a_phone_scrolls_tables_and_not_the_page(tmp_path, dark):
    """In a frame of 360 pixels, for the window of a browser without a screen is 500 at least."""
    long = "word" * 100
    page = render(full(f"checkpoints/{long}", text=long, group=long))
    inner = with_script(page, MEASURE)
    (tmp_path / "inner.html").write_text(inner, encoding="utf-8")
    outer = """<meta name="color-scheme" content="light dark"><main></main>
    <script>addEventListener("message", (one) => { document.title = one.data; });</script>
    <iframe src="inner.html" style="width: 360px; height: 800px; border: 0"></iframe>"""
    dom, _ = browse(outer, tmp_path, dark=dark)
    found = re.search(r"<title>(\d+)/(\d+)/(.*)/(true|false)</title>", dom)
    assert found is not None, dom
    assert int(found[1]) == 360 and int(found[2]) <= 360
    behind = style_colors(dark)["page"]
    assert found[3] == f"rgb({', '.join(map(str, bytes.fromhex(behind[1:])))})"
    assert found[4] == "true"  # there was something too wide


SORT = """
const table = document.querySelector("table.changes");
const order = () => [...table.tBodies].map((body) => body.rows[0].cells[0].innerText).join();
const button = (name) => [...table.querySelectorAll("th button")].find(
  (one) => one.innerText.replace(/\\s+/g, " ").startsWith(name));
const seen = [order()];
for (const name of ["pairs", "change", "change", "chosen answer", "chosen answer"]) {
  button(name).focus();
  document.activeElement.click();
  seen.push(order() + " " + button(name).parentElement.getAttribute("aria-sort"));
}
seen.push(table.querySelectorAll("[aria-sort]").length);
seen.push(document.querySelector(".more").previousElementSibling.cells[0].innerText);
document.title = seen.join("|");
"""


def test_a_click_on_a_header_sorts(tmp_path):
    """Numbers begin with the largest, words with the first; dashes come last; examples stay."""
    result = full()
    (model,) = result["models"].values()
    for change in model["changes"]:
        change["what"] = ""
    dom, console = browse(with_script(render(result), SORT), tmp_path)
    assert not console
    title = re.search("<title>(.*)</title>", dom)
    assert title is not None
    upper, typos, prompt, attack = "upper_case", "typos", "prompt_preamble", "flattery"
    assert title[1].split("|") == [
        f"{upper},{typos},{prompt},{attack}",
        f"{upper},{typos},{prompt},{attack} descending",
        f"{attack},{prompt},{typos},{upper} ascending",
        f"{upper},{typos},{prompt},{attack} descending",
        f"{typos},{upper},{prompt},{attack} descending",
        f"{upper},{typos},{prompt},{attack} ascending",
        "1",
        upper,
    ]
