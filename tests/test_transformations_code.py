"""Transformations of quotes, markdown, final answers and code: what texts become, written by hand;
that code with other names does the same when it is run; and that long texts take no longer than
their length says."""

from __future__ import annotations

import ast
import contextlib
import gc
import io
import time
from random import Random

import pytest

from drrlhf.transformations import TRANSFORMATIONS


def changed(name, text, seed=0):
    return TRANSFORMATIONS[name].apply(text, draw=Random(seed))


def test_quotes_open_and_close():
    text = '"It\'s," he said, "the \'best\' ("really") of \'em".'
    assert changed("curly_quotes", text) == "“It’s,” he said, “the ‘best’ (“really”) of ‘em”."
    assert changed("curly_quotes", '"\'Yes\'..." "" ') == "“‘Yes’...” “” "


def test_a_fence_is_longer_than_those_inside():
    assert changed("code_fence", "a\n````\nb\n````") == "`````\na\n````\nb\n````\n`````"
    assert changed("code_fence", "a `b`") == "```\na `b`\n```"


@pytest.mark.parametrize(
    "sentences",
    [
        ["Ask Dr. Smith, Prof. Li and J. K. Rowling.", "She knows, i.e. she wrote it.", "No."],
        ["See e.g. No. 5 vs. No. 7 and approx. 3 kg.", "No.", "It isn't.", "At 5 p.m. sharp!"],
        ["On Oct. 3 Sen. Warren met Gov. Lee.", "It was Sept. 5, 2020."],
        ["It is no.", "We left in 1990.", "Then we came back?", "Yes (cf. Fig. 2)."],
    ],
)
def test_abbreviations_end_no_sentence(sentences):
    text = " ".join(sentences)
    assert changed("sentence_order", text) == " ".join(reversed(sentences))
    assert changed("bullets", text) == "\n".join(f"- {one}" for one in sentences)
    assert changed("paragraphs", text) == "\n\n".join(sentences)
    assert changed("repeated", text) == f"{text} {sentences[-1]}"
    assert changed("bold", text) == text.replace(sentences[0], f"**{sentences[0]}**")


@pytest.mark.parametrize("marks", ["123", "---", "***"])
def test_a_list_keeps_its_order_and_is_made_into_no_other(marks):
    points = ["Open the lid. Be careful.", "Pour the water.", "Close it. Wait."]
    marks = [f"{mark}." if mark.isdigit() else mark for mark in marks]
    lines = [f"{mark} {point}" for mark, point in zip(marks, points, strict=True)]
    text = "Do this. Now.\n\n" + "\n".join(lines)
    for name in ("sentence_order", "bullets", "numbered", "listed"):
        assert changed(name, text) == text, name
    assert changed("repeated", text) == f"{text} Wait."
    assert changed("repeated", text.removesuffix(" Wait.")) == (
        f"{text.removesuffix(' Wait.')} Close it."
    )
    assert changed("bold", lines[1]) == f"{marks[1]} **Pour the water.**"
    assert changed("bold", "1. 1") == "1. **1**"
    for line in lines:  # no number is parted from what it counts
        assert f"\n{line.split('. ')[0]}" in changed("paragraphs", text)
    assert len(changed("paragraphs", text).split("\n\n")) == 7


@pytest.mark.parametrize(
    ("text", "new"),
    [
        ("# A\n\n- **one** and `two`", "A\n\none and two"),
        ("**a** b `c` d", "a b c d"),
        ("`a` and `b c`", "a and b c"),
        ("**open, `a ** b` and ** more", "**open, a ** b and ** more"),
        # Underscores within words, and names, are none.
        ("__init__ is a_b__c__", "__init__ is a_b__c__"),
        ("a__b c__d and snake__case", "a__b c__d and snake__case"),
        ("`x.__dict__`, **__main__** and (__add__)", "x.__dict__, __main__ and (__add__)"),
        ("__open and __init__", "__open and __init__"),
        # At the edges of words they are.
        ("__two words__, (__a b__) __Note:__ x", "two words, (a b) Note: x"),
        ("__the __init__ of it__", "the __init__ of it"),
        ("__a b__c d__", "a b__c d"),
        ("__ a b__ and __a b __", "__ a b__ and __a b __"),
        ("___a b___", "_a b_"),
        # Gaps to fill in.
        ("Name: _____ and ______.", "Name: _____ and ______."),
        # Powers are no bold text.
        ("2**10 = 1024, 2**20 is **more**", "2**10 = 1024, 2**20 is more"),
        ("x**n + (y)**2 + 2**(n) and **2**3 is 8**", "x**n + (y)**2 + 2**(n) and 2**3 is 8"),
        ("这是**重点**内容", "这是重点内容"),
        # A fence that closes on its own line has code beside it.
        ("Run:\n```ls -la```\nor ````a b````.", "Run:\nls -la\nor a b."),
        ("````md\n**a**\n````", "a\n"),
    ],
)
def test_text_without_markdown(text, new):
    assert changed("no_markdown", text) == new


@pytest.mark.parametrize(
    ("text", "forms"),
    [
        (
            "It is 5.\n#### 1,205",
            {"It is 5.\nThe answer is 1,205.", "It is 5.\n$\\boxed{1,205}$"},
        ),
        ("So, the final answer is: $x^2$.", {"#### $x^2$", r"$\boxed{x^2}$"}),
        ("We pay. The answer is $5.", {"We pay.\n#### $5", "We pay.\n$\\boxed{\\$5}$"}),
        (
            r"Hence $x = \boxed{\frac{1}{2}}$ holds.",
            {
                "Hence $x = \\frac{1}{2}$ holds.\n#### $\\frac{1}{2}$",
                "Hence $x = \\frac{1}{2}$ holds.\nThe answer is $\\frac{1}{2}$.",
            },
        ),
        # Two conventions at once: the third is left.
        (r"Thus. The answer is $\boxed{7\%}$.", {"Thus.\n#### 7%"}),
        ("The answer is 3.\n\n#### 3", {r"$\boxed{3}$"}),
        # Of several boxes the last line's counts, unless it has several answers.
        (
            "$\\boxed{1}$, then\n$\\boxed{2}$.",
            {"$1$, then\n$2$.\n#### 2", "$1$, then\n$2$.\nThe answer is 2."},
        ),
        (r"$x=\boxed{1}$ or $x=\boxed{2}$.", {r"$x=\boxed{1}$ or $x=\boxed{2}$."}),
        (
            r"$\boxed{1}$, so $\boxed{1}$.",
            {f"$1$, so $1$.\n{x}" for x in ("#### 1", "The answer is 1.")},
        ),
        (r"$\boxed{\boxed{1}}$", {"$1$\n#### 1", "$1$\nThe answer is 1."}),
        # One that does not close is none.
        (
            r"$\boxed{1, so $\boxed{2}$",
            {f"$\\boxed{{1, so $2$\n{x}" for x in ("#### 2", "The answer is 2.")},
        ),
        # A brace that shows does not close.
        (r"The answer is $\boxed{\{1, 2\right.}$.", {r"#### $\{1, 2\right.$"}),
        # Every convention is there.
        ("$\\boxed{3}$\nThe answer is 3.\n#### 3", {"$\\boxed{3}$\nThe answer is 3.\n#### 3"}),
        # No final answers.
        ("#### Summary", {"#### Summary"}),
        ("#### 12\nThat was a heading.", {"#### 12\nThat was a heading."}),
        ("I think the answer is 12.", {"I think the answer is 12."}),
        ("The answer is that nobody knows.", {"The answer is that nobody knows."}),
        (r"An open $\boxed{12", {r"An open $\boxed{12"}),
    ],
)
def test_formats_of_a_final_answer(text, forms):
    assert {changed("math_format", text, seed) for seed in range(20)} == forms


@pytest.mark.parametrize(
    ("language", "code", "new"),
    [
        ("python", "x = 1\n", "# This is the code.\nx = 1\n"),
        ("C++", "int x;\n", "// This is the code.\nint x;\n"),
        ("bash", "#!/bin/sh\nls\n", "#!/bin/sh\n# This is the code.\nls\n"),
        ("json", "{}\n", "{}\n"),
        ("", "x = 1\n", "x = 1\n"),
        # What counts on its first lines alone stays there.
        ("python", "%%time\nx = 1\n", "%%time\nx = 1\n"),
        ("python", "\n%%writefile a.txt\nx\n", "\n%%writefile a.txt\nx\n"),
        ("js", "%%javascript\nlet x\n", "%%javascript\nlet x\n"),
        ("python", "%cd x\ny = 1\n", "# This is the code.\n%cd x\ny = 1\n"),
        ("yaml", "%YAML 1.2\n---\na: 1\n", "%YAML 1.2\n# This is the code.\n---\na: 1\n"),
        (
            "yml",
            "%TAG ! tag:a,1:\n%YAML 1.2\n---\na\n",
            "%TAG ! tag:a,1:\n%YAML 1.2\n# This is the code.\n---\na\n",
        ),
        ("yaml", "#cloud-config\na: 1\n", "#cloud-config\n# This is the code.\na: 1\n"),
        (
            "swift",
            "// swift-tools-version:5.5\nimport X\n",
            "// swift-tools-version:5.5\n// This is the code.\nimport X\n",
        ),
        ("swift", "// swift\nlet x = 1\n", "// This is the code.\n// swift\nlet x = 1\n"),
        (
            "python",
            "#!/usr/bin/python\n# -*- coding: latin-1 -*-\nx = 1\n",
            "#!/usr/bin/python\n# -*- coding: latin-1 -*-\n# This is the code.\nx = 1\n",
        ),
    ],
)
def test_comments_are_those_of_the_language(language, code, new):
    block = f"See:\n\n```{language}\n%s```\n\n# no code"
    assert changed("code_comments", block % code) == block % new


def test_a_block_ends_at_the_next_fence_of_its_length():
    def commented(text):
        return changed("code_comments", text).replace("# This is the code.\n", "+")

    assert commented("```py\nx\n```\n```\n```py\ny\n``` \n") == (
        "```py\n+x\n```\n```\n```py\n+y\n``` \n"
    )
    assert commented("````py\n```py\nx\n```\n") == "````py\n```py\n+x\n```\n"
    assert commented("````py\n```py\n```\n````") == "````py\n+```py\n```\n````"
    assert commented("```py\n```py\n```\n```") == "```py\n+```py\n```\n```"


# Programs that print something, and the variables in them that may get another name.
PROGRAMS = {
    "a function": (
        """
def f(values):
    total, n = 0, 0
    for v in values:
        total += v; n += 1
    return total / n
result = f([1, 2, 6])
print(result)
""",
        {"total", "n", "v", "result"},
    ),
    "arguments, attributes and imports": (
        """
import math as m
class A:
    size = 3
    def grow(self, by):
        old = self.size
        self.size = old + by
        return self.size
a = A()
by = 2
print(a.grow(by=by), m.floor(2.5))
""",
        {"old", "a"},
    ),
    "attributes that only a class knows of": (
        """
class A:
    size: int = 3
    if size > 2:
        large = True
print(sorted(vars_ for vars_ in A.__dict__ if vars_[0] != chr(95)))
""",
        {"vars_"},
    ),
    "words in strings and comments": (
        """
x = 1  # the x
y = 2
z = 3
u = f'{z} {y!r}'
w = dict(k='u')
print(u, w, x)
""",
        {"w"},
    ),
    "closures and comprehensions": (
        """
def outer():
    count = 0
    def inner():
        nonlocal count
        count += 1
        return [i * factor for i in range(count)]
    factor = 10
    inner()
    return inner()
print(outer())
""",
        {"i", "factor"},
    ),
    "errors, globals, walrus and matches": (
        """
n = 0
def f():
    global n
    n += 1
    try:
        1 / 0
    except ZeroDivisionError as e:
        r = e.args
    if (k := len(r)) > 0:
        match = k
        match match:
            case 1:
                return r
out = f()
print(out, n)
""",
        {"r", "k", "out"},
    ),
    "a local that elsewhere is a name from outside": (
        """
def f():
    data = 1
    return data
def g():
    return data
print(f())
""",
        set(),
    ),
    "a local that a block before left in the module": (
        """
print([data for data in (1, 2)])
try:
    print(data)
except NameError as error:
    print(error)
""",
        set(),
    ),
    "a built-in name": ("sum = 3\nprint(sum)\n", set()),
    "a name that is taken": ("x = 1\nmy_x = 2\nprint(x, my_x)\n", {"my_x"}),
    "names that the program sees": ("x = 1\nprint(sorted(locals())[-1])\n", set()),
    "tabs, strings of several lines and letters of two bytes": (
        'if True:\n\tü = """a\n b"""; größe = len(ü); print(größe, ü)\n',
        {"ü", "größe"},
    ),
}


def ran(code):
    """What a program prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        exec(compile(code, "code", "exec"), {"__name__": "code"})
    return printed.getvalue()


def names(code):
    return {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}


@pytest.mark.parametrize("what", PROGRAMS)
def test_renamed_code_does_the_same(what):
    code, expected = PROGRAMS[what]
    new = changed("code_renamed", f"Here:\n\n```python\n{code}```\n\nDone.")
    before, now, behind = new.split("```")
    assert (before, behind) == ("Here:\n\n", "\n\nDone.")
    now = now.removeprefix("python\n")
    assert ran(now) == ran(code) != ""
    assert names(code) - names(now) == expected
    assert names(now) - names(code) == {f"my_{name}" for name in expected}


def test_names_that_the_answer_speaks_of_stay():
    code = "```python\nfirst = 1\nsecond = first + 1\n```\n"
    assert changed("code_renamed", code) == (
        "```python\nmy_first = 1\nmy_second = my_first + 1\n```\n"
    )
    longer = '````python\nx = """\n```\n"""\n````\n'
    assert changed("code_renamed", longer) == longer.replace("x", "my_x")
    spoken = code + "Here `second` is 2.\n```py\nprint(first)\n```\n"
    assert changed("code_renamed", spoken) == spoken


def test_names_are_those_of_a_block_where_others_have_the_same():
    one, two = "```py\nfirst = 1\n```\n", "```py\nsecond = 2\nprint(second)\n```\n"
    assert changed("code_renamed", one + two) == one.replace("first", "my_first") + two.replace(
        "second", "my_second"
    )
    assert changed("code_renamed", one + two + one) == one + two.replace("second", "my_second") + (
        one
    )
    taken = "Not my_second."
    assert changed("code_renamed", two + taken) == two + taken


def test_a_class_may_read_what_its_function_assigns():
    code = "def f():\n    low = 1\n    class A:\n        print(low)\n    return A\nf()\n"
    outside = "def f():\n    low = 1\nclass A:\n    print(low)\n"
    text = "```python\n%s```\n"
    assert changed("code_renamed", text % code) == text % code.replace("low", "my_low")
    assert changed("code_renamed", text % outside) == text % outside


@pytest.mark.parametrize(
    "block",
    [
        "```python\nx = = 1\n```",
        "```python\n>>> x = 1\n```",
        "```python\nx = '\n```",
        "```python\nx = 1\n\0\n```",
        "```python\nfrom m import *\nx = 1\n```",
        "```js\nx = 1\n```",
        "```\nx = 1\n```",
    ],
)
def test_what_is_no_python_or_may_hold_any_name_stays(block):
    assert changed("code_renamed", f"{block}\n") == f"{block}\n"


def python(line):
    """A block with a line for each of so many numbers."""
    return lambda n: "```python\n" + "".join(line.format(i) for i in range(n)) + "```\n"


# Texts that a number makes so many times as long, of a kind that took the square of their length.
LONG = {
    "bold that nothing closes": ("no_markdown", lambda n: "**a " * n, 4000),
    "underscores that nothing closes": ("no_markdown", lambda n: "__a " * n, 4000),
    "boxes that nothing closes": ("math_format", lambda n: r"\boxed{" * n, 4000),
    "boxes in boxes": ("math_format", lambda n: r"\boxed{" * n + "1" + "}" * n, 4000),
    "boxes behind boxes": ("math_format", lambda n: r"\boxed{1} " * n, 8000),
    "blocks that nothing closes": ("code_comments", lambda n: "```python\nx\n" * n, 4000),
    "a word behind a fence": ("code_comments", lambda n: "```" + "a" * n, 4000),
    "blocks": ("code_renamed", lambda n: "```python\nx = 1\n```\n" * n, 1000),
    "functions": ("code_renamed", python("def f{0}():\n    v{0} = 1\n"), 1000),
    "comprehensions": ("code_renamed", python("v{0} = [i for i in range(9)]\n"), 1000),
    "variables on a line": ("code_renamed", lambda n: python("v{0} = 1; ")(n)[:-4] + "\n```", 3000),
}


@pytest.mark.parametrize("what", LONG)
def test_a_text_four_times_as_long_takes_about_four_times_as_long(what):
    """16 times, were it the square. The least of some measurements is the one least disturbed."""
    name, text, n = LONG[what]
    short, long = text(n), text(4 * n)
    times = [(cpu_seconds(name, short), cpu_seconds(name, long)) for _ in range(5)]
    once, longer = map(min, zip(*times, strict=True))
    assert longer < 8 * once


def cpu_seconds(name, text):
    gc.disable()  # a collection would go through all that other tests have left
    try:
        start = time.process_time()
        changed(name, text)
        return time.process_time() - start
    finally:
        gc.enable()


def test_blocks_of_code_are_found_whatever_ends_their_lines():
    text = "So:\n```python\ntotal = 1\nprint(total)\n```\nDone."
    ended = text.replace("\n", "\r\n")
    assert changed("code_renamed", text) != text
    assert changed("code_renamed", ended) == changed("code_renamed", text).replace("\n", "\r\n")


def test_points_of_a_list_stay_points():
    text = "1. One.\n2. Two, then\n  10. ten."
    assert changed("punctuation", text) == "1. One .\n2. Two , then\n  10. ten ."
