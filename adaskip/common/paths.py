"""Where results go when no folder is given: below the checkout, whatever the current folder is.

A checkout is this repository's tree. Where the package was installed from a wheel there is none, and results go below
the current folder, unless a script of a checkout was started.
"""

from __future__ import annotations

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
"""Folder of the package `adaskip`."""
MARKS = ("pyproject.toml", "configs/phases.yaml", "adaskip/__init__.py")
"""Files by which the root of a checkout is told."""


def is_checkout(folder: Path) -> bool:
    """Whether `folder` is the root of a checkout."""
    return all((folder / mark).is_file() for mark in MARKS)


def package_checkout() -> Path | None:
    """Root of the checkout that this package lies in; None for an installed wheel."""
    return PACKAGE.parent if is_checkout(PACKAGE.parent) else None


def checkout() -> Path | None:
    """Root of the checkout of this package, or else of the script that was started; None where neither is in one."""
    script_root = Path(sys.argv[0]).resolve().parent.parent
    return package_checkout() or (script_root if is_checkout(script_root) else None)


def default_path(name: str) -> Path:
    """The place that `name` has below the root of the checkout, as `results/runs`; relative where that is the current
    folder, or where there is no checkout."""
    root = checkout()
    return Path(name) if root in (None, Path.cwd()) else root / name


def given_or_default(given: str | Path | None, name: str) -> Path:
    """What the user gave, relative to the current folder; else `default_path(name)`."""
    return default_path(name) if given is None else Path(given)


def as_seen_from_root(path: str | Path) -> str:
    """A path as seen from the folder that holds the package, if it is below it, so that results made anywhere are
    alike; else as it is."""
    return str(Path(path).relative_to(PACKAGE.parent)) if Path(path).is_relative_to(PACKAGE.parent) else str(path)
