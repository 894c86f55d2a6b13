"""Changes of the code in an answer that a compiler or an interpreter does not notice.

Code is what stands in fenced blocks that name a language.
"""

from __future__ import annotations

import ast
import builtins
import io
import re
import symtable
import tokenize
import warnings
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from itertools import accumulate
from random import Random

from drrlhf.transformations.edits import edited

COMMENT = "This is the code."
RENAMED = "my_"  # what a variable's new name begins with
# All of the language, or on a line that is none each part of it would be tried.
_OPENS = re.compile(r"^(?P<fence>`{3,})(?P<language>[\w+#]+)(?![\w+#])[^\n`]*\n", re.M)
_CLOSES = re.compile(r"^(?P<fence>`{3,})[ \t\r]*$", re.M)
# Lines that mean something only as the first ones: a comment goes below. The coding line of Python
# may be the second.
_FIRST = re.compile(
    r"#!.*\n(?:#.*coding[:=].*\n)?|#cloud-config[ \t]*\n|(?:%(?:YAML|TAG)[ \t].*\n)+"
    r"|//[ \t]*swift-tools-version.*\n"
)
_CELL_MAGIC = re.compile(r"\s*%%")  # it says what the lines below are, often no Python
_PYTHON = {"python", "python3", "py"}
_HASH = {*_PYTHON, "bash", "sh", "shell", "ruby", "rb", "r", "perl", "yaml", "yml", "toml", "julia"}
_C_LIKE = {"c", "cpp", "c++", "cs", "csharp", "c#", "java", "kotlin", "scala", "swift", "dart"}
_SLASHES = {*_C_LIKE, "javascript", "js", "jsx", "typescript", "ts", "tsx", "go", "rust", "rs"}
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)
_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
_SCOPES = (*_FUNCTIONS, ast.ClassDef, *_COMPREHENSIONS)
# Through these a program sees the names of its variables.
_NAMES_SEEN = {"locals", "globals", "vars", "dir", "eval", "exec"}


def code_comments(text: str, draw: Random) -> str:
    """A comment on the first line of every block, below ``#!`` and its like."""

    def commented(code: str, language: str) -> str:
        mark = "#" if language in _HASH else "//" if language in _SLASHES else None
        if mark is None or _CELL_MAGIC.match(code):
            return code
        first = _FIRST.match(code)
        at = first.end() if first else 0
        return f"{code[:at]}{mark} {COMMENT}\n{code[at:]}"

    return _in_blocks(text, commented)


def code_renamed(text: str, draw: Random) -> str:
    """Other names for the variables of Python code, where nothing else says their names."""
    said = Counter(_words(text))  # once for all blocks, of which there may be thousands

    def renamed(code: str, language: str) -> str:
        return _renamed(code, said) if language in _PYTHON else code

    return _in_blocks(text, renamed)


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _in_blocks(text: str, change: Callable[[str, str], str]) -> str:
    """``change(code, language)`` of every block."""
    return edited(text, ((i, j, change(text[i:j], language)) for i, j, language in _blocks(text)))


def _blocks(text: str) -> Iterator[tuple[int, int, str]]:
    """Where the code of each block begins and ends, and its language.

    Lines that close are found once: to look for one behind each line that opens is slow where many
    open and none closes.
    """
    closing: dict[str, list[re.Match[str]]] = defaultdict(list)
    for found in _CLOSES.finditer(text):
        closing[found["fence"]].append(found)
    at = 0
    for opening in _OPENS.finditer(text):
        closes, start = closing[opening["fence"]], opening.end()
        index = bisect_left(closes, start, key=lambda found: found.start())
        if opening.start() >= at and index < len(closes):
            yield start, closes[index].start(), opening["language"].lower()
            at = closes[index].end()


def _renamed(code: str, said: Counter[str]) -> str:
    """The code with all names replaced that `_variables` allows; as it is where it is no Python.

    ``said`` are the words of the whole text.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in an answer's strings
            tree, scopes = ast.parse(code), symtable.symtable(code, "answer", "exec")
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError, MemoryError):
        return code
    inside = Counter(_words(code))
    names = _variables(tree, scopes, tokens, outside=lambda word: said[word] > inside[word])
    lines = [0, *accumulate(map(len, io.StringIO(code)))]  # where they begin
    named = (one for one in tokens if one.type == tokenize.NAME and one.string in names)
    starts = [lines[one.start[0] - 1] + one.start[1] for one in named]
    return edited(code, ((at, at, RENAMED) for at in starts))


def _variables(
    tree: ast.Module,
    scopes: symtable.SymbolTable,
    tokens: list[tokenize.TokenInfo],
    outside: Callable[[str], bool],
) -> set[str]:
    """Names that are variables of this code and nothing else, wherever they stand."""
    nodes = list(ast.walk(tree))
    uses = Counter(node.id for node in nodes if isinstance(node, ast.Name))
    stars = any(isinstance(node, ast.ImportFrom) and node.names[0].name == "*" for node in nodes)
    if stars or _NAMES_SEEN & set(uses):
        return set()
    seen = Counter(token.string for token in tokens if token.type == tokenize.NAME)
    # Strings, comments and the rest of the answer may speak of a variable. What stands in braces
    # of an f-string is a token of its own only in newer Pythons.
    other = " ".join(token.string for token in tokens if token.type != tokenize.NAME)
    spoken = set(_words(other))
    formatted = (node for node in nodes if type(node).__name__ in ("JoinedStr", "TemplateStr"))
    spoken |= {one.id for node in formatted for one in ast.walk(node) if isinstance(one, ast.Name)}
    names = {
        name
        for name in _assigned(nodes)
        # Attributes, arguments, functions, imports and captures are no ast.Name.
        if uses[name] == seen[name]
        and not any(one in spoken or outside(one) for one in (name, RENAMED + name))
        and RENAMED + name not in seen
        and not name.startswith("_")
        and not hasattr(builtins, name)
    }
    return names - _undefined(names, tree, scopes)


def _assigned(nodes: list[ast.AST]) -> set[str]:
    """Names that are assigned to, without those of a class: its attributes."""

    def stored(inside: ast.AST) -> set[str]:
        names = (node for node in ast.walk(inside) if isinstance(node, ast.Name))
        return {node.id for node in names if isinstance(node.ctx, ast.Store)}

    found, attributes = set(), set()
    for node in nodes:
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if not isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
                    attributes |= stored(part)
    return found - attributes


def _all_scopes(scope: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield scope
    for child in scope.get_children():
        yield from _all_scopes(child)


def _undefined(names: set[str], tree: ast.Module, top: symtable.SymbolTable) -> set[str]:
    """Of names that are `ast.Name` alone: those that some scope reads from outside of this code.

    A symbol table goes through all scopes below it to look up a name; this asks it for few.
    """
    unknown = names - _assigned_at_top(tree)
    found: set[str] = set()
    for scope in _all_scopes(top):
        if scope is top:
            found |= unknown & set(scope.get_identifiers())
        elif isinstance(scope, symtable.Function):
            found |= unknown & set(scope.get_globals())
        else:
            here = unknown & set(scope.get_identifiers())
            found |= {name for name in here if scope.lookup(name).is_global()}
    return found


def _assigned_at_top(tree: ast.Module) -> set[str]:
    """Names that the module itself assigns, outside of functions, classes and comprehensions."""
    found, left = set(), list[ast.AST](tree.body)
    while left:
        node = left.pop()
        if isinstance(node, ast.Name) and not isinstance(node.ctx, ast.Load):
            found.add(node.id)
        if not isinstance(node, _SCOPES):
            left += ast.iter_child_nodes(node)
    return found
