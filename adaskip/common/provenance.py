"""Records which machine and which commit of the code made a result."""

from __future__ import annotations

import platform
import re
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from adaskip import __version__
from adaskip.common.paths import PACKAGE, package_checkout

RESULTS = ("results", "speed/results")
"""Folders of the checkout that hold measured results."""
CPUINFO = Path("/proc/cpuinfo")


def versions() -> dict[str, str]:
    """Of Python, torch, transformers and this package."""
    # The last not from metadata, which an editable install keeps from when it was installed.
    return {**library_versions(), "adaskip": __version__}


def library_versions() -> dict[str, str]:
    """Of Python, torch and transformers."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}


def device_name(device: torch.device) -> str:
    """The model name of the GPU or processor; the machine's architecture if the system does not report one."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _processor_name() or platform.processor() or platform.machine()


def _processor_name() -> str | None:
    try:
        described = CPUINFO.read_text(encoding="utf-8")
    except OSError:
        return None
    named = re.search(r"^model name\s*:[ \t]*(.*\S)", described, flags=re.MULTILINE)
    return named and named[1]


def git_commit() -> str | None:
    """Commit of the checkout that contains this package, with `-dirty` if files differ; None outside a checkout.

    Changed results do not make it dirty: they are written by measurements with the code of that commit.
    """
    if package_checkout() is None or not (commit := _git("rev-parse", "--verify", "HEAD")):
        return None
    but_results = [":/", *(f":(top,exclude){folder}" for folder in RESULTS)]
    changes = _git("status", "--porcelain", "--untracked-files=no", "--", *but_results)
    return f"{commit}-dirty" if changes else commit


def _git(*arguments: str) -> str:
    """The output of git in this package's checkout; empty without git or outside a checkout."""
    command = ["git", *arguments]
    try:
        answer = subprocess.run(command, cwd=PACKAGE, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return ""
    return answer.stdout.strip()
