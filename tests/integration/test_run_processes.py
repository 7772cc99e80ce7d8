"""Runs and grids as processes of their own: killed, interrupted, side by side."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaskip import cli
from adaskip.common.locks import exclusive
from adaskip.strategies.names import PAPER_STRATEGIES
from tests.tiny_runs import NUM_SAMPLES, ROOT, cell, records

pytestmark = pytest.mark.slow


def adaskip(*argv, **options) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        [sys.executable, *argv],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        **options,
    )


def test_a_script_runs_as_typed(options):
    process = adaskip("prefill/run_llama_EE.py", "--model", "llama-EE-PREFILL", "--skip_full_layer_num", "1", *options)
    output, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    assert output.startswith(f"llama-EE-PREFILL/2-sublayers: {3 * NUM_SAMPLES} samples")


def test_a_checkpoint_that_cannot_be_had_is_one_line_that_says_what_to_do(data_dir, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    process = adaskip("prefill/run_llama_EE.py", "--skip_full_layer_num", "4", "--data-dir", str(data_dir))
    output, error = process.communicate()
    assert (process.returncode, output, error.count("\n")) == (2, "", 1)
    assert "Llama-3.1-8B" in error
    assert "--checkpoint" in error
    assert "--testbed" in error


def wait_for_records(folder: Path, count: int, process: subprocess.Popen) -> None:
    while num_records(folder) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


def num_records(folder: Path) -> int:
    """Whole lines in all files of records; 0 while the files are being merged."""
    try:
        return sum(path.read_bytes().count(b"\n") for path in [*folder.glob("*.jsonl"), *folder.glob("parts/*.jsonl")])
    except FileNotFoundError:
        return 0


@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_a_run_killed_twice_and_continued_equals_an_uninterrupted_one(options, tmp_path, batch_size):
    argv = ["-m", "adaskip", "run", *cell("adaskip", "e2e"), *options, "--batch-size", batch_size]
    assert cli.main([*argv[2:], "--output-dir", str(tmp_path / "whole/runs")]) == 0
    folder = tmp_path / "runs/llama-ADA-E2E/2-sublayers"
    for count in sorted(random.Random(batch_size).sample(range(1, 2 * NUM_SAMPLES), 2)):
        process = adaskip(*argv)
        wait_for_records(folder, count, process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    with (folder / "multi_news.jsonl").open("ab") as handle:
        handle.write(b'{"id": "multi_news-')
    process = adaskip(*argv)
    assert process.communicate()[1] == ""
    assert process.returncode == 0
    assert records(folder) == records(tmp_path / "whole/runs/llama-ADA-E2E/2-sublayers")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert len(manifest["resumed"]) == 2
    assert manifest["finished"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_cleanly_with_a_hint(options, tmp_path, number):
    process = adaskip("-m", "adaskip", "run", *cell(), *options)
    wait_for_records(tmp_path / "runs/llama-EE-DECODE/2-sublayers", 1, process)
    process.send_signal(number)
    _, error = process.communicate()
    assert error == f"stopped by {number.name}; run the same command again to continue\n"
    assert process.returncode == 128 + number
    assert not (tmp_path / "runs/llama-EE-DECODE/2-sublayers/.lock").exists()


GRID = ["--models", "llama", "--phases", "decode", "--budgets", "2", "--jobs", "2"]
GRID += ["--strategies", *PAPER_STRATEGIES]


def test_a_grid_runs_every_cell_and_then_finds_them_complete(options, tmp_path, capsys):
    assert cli.main(["grid", *GRID, *options, "--dry-run"]) == 0
    assert f"0 of 5 cells done in {tmp_path / 'runs'}\n" in capsys.readouterr().out
    assert cli.main(["grid", *GRID, *options]) == 0
    made = 5 * 2 * NUM_SAMPLES
    assert capsys.readouterr().out == f"5 of 5 cells complete in {tmp_path / 'runs'}, {made} samples made now\n"
    assert len(list((tmp_path / "profiles").iterdir())) == 1
    assert cli.main(["grid", *GRID, *options]) == 0
    assert capsys.readouterr().out == f"5 of 5 cells complete in {tmp_path / 'runs'}, 0 samples made now\n"
    assert cli.main(["grid", *GRID, *options, "--dry-run"]) == 0
    assert "5 of 5 cells done" in capsys.readouterr().out


def test_a_failed_cell_is_reported_and_the_others_go_on(options, tmp_path, capsys):
    held = tmp_path / "runs/llama-SD-DECODE/2-sublayers"
    with exclusive(held / ".lock"):
        assert cli.main(["grid", *GRID, *options]) == 1
    output = capsys.readouterr()
    assert output.out.startswith("4 of 5 cells complete")
    assert f"llama-SD-DECODE/2-sublayers failed: {held} is in use by process {os.getpid()}" in output.err


def test_a_killed_grid_takes_its_workers_with_it_and_continues(options, tmp_path):
    argv = ["-m", "adaskip", "grid", *GRID, *options]
    process = adaskip(*argv)
    while len(list((tmp_path / "runs").rglob("*.jsonl"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()  # the workers hold the pipes as long as they live
    process = adaskip(*argv)
    output, error = process.communicate()
    assert process.returncode == 0
    assert all(line.endswith(" complete") for line in error.splitlines())
    assert output.startswith("5 of 5 cells complete")


def test_ctrl_c_ends_a_grid_with_one_line(options, tmp_path):
    process = adaskip("-m", "adaskip", "grid", *GRID, *options, start_new_session=True)
    while not list((tmp_path / "runs").glob("*/*/.lock")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers, too
    _, error = process.communicate()
    lines = [line for line in error.splitlines() if not line.endswith(" complete")]
    assert lines == ["stopped by SIGINT; run the same command again to continue"]
    assert process.returncode == 130


def test_a_worker_that_dies_fails_its_cell_only(options, tmp_path):
    process = adaskip("-m", "adaskip", "grid", *GRID, *options)
    while not (locks := [path for path in (tmp_path / "runs").glob("*/*/.lock") if path.read_text()]):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.kill(json.loads(locks[0].read_text())["pid"], signal.SIGKILL)
    output, error = process.communicate()
    assert process.returncode == 1
    assert output.startswith("4 of 5 cells complete")
    assert f"{locks[0].parent.relative_to(tmp_path / 'runs')} failed: its process died" in error
