"""What `pip wheel` makes holds the package and its configs alone; it works where there is no checkout and no extra."""

from __future__ import annotations

import os
import subprocess
import zipfile
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import adaskip
from tests.copies import copy_checkout, python
from tests.tiny_runs import ROOT, cell

pytest.importorskip("setuptools", minversion="77")
pytestmark = pytest.mark.slow

LIBRARY = """
import sys
import torch
from transformers import AutoModelForCausalLM
import adaskip
from adaskip import AdaSkip, Budget, ImportanceProfile, calibrate, skipping
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="float32").eval()
prompts = [torch.randint(3, 60, (length,), generator=torch.Generator().manual_seed(0)) for length in (12, 9)]
calibrate(model, prompts).save("profile.json")
profile = ImportanceProfile.load("profile.json", model)
strategy = AdaSkip(num_layers=profile.num_layers, budget=Budget(sublayers=2), phase="prefill", profile=profile)
with skipping(model, strategy) as session:
    answer = model.generate(prompts[0][None], max_new_tokens=4, do_sample=False)
print(adaskip.__file__, adaskip.__version__, answer.shape[1] > 12)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    checkout = copy_checkout(tmp_path_factory.mktemp("source") / "checkout")
    made = tmp_path_factory.mktemp("wheels")
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", made)
    python("-m", "pip", "wheel", checkout, *options, cwd=checkout, path=checkout)
    (path,) = made.glob("adaskip-*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory) -> Path:
    """A folder that holds the wheel's package, beside the libraries of this environment."""
    target = tmp_path_factory.mktemp("site")
    python(
        "-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", target, wheel, cwd=target, path=target
    )
    return target


@pytest.fixture(scope="module")
def base(wheel, tmp_path_factory) -> Path:
    """Python of an environment with the wheel and what its base dependencies bring, and nothing else.

    Their files are this environment's, by links, so that no package index is asked.
    """
    home = tmp_path_factory.mktemp("base")
    python("-m", "venv", "--without-pip", home / "venv", cwd=home, path=home)
    (site,) = home.glob("venv/lib/python*/site-packages")
    python("-m", "pip", "install", "--no-deps", "--no-index", "--quiet", "--target", site, wheel, cwd=home, path=home)
    (installed,) = metadata.distributions(name="adaskip", path=[str(site)])
    for found in brought_by(installed.requires or []):
        for name in {file.parts[0] for file in found.files or [] if file.parts[0] not in ("..", "__pycache__")}:
            (site / name).symlink_to(found.locate_file(name))
    return home / "venv/bin/python"


def brought_by(requirements: list[str]) -> list[metadata.Distribution]:
    """All that `pip` would install for these, extras left out."""
    found: dict[str, metadata.Distribution] = {}
    waiting = [Requirement(line) for line in requirements]
    while waiting:
        wanted = waiting.pop()
        name = canonicalize_name(wanted.name)
        if name in found or (wanted.marker is not None and not wanted.marker.evaluate({"extra": ""})):
            continue
        found[name] = metadata.distribution(name)
        waiting += [Requirement(line) for line in found[name].requires or []]
    return list(found.values())


def alone(interpreter: Path, *arguments: str | Path, cwd: Path, expect: int = 0) -> subprocess.CompletedProcess[str]:
    """Run that Python without this environment; check the exit code."""
    ended = subprocess.run(
        [interpreter, *map(str, arguments)],
        cwd=cwd,
        env={"PATH": os.environ["PATH"], "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == expect, ended.stderr + ended.stdout
    return ended


def test_the_wheel_holds_the_package_and_its_configs_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "adaskip").rglob("*.py")}
    configs = {f"adaskip/packaged_configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    published = {str(path.relative_to(ROOT)) for path in (ROOT / "adaskip/profiles/published").glob("*.json")}
    assert names == modules | configs | published | {"adaskip/py.typed"}


def test_the_base_dependencies_alone_calibrate_and_run_a_local_checkpoint(base, checkpoint, tmp_path):
    path, version, answered = alone(base, "-c", LIBRARY, checkpoint, cwd=tmp_path).stdout.split()
    assert path.startswith(str(base.parents[1]))
    assert (version, answered) == (adaskip.__version__, "True")
    assert (tmp_path / "profile.json").is_file()


def test_the_base_dependencies_alone_give_help_and_say_what_a_run_needs(base, checkpoint, data_dir, tmp_path):
    assert "calibrate" in alone(base, "-m", "adaskip", "--help", cwd=tmp_path).stdout
    argv = ["-m", "adaskip", "run", *cell("adaskip"), "--checkpoint", checkpoint, "--data-dir", data_dir]
    ended = alone(base, *argv, cwd=tmp_path, expect=2)
    assert (
        ended.stderr == "error: this needs the package datasets, which is not installed: pip install 'adaskip[paper]'\n"
    )


def test_the_metadata_holds_one_version_and_a_lean_base(base):
    (installed,) = metadata.distributions(name="adaskip", path=[str(next(base.parents[1].glob("lib/*/*")))])
    lines = [Requirement(line) for line in installed.requires or []]
    assert installed.version == adaskip.__version__
    base_names = {line.name.lower() for line in lines if "extra" not in str(line.marker)}
    assert base_names == {
        "torch",
        "transformers",
        "accelerate",
        "huggingface_hub",
        "safetensors",
        "numpy",
        "tqdm",
        "pyyaml",
    }
    assert installed.metadata["License-Expression"] == "MIT"
    assert "adaskip" in (installed.read_text("entry_points.txt") or "")


def test_the_command_runs_from_a_wheel_in_an_empty_folder(installed, checkpoint, data_dir, tmp_path):
    assert "grid" in python("-m", "adaskip", "--help", cwd=tmp_path, path=installed).stdout
    assert "calibrate" in python(installed / "bin/adaskip", "--help", cwd=tmp_path, path=installed).stdout
    where = python("-c", "import adaskip; print(adaskip.__file__)", cwd=tmp_path, path=installed).stdout
    assert where.startswith(str(installed))
    few = ("--checkpoint", checkpoint, "--data-dir", data_dir, "--device", "cpu", "--threads", "1")
    python("-m", "adaskip", "calibrate", "--model", "llama", *few, cwd=tmp_path, path=installed)
    run = ["-m", "adaskip", "run", *cell("adaskip"), *few, "--limit", "1", "--max-new-tokens", "4"]
    assert "llama-ADA-DECODE/2-sublayers: 2 samples" in python(*run, cwd=tmp_path, path=installed).stdout
    assert (tmp_path / "results/runs/llama-ADA-DECODE/2-sublayers/manifest.json").is_file()
    assert len(list((tmp_path / "results/profiles").iterdir())) == 1  # the run found what calibrate made
    dry = python("-m", "adaskip", "grid", "--models", "llama", "--dry-run", cwd=tmp_path, path=installed)
    assert "cells done in results/runs" in dry.stdout


@pytest.mark.parametrize("command", ["run", "calibrate"])
def test_the_testbed_of_a_wheel_is_in_a_checkout(installed, tmp_path, command):
    argv = ["-m", "adaskip", command, *(cell(budget="4") if command == "run" else ("--model", "llama")), "--testbed"]
    ended = python(*argv, cwd=tmp_path, path=installed, expect=2)
    assert ended.stderr.startswith("error: the testbed's models are not part of an installed package: they are in ")
    assert ended.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_scripts_of_a_checkout_find_its_testbed_and_keep_their_results_there_under_an_installed_wheel(
    installed, tmp_path
):
    checkout = copy_checkout(tmp_path / "checkout")
    few = ("--testbed", "--limit", "1", "--max-new-tokens", "2", "--device", "cpu", "--threads", "1")
    python("run_llama_EE.py", "--skip_full_layer_num", "2", *few, cwd=checkout / "prefill", path=installed)
    ended = python("eval.py", "--model", "llama-EE-PREFILL", cwd=checkout / "eval", path=installed)
    assert "4 of 32" in ended.stdout
    assert (checkout / "results/testbed/runs/llama-EE-PREFILL/4-sublayers/scores.json").is_file()
