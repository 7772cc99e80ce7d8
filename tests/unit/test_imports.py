"""Imports run down a list of packages and form no circles."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "adaskip"
ORDER = (
    *("common", "core", "profiles", "strategies", "calibration", "speculative", "roofline", "engines", "models"),
    *("benchmarks", "testbed", "runs", "studies", "cli"),
)
"""What lies directly below adaskip/, the lowest first: each imports from itself and from those before it."""
RANK = {name: place for place, name in enumerate(ORDER)}
OLD_PATHS = {"adaskip.blocks", "adaskip.kv_cache"}
"""Where modules were in 0.1; they import the new place and warn, and nothing here imports them."""
ROOT = {"adaskip", "adaskip.__main__", *OLD_PATHS}
KNOWN_UPWARD: set[tuple[str, str]] = set()
"""Imports against the order that still exist: (importing module, imported module)."""


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports_of(path: Path, *, type_checking: bool) -> set[str]:
    """Modules of the package imported by a file, with or without those in its type-checking blocks."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and any(getattr(part, "id", "") == "TYPE_CHECKING" for part in ast.walk(node.test))
        for inner in ast.walk(node)
    }
    found = set()
    for node in ast.walk(tree):
        if id(node) in guarded and not type_checking:
            continue
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} imports relatively; name the module in full"
            if node.module and node.module.split(".")[0] == "adaskip":
                found |= {_target(node.module, alias.name) for alias in node.names if alias.name != "__version__"}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "adaskip"}
    return found


def _target(module: str, name: str) -> str:
    """The module itself, unless `name` is a module inside of it."""
    inner = PACKAGE.parent.joinpath(*module.split("."), name)
    return f"{module}.{name}" if inner.with_suffix(".py").is_file() or inner.is_dir() else module


def folder(module: str) -> str:
    return module.split(".")[1]


MODULES = {module_name(path): path for path in PACKAGE.rglob("*.py")}


@cache
def graph(*, type_checking: bool) -> dict[str, set[str]]:
    """The modules that each module imports."""
    return {
        name: imports_of(path, type_checking=type_checking) & set(MODULES) - {name} for name, path in MODULES.items()
    }


def test_there_are_no_circles():
    tuple(
        TopologicalSorter(
            {name: targets - {"adaskip"} for name, targets in graph(type_checking=False).items()}
        ).static_order()
    )


def test_every_module_lies_in_one_of_the_packages():
    assert {folder(name) for name in set(MODULES) - ROOT} <= set(ORDER)


def test_imports_run_down_the_list_of_packages():
    upward = {
        (name, target)
        for name, targets in graph(type_checking=True).items()
        for target in targets
        if not {name, target} & ROOT and RANK[folder(target)] > RANK[folder(name)]
    }
    assert upward == KNOWN_UPWARD


@pytest.mark.parametrize(("module", "name"), [("blocks", "UnsupportedModelError"), ("kv_cache", "SkippedLayer")])
def test_an_old_path_warns_and_gives_the_new_names(module, name):
    assert not any(OLD_PATHS & set(targets) for targets in graph(type_checking=True).values())
    sys.modules.pop(f"adaskip.{module}", None)
    with pytest.warns(DeprecationWarning, match=rf"adaskip\.{module} is adaskip\.core\.{module} now"):
        old = importlib.import_module(f"adaskip.{module}")
    assert getattr(old, name) is getattr(importlib.import_module(f"adaskip.core.{module}"), name)


def test_only_the_command_line_imports_the_root_package():
    """Its names are those of modules further up, except the version."""
    assert {name for name, targets in graph(type_checking=True).items() if "adaskip" in targets} <= {"adaskip.cli"}


@pytest.mark.parametrize(
    "name", ["adaskip.calibration.measure", *(m for m in MODULES if m.startswith("adaskip.speculative"))]
)
def test_lossless_mode_and_measuring_know_no_concrete_strategy(name):
    assert not {m for m in graph(type_checking=False)[name] if m.startswith("adaskip.strategies")}


@pytest.mark.parametrize("name", [m for m in MODULES if m.startswith("adaskip.strategies")])
def test_strategies_use_plans_and_profiles_only(name):
    """A strategy is a value made from measurements: no model, no patching, no cache."""
    core = {m for m in graph(type_checking=False)[name] if m.startswith("adaskip.core")}
    assert core <= {f"adaskip.core.{name}" for name in ("look", "plan", "strategy", "similarity")}


def test_importing_the_package_needs_no_torch():
    code = "import adaskip, adaskip.testbed, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
