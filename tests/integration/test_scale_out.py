"""Runs split over processes: the same bytes as one process makes, killed and continued by any number of them.

The processes meet through gloo as those of `accelerate launch` do, which is itself used in the slow tests.
"""

import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from adaskip import cli
from adaskip.common import processes
from adaskip.common.locks import exclusive
from adaskip.runs import runner
from tests.tiny_runs import NUM_SAMPLES, ROOT, cell, records

context = multiprocessing.get_context("forkserver")
context.set_forkserver_preload(["pytest", "adaskip.cli", "transformers.models.llama.modeling_llama"])

LIMIT_S = 240
LABEL = "llama-ADA-E2E/2-sublayers"
ARGV = ["run", *cell("adaskip", "e2e")]
FEW = ["--limit", "2", "--max-new-tokens", "4"]


def one_of_many(rank: int, size: int, port: int, argv: list[str], errors: Path, then: str, at: tuple[int, int]) -> None:
    """One process's life; process `at[0]` is killed, or its disk is full, as it makes its batch number `at[1]`."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1", OMP_NUM_THREADS="1")
    sys.stderr = (errors / f"{rank}.txt").open("w", encoding="utf-8", buffering=1)
    calls, generate = [], runner.generate

    def fails(*args, **kwargs):
        calls.append(1)
        if (rank, len(calls)) == at:
            if then == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError(28, "No space left on device")
        return generate(*args, **kwargs)

    runner.generate = fails
    sys.exit(cli.main(argv))


@pytest.fixture
def launch(tmp_path):
    """Run a command in several processes: their exit codes, and what they said on standard error."""

    def launch(size: int, argv: list[str], then: str = "live", at: tuple[int, int] = (-1, 0)) -> tuple[list, list[str]]:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        errors = tmp_path / f"errors-{port}"
        errors.mkdir()
        processes = [
            context.Process(target=one_of_many, args=(rank, size, port, argv, errors, then, at)) for rank in range(size)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(LIMIT_S)
            process.kill()  # -9 in the exit codes if it still hung
            process.join()
        return [process.exitcode for process in processes], [
            line for path in sorted(errors.iterdir()) for line in path.read_text().splitlines()
        ]

    return launch


def contents(folder: Path) -> dict[str, bytes]:
    """The merged files of records."""
    return {path.name: path.read_bytes() for path in folder.glob("*.jsonl")}


@pytest.fixture
def whole(options, tmp_path):
    """What one process makes of the cell, in batches of `batch_size`."""

    def whole(batch_size: int) -> dict[str, bytes]:
        argv = [*ARGV, *options, "--batch-size", str(batch_size), "--output-dir", str(tmp_path / "whole/runs")]
        assert cli.main(argv) == 0
        found = contents(tmp_path / "whole/runs" / LABEL)
        assert set(found) == {"gov_report.jsonl", "multi_news.jsonl"}
        return found

    return whole


@pytest.mark.parametrize(("size", "batch_size"), [(2, 1), pytest.param(3, 2, marks=pytest.mark.slow)])
def test_several_processes_leave_the_bytes_of_one(launch, whole, options, tmp_path, size, batch_size):
    assert launch(size, [*ARGV, *options, "--batch-size", str(batch_size)]) == ([0] * size, [])
    folder = tmp_path / "runs" / LABEL
    assert contents(folder) == whole(batch_size)
    assert {path.name for path in folder.iterdir()} == {*contents(folder), "manifest.json", "times"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["finished"]
    assert manifest["processes"] == size
    assert len(list((tmp_path / "profiles").iterdir())) == 1
    for task, rows in records(folder).items():
        times = [json.loads(line) for line in (folder / f"times/{task}.jsonl").read_text().splitlines()]
        assert [line["id"] for line in times] == [row["id"] for row in rows]
        assert all(line["ttft_s"] > 0 for line in times)


def test_a_finished_run_is_passed_over_by_every_process_without_weights(launch, options, checkpoint, tmp_path):
    own = Path(shutil.copytree(checkpoint, tmp_path / "own"))
    argv = [*ARGV, *options, "--checkpoint", str(own), *FEW]
    assert cli.main(argv) == 0
    found = contents(tmp_path / "runs" / LABEL)
    (own / "model.safetensors").unlink()
    assert launch(2, argv) == ([0, 0], [])
    assert contents(tmp_path / "runs" / LABEL) == found


def test_a_warning_is_told_by_the_main_process_alone(launch, options, checkpoint, tmp_path):
    own = Path(shutil.copytree(checkpoint, tmp_path / "own"))
    config = json.loads((own / "config.json").read_text())
    (own / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    codes, errors = launch(2, [*ARGV, *options, "--checkpoint", str(own), *FEW])
    assert codes == [0, 0]
    assert errors == [f"{own} has fewer positions than llama: prompts are cut to 256 tokens instead of 31500"]


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [(2, 3, 1), (3, 1, 2), (1, 2, 3)])
def test_a_killed_process_ends_the_others_and_any_number_continues(launch, whole, options, tmp_path, sizes):
    argv, folder = [*ARGV, *options], tmp_path / "runs" / LABEL
    first, second, last = sizes
    for size, rank, batch in ((first, first - 1, 1), (second, 0, 2)):
        codes, errors = launch(size, argv, "die", at=(rank, batch))
        assert codes.pop(rank) == -signal.SIGKILL
        assert set(codes) <= {1}, (codes, errors)
        assert len(errors) == (0 if rank == 0 else 1), errors  # the main process speaks, if it lives
        assert all("a process of this launch died" in line for line in errors)
        assert not json.loads((folder / "manifest.json").read_text())["finished"]
    assert list(folder.glob("parts/*.jsonl"))
    assert launch(last, argv) == ([0] * last, [])
    assert contents(folder) == whole(1)
    assert {path.name for path in folder.iterdir()} == {*contents(folder), "manifest.json", "times"}
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [manifest["processes"], *(entry["processes"] for entry in manifest["resumed"])] == list(sizes)


@pytest.mark.slow
def test_a_failure_of_one_process_is_told_once_and_the_others_finish_their_share(launch, whole, options, tmp_path):
    codes, errors = launch(2, [*ARGV, *options], "fail", at=(1, 2))
    assert codes == [1, 1]
    assert len(errors) == 1
    assert errors[0].startswith("error: process 1 of 2: llama-ADA-E2E/2-sublayers stopped at gov_report")
    assert "No space left on device" in errors[0]
    found = records(tmp_path / "runs" / LABEL)
    assert [row["index"] for row in found["multi_news"]] == [0, 1, 2]  # the main process's share
    assert cli.main([*ARGV, *options]) == 0
    assert contents(tmp_path / "runs" / LABEL) == whole(1)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["run", *cell("adaskip", "e2e", budget="65")], "budget of 65 sublayers (sublayers=65) is too large"),
        (["run", *cell(), "--data-dir", "/nowhere/at/all"], "/nowhere/at/all"),
        (["run", *cell(), "--bugdet", "2"], "unrecognized arguments: --bugdet 2"),
        (["grid", "--limit", "2"], "adaskip grid runs in one process, not in 2"),
    ],
)
def test_a_users_mistake_is_told_once_and_every_process_leaves(launch, options, tmp_path, argv, expected):
    codes, errors = launch(2, [argv[0], *options, *argv[1:]])
    assert codes == [2, 2]
    assert len(errors) == 1, errors
    assert expected in errors[0]
    assert not list(tmp_path.glob("runs/*/*/manifest.json"))


def test_a_device_map_and_several_processes_are_refused(launch, options):
    at = options.index("--device")
    argv = [*ARGV, *options[:at], *options[at + 2 :], "--device-map", "auto"]
    codes, errors = launch(2, argv)
    assert codes == [2, 2]
    assert len(errors) == 1, errors
    assert errors[0].startswith(
        "error: --device-map auto spreads one model over all devices, but 2 processes would each load a model"
    )


def test_a_folder_in_use_is_told_once(launch, options, tmp_path):
    with exclusive(tmp_path / "runs" / LABEL / ".lock"):
        codes, errors = launch(2, [*ARGV, *options])
    assert codes == [2, 2]
    assert len(errors) == 1, errors
    assert f"is in use by process {os.getpid()}" in errors[0]


def test_a_launch_that_started_one_process_only_is_warned_of(options, monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    processes._check_launch.cache_clear()
    assert cli.main([*ARGV, *options, "--limit", "1"]) == 0
    assert "asked for several processes but started one" in caplog.text


def accelerate(*argv: str) -> subprocess.Popen:
    """`accelerate launch` of two processes, on whatever port is free."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    return subprocess.Popen(
        [*command, "--main_process_port", "0", *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.slow
def test_a_script_under_accelerate_launch_leaves_the_bytes_of_one_process(options, tmp_path):
    argv = ["prefill/run_llama_ADA.py", "--skip_sub_layer_num", "2", *options]
    process = accelerate(*argv)
    output, error = process.communicate(timeout=LIMIT_S)
    assert process.returncode == 0, error
    folder = "runs/llama-ADA-PREFILL/2-sublayers"
    assert output == f"llama-ADA-PREFILL/2-sublayers: {3 * NUM_SAMPLES} samples, in {tmp_path / folder}\n"
    alone = ["run", *cell("adaskip", "prefill"), *options, "--output-dir", str(tmp_path / "whole/runs")]
    assert cli.main(alone) == 0
    assert contents(tmp_path / folder) == contents(tmp_path / "whole" / folder)


@pytest.mark.slow
def test_accelerate_ends_the_others_of_a_killed_process_and_the_run_continues(launch, options, tmp_path):
    argv = [*ARGV, *options, "--max-new-tokens", "200"]
    process, folder = accelerate("-m", "adaskip", *argv), tmp_path / "runs" / LABEL
    while not (found := list(folder.glob("parts/*.1-*.jsonl"))):
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)
    os.kill(int(found[0].stem.rpartition("-")[2]), signal.SIGKILL)
    process.communicate(timeout=LIMIT_S)
    assert process.returncode == 1
    assert not json.loads((folder / "manifest.json").read_text())["finished"]
    with exclusive(folder / ".lock"):  # nobody holds it any more
        pass
    assert launch(3, argv) == ([0, 0, 0], [])
    assert cli.main([*argv, "--output-dir", str(tmp_path / "whole/runs")]) == 0
    assert contents(folder) == contents(tmp_path / "whole/runs" / LABEL)
