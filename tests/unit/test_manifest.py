"""What a manifest says of the code and the machine."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch

import adaskip
from adaskip.common import provenance
from adaskip.common.provenance import device_name, git_commit
from adaskip.models.loading import LoadedModel, ModelSpec
from adaskip.runs import manifest
from tests.families import random_model

CPU = torch.device("cpu")


def git(folder: Path, *arguments: str) -> str:
    author = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    command = ["git", "-C", str(folder), *author, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A repository with code and results, in which the package seems to lie."""
    for name in ("adaskip/runs/manifest.py", "results/run.json", "speed/results/cpu/some.json", "speed/script.py"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("as committed\n")
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "all")
    monkeypatch.setattr(provenance, "PACKAGE", tmp_path / "adaskip")
    return tmp_path


def test_the_commit_is_named_in_full(checkout):
    assert git_commit() == git(checkout, "rev-parse", "HEAD")
    assert len(git_commit() or "") == 40


@pytest.mark.parametrize("name", ["results/run.json", "speed/results/cpu/some.json"])
def test_results_that_are_written_leave_the_commit_clean(checkout, name):
    (checkout / name).write_text("measured anew\n")
    (checkout / name).with_suffix(".md").write_text("a new file\n")
    assert git_commit() == git(checkout, "rev-parse", "HEAD")
    git(checkout, "add", ".")
    assert git_commit() == git(checkout, "rev-parse", "HEAD")


@pytest.mark.parametrize("name", ["adaskip/runs/manifest.py", "speed/script.py"])
@pytest.mark.parametrize("staged", [False, True])
def test_changed_code_is_dirty(checkout, name, staged):
    (checkout / name).write_text("changed\n")
    if staged:
        git(checkout, "add", ".")
    assert git_commit() == f"{git(checkout, 'rev-parse', 'HEAD')}-dirty"


def test_outside_of_a_checkout_and_without_git_there_is_no_commit(tmp_path, monkeypatch, checkout):
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    assert git_commit() is None
    monkeypatch.undo()
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    (outside := tmp_path.parent / "outside").mkdir(exist_ok=True)
    monkeypatch.setattr(provenance, "PACKAGE", outside)
    assert git_commit() is None


def test_a_wheel_installed_inside_of_somebodys_repository_has_no_commit(checkout, monkeypatch):
    monkeypatch.setattr(provenance, "package_checkout", lambda: None)
    assert git_commit() is None


def test_a_cpu_is_named_by_its_model_where_the_system_tells_it(tmp_path, monkeypatch):
    (told := tmp_path / "cpuinfo").write_text(
        "processor\t: 0\nmodel\t\t: 2\nmodel name\t: A Chip 9 \nmodel name\t: B\n"
    )
    monkeypatch.setattr(provenance, "CPUINFO", told)
    assert device_name(CPU) == "A Chip 9"


@pytest.mark.parametrize("content", [None, "processor\t: 0\nBogoMIPS\t: 50.00\n", "model name\t: \nflags\t: fpu\n"])
def test_a_cpu_without_a_model_name_is_named_by_its_architecture(tmp_path, monkeypatch, content):
    monkeypatch.setattr(provenance, "CPUINFO", told := tmp_path / "cpuinfo")
    if content is not None:
        told.write_text(content)
    monkeypatch.setattr(platform, "processor", lambda: "")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert device_name(CPU) == "aarch64"
    monkeypatch.setattr(platform, "processor", lambda: "arm")
    assert device_name(CPU) == "arm"


def test_the_version_is_that_of_the_code_where_installed_metadata_says_another_or_nothing(monkeypatch):
    def version(package: str) -> str:
        if package == "adaskip":
            raise PackageNotFoundError(package)
        return "1.0"

    monkeypatch.setattr(provenance, "version", version)
    tokenizer: Any = None
    spec = ModelSpec("m", "m", None, "", 9, chat_template=None, stop_token_ids=(), stop_strings=())
    described = manifest.describe_model(LoadedModel(random_model("llama"), tokenizer, spec))
    assert described["versions"]["adaskip"] == adaskip.__version__
    assert described["versions"]["torch"] == "1.0"
