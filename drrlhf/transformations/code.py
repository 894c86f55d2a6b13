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
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random

COMMENT = "This is the code."
RENAMED = "my_"  # what a variable's new name begins with
_FENCED = re.compile(
    r"^(?P<fence>`{3,})(?P<language>[\w+#]+)[^\n`]*\n(?P<code>.*?)^(?P=fence)[ \t]*$", re.M | re.S
)
_PYTHON = {"python", "python3", "py"}
_HASH = {*_PYTHON, "bash", "sh", "shell", "ruby", "rb", "r", "perl", "yaml", "yml", "toml", "julia"}
_C_LIKE = {"c", "cpp", "c++", "cs", "csharp", "c#", "java", "kotlin", "scala", "swift", "dart"}
_SLASHES = {*_C_LIKE, "javascript", "js", "jsx", "typescript", "ts", "tsx", "go", "rust", "rs"}
# Through these a program sees the names of its variables.
_NAMES_SEEN = {"locals", "globals", "vars", "dir", "eval", "exec"}


def code_comments(text: str, draw: Random) -> str:
    """A comment on the first line of every block, below ``#!``."""

    def commented(code: str, language: str, around: str) -> str:
        mark = "#" if language in _HASH else "//" if language in _SLASHES else None
        if mark is None:
            return code
        first = re.match(r"#!.*\n", code)
        at = first.end() if first else 0
        return f"{code[:at]}{mark} {COMMENT}\n{code[at:]}"

    return _in_blocks(text, commented)


def code_renamed(text: str, draw: Random) -> str:
    """Other names for the variables of Python code, where nothing else says their names."""

    def renamed(code: str, language: str, around: str) -> str:
        return _renamed(code, around) if language in _PYTHON else code

    return _in_blocks(text, renamed)


def _in_blocks(text: str, change: Callable[[str, str, str], str]) -> str:
    """``change(code, language, around)`` of every block; ``around`` is the rest of the text."""

    def changed(block: re.Match[str]) -> str:
        whole, start = block.group(), block.start()
        around = text[: block.start("code")] + text[block.end("code") :]
        code = change(block["code"], block["language"].lower(), around)
        return whole[: block.start("code") - start] + code + whole[block.end("code") - start :]

    return _FENCED.sub(changed, text)


def _renamed(code: str, around: str) -> str:
    """The code with all names replaced that `_variables` allows; as it is where it is no Python."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd escapes in an answer's strings
            tree, scopes = ast.parse(code), symtable.symtable(code, "answer", "exec")
        tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    except (SyntaxError, ValueError, tokenize.TokenError, RecursionError, MemoryError):
        return code
    names = _variables(tree, scopes, tokens, around)
    lines = list(io.StringIO(code))
    for token in reversed(tokens):  # from behind, so that places stay
        if token.type == tokenize.NAME and token.string in names:
            (row, start), (_, end) = token.start, token.end
            line = lines[row - 1]
            lines[row - 1] = f"{line[:start]}{RENAMED}{token.string}{line[end:]}"
    return "".join(lines)


def _variables(
    tree: ast.Module,
    scopes: symtable.SymbolTable,
    tokens: list[tokenize.TokenInfo],
    around: str,
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
    spoken = set(re.findall(r"\w+", f"{around} {other}"))
    formatted = (node for node in nodes if type(node).__name__ in ("JoinedStr", "TemplateStr"))
    spoken |= {one.id for node in formatted for one in ast.walk(node) if isinstance(one, ast.Name)}
    return {
        name
        for name in _assigned(nodes)
        # Attributes, arguments, functions, imports and captures are no ast.Name.
        if uses[name] == seen[name]
        and name not in spoken
        and RENAMED + name not in spoken | set(seen)
        and not name.startswith("_")
        and not hasattr(builtins, name)
        and all(_is_defined(name, scope, scopes) for scope in _all_scopes(scopes))
    }


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


def _is_defined(name: str, scope: symtable.SymbolTable, top: symtable.SymbolTable) -> bool:
    """Whether the name, where a scope has it, is a variable that this code assigns."""
    if name not in scope.get_identifiers():
        return True
    if scope is not top and not scope.lookup(name).is_global():
        return True
    return name in top.get_identifiers() and top.lookup(name).is_assigned()
