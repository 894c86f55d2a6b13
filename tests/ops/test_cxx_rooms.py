"""How csrc is laid out: one subject a file, short functions, and each type once in a namespace."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
FILES = sorted(p for p in CSRC.rglob("*.*") if p.suffix in (".h", ".inc", ".cpp", ".cu"))
MOST_LINES, MOST_IN_A_FUNCTION = 600, 100

# Comments, strings and characters; digit separators are none of these.
_QUIET = re.compile(
    r'//[^\n]*|/\*.*?\*/|"(?:\\.|[^"\\\n])*"|(?<![0-9a-fA-F])\'(?:\\.|[^\'\\])\'', re.S
)
_TYPE = re.compile(r"(?:class|struct|union|enum(?:\s+class)?)\s+(\w+)\s*(?:final\s*)?(?::[^:]|$)")


def _blank(text: str) -> str:
    return "\n" * text.count("\n")


def _branch(text: str, *, first: bool) -> str:
    """The text without directives, and of every #if its first branch or its last."""
    lines, branches = [], []
    source = re.sub(r"\\\n", " \x00", text).split("\n")
    for line in source:
        directive = re.match(r"\s*#\s*(if|elif|else|endif)?", line)
        word = directive[1] if directive else None
        if word == "if":
            total = _branches_from(source, len(lines))
            branches.append([0, 0 if first else total - 1])
        elif word in ("elif", "else"):
            branches[-1][0] += 1
        elif word == "endif":
            branches.pop()
        kept = directive is None and all(now == wanted for now, wanted in branches)
        lines.append((line if kept else "") + "\n" * line.count("\x00"))
    return "\n".join(lines).replace("\x00", "")


def _branches_from(source: list[str], start: int) -> int:
    """How many branches the #if at source[start] has."""
    depth, count = 0, 1
    for line in source[start:]:
        directive = re.match(r"\s*#\s*(if|elif|else|endif)", line)
        word = directive[1] if directive else None
        depth += (word == "if") - (word == "endif")
        count += word in ("elif", "else") and depth == 1
        if depth == 0:
            return count
    raise ValueError("an #if without its #endif")


@dataclass
class Found:
    """What a text holds: lengths of functions, by name and first line, and types."""

    functions: dict[str, int] = field(default_factory=dict)
    types: set[str] = field(default_factory=set)


def scan(text: str, name: str = "") -> Found:
    """Of every #if the first branch and the last; what has no named namespace is `name`'s alone."""
    found = Found()
    quiet = _QUIET.sub(lambda hit: _blank(hit[0]) or " ", text)
    for first in (True, False):
        _scan(_branch(quiet, first=first), name, found)
    return found


def _scan(text: str, name: str, found: Found) -> None:
    scopes: list[tuple[str, str, int]] = []  # kind, name, first line
    begin = 0  # of what leads up to the next brace
    for brace in re.finditer(r"[{};]", text):
        lead, at = text[begin : brace.start()], brace.start()
        begin = brace.end()
        if brace[0] == "{":
            head = re.sub(r"alignas\([^()]*\)|\b(?:public|private|protected):(?!:)", "", lead)
            head = " ".join(head.split())
            line = text.count("\n", 0, at - len(lead.lstrip())) + 1
            inside = {kind for kind, _, _ in scopes}
            kind, named = "other", ""
            if inside <= {"namespace"} and (space := re.search(r"\bnamespace\b(.*)$", head)):
                kind, named = "namespace", space[1].strip() or f"({name})"
            elif inside <= {"namespace", "type"}:
                bare = re.sub(r"^template\s*<.*?>\s*(?=class|struct|union)", "", head)
                if hit := _TYPE.match(bare):
                    kind, named = "type", hit[1]
                elif re.match(r"(class|struct|union|enum)\b[^()]*$", bare):
                    kind = "type"  # a specialisation, or without a name
                elif "(" in head and not head.endswith("="):
                    kind, named = "function", head
                if named and kind == "type" and "type" not in inside:
                    found.types.add("::".join([*(n for _, n, _ in scopes), named]))
            scopes.append((kind, named, line))
        elif brace[0] == ";":
            # A template that is specialised everywhere is declared, and never defined.
            head = " ".join(lead.split())
            hit = re.match(r"template\s*<.*>\s*(?:class|struct|union)\s+(\w+)$", head)
            if hit and {kind for kind, _, _ in scopes} <= {"namespace"}:
                found.types.add("::".join([*(n for _, n, _ in scopes), hit[1]]))
        elif brace[0] == "}":
            kind, named, line = scopes.pop()
            if kind == "function":
                found.functions[f"{line}: {named}"] = text.count("\n", 0, at) + 2 - line
    if scopes:
        raise ValueError(f"{name}: a brace that nothing closes: {scopes[-1]}")


def twice(texts: dict[str, str]) -> dict[str, list[str]]:
    """Types that more than one of the texts define in the same namespace, and which do."""
    where = defaultdict(list)
    for name, text in texts.items():
        for one in scan(text, name).types:
            where[one].append(name)
    return {one: names for one, names in where.items() if len(names) > 1}


def long_functions(text: str) -> dict[str, int]:
    return {f: n for f, n in scan(text).functions.items() if n > MOST_IN_A_FUNCTION}


def name_of(path: Path) -> str:
    return str(path.relative_to(CSRC))


def test_no_type_is_defined_twice_in_a_namespace():
    """The CPU's files and the GPU's are linked together: two types of one name would be one."""
    assert twice({name_of(p): p.read_text() for p in FILES}) == {}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_and_functions_are_short(path):
    text = path.read_text()
    assert text.count("\n") <= MOST_LINES
    assert long_functions(text) == {}


def test_the_scan_sees_what_there_is():
    types = set().union(*(scan(p.read_text(), name_of(p)).types for p in FILES))
    assert {"drrlhf::cpu::Sequences", "drrlhf::cuda::Sequences", "drrlhf::Ambiguity"} <= types
    functions = [f for p in FILES for f in scan(p.read_text()).functions]
    assert len(types) > 60 and len(functions) > 300
    for known in ("linear_token_logprobs_backward_cpu(", "fold_tile_as(", "TORCH_LIBRARY_IMPL("):
        assert any(known in f for f in functions), known


TYPE = "namespace a {{\nnamespace {} {{\n{} S {{ int x; }};\n}}\n}}\n"


@pytest.mark.parametrize(
    "one,other,found",
    [
        (TYPE.format("b", "struct"), TYPE.format("b", "struct"), ["a::b::S"]),
        (TYPE.format("b", "struct"), TYPE.format("b", "enum class"), ["a::b::S"]),
        (
            TYPE.format("b", "struct"),
            "namespace a::b {\ntemplate <class T>\nclass S {\n};\n}\n",
            ["a::b::S"],
        ),
        (
            TYPE.format("b", "struct"),
            "namespace a::b {\ntemplate <int N>\nstruct S;\n}\n",
            ["a::b::S"],
        ),
        (TYPE.format("b", "struct"), TYPE.format("c", "struct"), []),
        (TYPE.format("", "struct"), TYPE.format("", "struct"), []),
        (TYPE.format("b", "struct"), "// struct S {\nnamespace a::b { struct S; }\n", []),
        (TYPE.format("b", "struct"), "namespace a::b { template <> struct S<int> {}; }\n", []),
        (
            TYPE.format("b", "struct"),
            "#if X\nint f() {\n#else\nint g() {\n#endif\n}\n#ifdef Y\n#else\n"
            + TYPE.format("b", "struct")
            + "#endif\n",
            ["a::b::S"],
        ),
    ],
)
def test_a_type_defined_twice_is_found(one, other, found):
    assert list(twice({"one.h": one, "other.cu": other})) == found


@pytest.mark.parametrize("lines,found", [(MOST_IN_A_FUNCTION, 0), (MOST_IN_A_FUNCTION + 1, 1)])
@pytest.mark.parametrize(
    "head", ["int f(int x) {{\n", "  explicit C(int x) : x_(x) {{\n", "auto f = [](int x) {{\n"]
)
def test_a_long_function_is_found(lines, found, head):
    head = head.format()
    body = "".join(f"  if (x > {i}) {{ g('{{'); }}\n" for i in range(lines - 2))
    text = "namespace a {\nstruct C {\n  int g(char);\n" + head + body + "}\n};\n}\n"
    assert len(long_functions(text)) == found
