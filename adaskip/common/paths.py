"""Default folders of results: in the checkout, independent of the current folder.

A checkout is a clone of this repository. A package installed from a wheel has none; its results go below the current
folder, unless a script of a checkout was started.
"""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""Folder of the package `adaskip`."""
MARKS = ("pyproject.toml", "configs/phases.yaml", "adaskip/__init__.py")
"""Files by which the root of a checkout is recognised."""


def is_checkout(folder: Path) -> bool:
    """Whether `folder` is the root of a checkout."""
    return all((folder / mark).is_file() for mark in MARKS)


def package_checkout() -> Path | None:
    """Root of the checkout that contains this package; None for an installed wheel."""
    return PACKAGE.parent if is_checkout(PACKAGE.parent) else None


def checkout() -> Path | None:
    """Root of the checkout that contains this package, else the script that was started; None if neither is in one."""
    script_root = Path(sys.argv[0]).resolve().parent.parent
    return package_checkout() or (script_root if is_checkout(script_root) else None)


def default_path(name: str) -> Path:
    """The path of `name` (e.g. `results/runs`) below the root of the checkout.

    It is relative if the root is the current folder or if there is no checkout.
    """
    root = checkout()
    return Path(name) if root in (None, Path.cwd()) else root / name


def given_or_default(given: str | Path | None, name: str) -> Path:
    """`given`, relative to the current folder, if it is not None; else `default_path(name)`."""
    return default_path(name) if given is None else Path(given)


def as_seen_from_root(path: str | Path) -> str:
    """A path relative to the folder that contains the package, if it is below it; else unchanged.

    So results do not depend on where the checkout is.
    """
    return str(Path(path).relative_to(PACKAGE.parent)) if Path(path).is_relative_to(PACKAGE.parent) else str(path)
