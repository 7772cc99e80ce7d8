"""A search that is killed, in its middle and while its profile is saved, makes what one left alone does."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from adaskip import cli
from tests.tiny_runs import ROOT

UP_TO, SAMPLES = 4, 8


def content_of(path) -> dict:
    """A profile without its times."""
    profile = json.loads(path.read_text())
    cost = {name: value for name, value in profile.pop("cost", {}).items() if not name.endswith("seconds")}
    return {**profile, "cost": cost}


@pytest.mark.slow
def test_a_search_killed_forty_times_ends_with_the_same_profiles(checkpoint, data_dir, tmp_path, monkeypatch):
    given = ["--model", "llama", "--checkpoint", checkpoint, "--data-dir", data_dir, "--select", "decode"]
    given += ["--samples", SAMPLES, "--up-to", UP_TO, "--device", "cpu", "--dtype", "float32", "--threads", 1]
    given = list(map(str, given))
    assert cli.main(["calibrate", *given, "--output-dir", str(tmp_path / "quiet/runs")]) == 0
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    killed = subprocess.run(
        [sys.executable, "-m", "tests.kill_search", str(tmp_path / "killed"), *given],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert killed.returncode == 0, killed.stderr
    counted = json.loads(killed.stdout.splitlines()[-1])
    assert counted["in_search"] + counted["in_saving"] >= 40
    assert counted["in_saving"] >= 10
    quiet, disturbed = (sorted((tmp_path / name / "profiles").iterdir()) for name in ("quiet", "killed"))
    assert [path.name for path in disturbed] == [path.name for path in quiet]  # and nothing half-written
    assert len(quiet) == 2
    for one, other in zip(quiet, disturbed, strict=True):
        assert content_of(other) == content_of(one)
