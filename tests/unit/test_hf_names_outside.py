"""No private name of another library stands anywhere in the package but in `adaskip/core/hf.py`."""

from __future__ import annotations

import ast
import re
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "adaskip"
FOREIGN = ("torch", "transformers", "accelerate")


def private(name: str) -> bool:
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None


PATHS = list(PACKAGE.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def own_names() -> set[str]:
    """What the package itself defines somewhere."""
    found = set()
    for node in chain.from_iterable(ast.walk(tree_of(path)) for path in PATHS):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


NOT_FOREIGN = {"_exit", "_id", "_e", "_replace", "_low", "_high"}
"""`os._exit`, a named tuple's `_replace`, LongBench's own names, and ends of our columns' names."""


def names_in(tree: ast.AST) -> set[str]:
    """Private attributes and imports of a module, and texts that are one name, as `getattr` takes them."""
    found = set()
    in_texts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in in_texts:
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return {name for name in found if private(name) and not name.startswith("_adaskip")}


@pytest.mark.parametrize("path", [p for p in PATHS if p.name != "hf.py"], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_private_name_of_another_library_stands_outside_hf(path):
    assert names_in(tree_of(path)) - own_names() - NOT_FOREIGN == set()


def test_a_private_name_outside_would_be_found():
    code = "from torch._a import _b\nmodel._c\ngetattr(model, '_d')\nf'x{1}_e'\n'a sentence on _f'"
    assert names_in(ast.parse(code)) == {"_a", "_b", "_c", "_d"}
