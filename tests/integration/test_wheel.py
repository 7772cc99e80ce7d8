"""What `pip wheel` makes holds all that the package needs, and nothing else; it runs where there is no checkout."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from tests.copies import copy_checkout, python
from tests.tiny_runs import ROOT, cell

pytest.importorskip("setuptools", minversion="77")


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


@pytest.mark.slow
def test_the_wheel_holds_the_package_its_configs_and_models_and_nothing_else(wheel):
    names = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "adaskip").rglob("*.py")}
    configs = {f"adaskip/packaged_configs/{path.name}" for path in (ROOT / "configs").iterdir()}
    rest = names - modules - configs
    assert modules | configs <= names
    assert {Path(name).suffix for name in rest} == {".json", ".safetensors"}
    assert all(name.startswith("adaskip/testbed/models/") for name in rest)


@pytest.mark.slow
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


@pytest.mark.slow
def test_the_testbed_is_in_the_wheel(installed, tmp_path):
    run = ["-m", "adaskip", "run", *cell(budget="4"), "--testbed", "--limit", "1", "--max-new-tokens", "2"]
    python(*run, "--device", "cpu", "--threads", "1", cwd=tmp_path, path=installed)
    assert (tmp_path / "results/testbed/runs/llama-EE-DECODE/4-sublayers/manifest.json").is_file()


@pytest.mark.slow
def test_scripts_of_a_checkout_keep_their_results_there_under_an_installed_wheel(installed, tmp_path):
    checkout = copy_checkout(tmp_path / "checkout")
    few = ("--testbed", "--limit", "1", "--max-new-tokens", "2", "--device", "cpu", "--threads", "1")
    python("run_llama_EE.py", "--skip_full_layer_num", "2", *few, cwd=checkout / "prefill", path=installed)
    ended = python("eval.py", "--model", "llama-EE-PREFILL", cwd=checkout / "eval", path=installed)
    assert "4 of 32" in ended.stdout
    assert (checkout / "results/testbed/runs/llama-EE-PREFILL/4-sublayers/scores.json").is_file()
