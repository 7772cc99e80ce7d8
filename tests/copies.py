"""A copy of this checkout without its results, in which commands may be run as typed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from tests.tiny_runs import ROOT

FOLDERS = ("adaskip", "configs", "prefill", "decode", "e2e", "eval", "observations", "speed")
FILES = ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md")


def copy_checkout(to: Path) -> Path:
    """Copy what commands and wheels are made of into the new folder `to`."""
    for name in FOLDERS:
        made = ("__pycache__", "results") if name == "speed" else ("__pycache__",)
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns(*made))
    for name in FILES:
        shutil.copy(ROOT / name, to / name)
    return to


def python(*arguments: str | Path, cwd: Path, path: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the present Python in the folder `cwd`, with the package of the folder `path`; check the exit code."""
    environment = {**os.environ, "PYTHONPATH": str(path), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    ended = subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert ended.returncode == expect, ended.stderr + ended.stdout
    return ended
