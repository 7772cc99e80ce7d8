"""Scripts and commands started from any folder find what others made, in the checkout; as typed, in a copy of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.copies import copy_checkout, python

LIMITS = ("--limit", "1", "--max-new-tokens", "4", "--threads", "1", "--device", "cpu")
NAME = "llama-EE-PREFILL"
RUN = "run_llama_EE.py"


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    return copy_checkout(tmp_path_factory.mktemp("somewhere") / "checkout")


@pytest.fixture(scope="module")
def ran(checkout) -> Path:
    """The checkout with the artifact's first run: from its folder, by its name."""
    line = [RUN, "--model", NAME, "--skip_full_layer_num", "4", "--testbed", *LIMITS]
    python(*line, cwd=checkout / "prefill", path=checkout)
    return checkout


def below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if "__pycache__" not in path.parts}


@pytest.mark.slow
def test_the_artifacts_way_of_working_goes_through(ran):
    """cd prefill, run; cd ../eval, score: without a flag that says where."""
    ended = python("eval.py", "--model", NAME, cwd=ran / "eval", path=ran)
    assert "8 of 32" in ended.stdout
    (line,) = ended.stderr.splitlines()
    assert line.startswith(
        f"no run {NAME} in {ran}/results/runs; using that of the testbed in {ran}/results/testbed/runs"
    )
    assert (ran / f"results/testbed/runs/{NAME}/8-sublayers/scores.json").is_file()
    for folder in ("prefill", "eval"):
        assert not {name for name in below(ran / folder) if not name.endswith(".py")}


@pytest.mark.slow
def test_everything_is_found_from_a_folder_outside(ran, tmp_path):
    """Each script and command with its defaults; nothing is written where it was started."""
    run = ["-m", "adaskip", "run", "--model", "llama", "--phase", "prefill", "--strategy", "early_exit", "--testbed"]
    again = python(*run, "--skip-full-layer-num", "4", *LIMITS, cwd=tmp_path, path=ran)
    assert "3 samples, 3 of them before" in again.stdout
    for script, option, made in (
        ("eval/tables.py", "--testbed", "results/testbed/tables/table3_prefill.md"),
        ("eval/plots.py", "--testbed", "results/testbed/plots/retention.png"),
        ("speed/roofline.py", "--models=llama", "speed/results/roofline/roofline.md"),
    ):
        python(ran / script, option, cwd=tmp_path, path=ran)
        assert (ran / made).is_file()
    dry = python("-m", "adaskip", "grid", "--testbed", "--dry-run", cwd=tmp_path, path=ran)
    assert f"cells done in {ran}/results/testbed/runs" in dry.stdout
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_what_a_user_names_is_below_the_current_folder(ran, tmp_path):
    line = [ran / "prefill" / RUN, "--skip_full_layer_num", "2", "--testbed", *LIMITS, "--output-dir", "mine"]
    python(*line, cwd=tmp_path, path=ran)
    assert (tmp_path / f"mine/{NAME}/4-sublayers/manifest.json").is_file()
    ended = python(ran / "eval/eval.py", "--model", NAME, "--results-dir", "mine", cwd=tmp_path, path=ran)
    assert "4 of 32" in ended.stdout
    assert "8 of 32" not in ended.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "script",
    [
        "observations/ob1.py",
        "observations/importance_check.py",
        "eval/online_ablation.py",
        "eval/compensation.py",
        "eval/stories.py",
        "speed/lossless.py",
    ],
)
def test_studies_look_for_what_is_saved_in_the_checkout(checkout, tmp_path, script):
    """None is saved: each says where it looked."""
    ended = python(checkout / script, "--draw-only", cwd=tmp_path, path=checkout, expect=2)
    (line,) = ended.stderr.splitlines()
    assert f"{checkout}/" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_real_tables_point_to_the_testbeds_runs(ran, tmp_path):
    ended = python(ran / "eval/tables.py", cwd=tmp_path, path=ran, expect=2)
    (line,) = ended.stderr.splitlines()
    assert line.endswith(f"there are some in {ran}/results/testbed/runs: give --benchmark testbed")


@pytest.mark.slow
def test_the_testbeds_observations_and_speeds_go_to_the_checkout(checkout, tmp_path):
    few = ("--model", "llama", "--testbed", "--limit", "2", "--threads", "1", "--max-new-tokens", "4")
    python(checkout / "observations/ob1.py", *few, cwd=tmp_path, path=checkout)
    assert (checkout / "results/testbed/observations/ob1.md").is_file()
    few = ("--testbed", "--strategies", "early_exit", "--prompt-tokens", "64", "--new-tokens", "2", "--rounds", "1")
    python(checkout / "speed/run_llama_speed.py", *few, "--device", "cpu", cwd=tmp_path, path=checkout)
    assert (checkout / "speed/results/cpu/llama_testbed_strategies.json").is_file()
    python("-m", "adaskip", "bench-report", cwd=tmp_path, path=checkout)
    assert (checkout / "speed/results/summary.md").is_file()
    assert not list(tmp_path.iterdir())
