"""Imports point downwards and form no circles; the core stays free of what stands above it."""

from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "adaskip"


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path) -> set[str]:
    """Modules of the package imported by a file, type-checking blocks aside."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in guarded:
            continue
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "adaskip":
            found |= {_target(node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "adaskip"}
    return found


def _target(module: str, name: str) -> str:
    """The module itself, unless `name` is a module inside of it."""
    inner = PACKAGE.parent.joinpath(*module.split("."), name)
    return f"{module}.{name}" if inner.with_suffix(".py").is_file() or inner.is_dir() else module


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}
GRAPH = {name: (imports_of(path) & set(MODULES)) - {name, "adaskip"} for name, path in MODULES.items()}


def reachable(name: str) -> set[str]:
    seen, todo = set(), [name]
    while todo:
        for target in GRAPH[todo.pop()] - seen:
            seen.add(target)
            todo.append(target)
    return seen


def test_there_are_no_circles():
    tuple(TopologicalSorter(GRAPH).static_order())


SPECULATIVE = [name.removeprefix("adaskip.") for name in MODULES if name.startswith("adaskip.speculative")]


@pytest.mark.parametrize("name", ["patching", "request", "context", "calibration", "kv_cache", "blocks", *SPECULATIVE])
def test_the_core_knows_no_concrete_strategy(name):
    strategies = {m for m in GRAPH[f"adaskip.{name}"] if m.startswith("adaskip.strategies")}
    assert strategies <= {"adaskip.strategies.base"}


@pytest.mark.parametrize("name", [m for m in MODULES if m.startswith("adaskip.strategies")])
def test_strategies_see_no_model_and_no_patching(name):
    above = {"patching", "context", "request", "calibration", "generate", "kv_cache", "blocks"}
    assert not {f"adaskip.{m}" for m in above} & reachable(name)


@pytest.mark.parametrize(
    "name", ["patching", "context", "request", "calibration", "generate", "importance", *SPECULATIVE]
)
def test_the_library_does_not_reach_up_to_the_runs(name):
    above = ("runs", "results", "plots", "cli", "testbed", "longbench", "report")
    assert not {m for m in reachable(f"adaskip.{name}") if m.removeprefix("adaskip.").startswith(above)}


def test_importing_the_package_needs_no_torch():
    code = "import adaskip, adaskip.testbed, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
