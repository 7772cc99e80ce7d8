"""`adaskip run`, `grid` and `calibrate` on a random three-layer Llama and LongBench files of a few short records."""

import json
import os
import random
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adaskip import cli, runner
from adaskip.locks import exclusive

ROOT = Path(__file__).resolve().parents[2]
WORDS = [f"w{number}" for number in range(60)]
NUM_SAMPLES = 5
TIMES = ("ttft_s", "tpot_ms")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random Llama of three layers whose answers differ from prompt to prompt, with a word-level tokenizer."""
    path = tmp_path_factory.mktemp("checkpoint")
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<pad>", "<eos>", *WORDS])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=512,
        initializer_range=0.5,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    """LongBench-E files; `length` says that the few words are more than 4000."""
    path, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    for task in ("trec", "triviaqa", "multifieldqa_en", "gov_report", "multi_news", "qasper"):
        samples = [
            {
                "input": "" if task in ("gov_report", "multi_news") else rng.choice(WORDS),
                "context": " ".join(rng.choices(WORDS, k=rng.randint(5, 30))),
                "answers": [rng.choice(WORDS)],
                "length": 5000,
                "dataset": f"{task}_e",
                "language": "en",
                "all_classes": WORDS[:4] if task == "trec" else None,
                "_id": f"{task}-{number}",
            }
            for number in range(NUM_SAMPLES)
        ]
        (path / f"{task}_e.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    return path


@pytest.fixture
def options(checkpoint, data_dir, tmp_path):
    """What every command of these tests is given."""
    return [
        *("--checkpoint", str(checkpoint), "--data-dir", str(data_dir), "--output-dir", str(tmp_path / "runs")),
        *("--device", "cpu", "--dtype", "float32", "--threads", "1", "--max-new-tokens", "24"),
    ]


def cell(strategy="early_exit", phase="decode", budget="2", model="llama"):
    return ["--model", model, "--phase", phase, "--strategy", strategy] + (["--budget", budget] if budget else [])


def records(folder: Path) -> dict[str, list[dict]]:
    """Every task's records without their times."""
    return {
        path.stem: [
            {name: value for name, value in json.loads(line).items() if name not in TIMES}
            for line in path.read_text().splitlines()
        ]
        for path in sorted(folder.glob("*.jsonl"))
    }


def error_of(capsys) -> str:
    """The one line on standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
@pytest.mark.parametrize(
    ("strategy", "short"), [("full", "FULL"), ("early_exit", "EE"), ("skipdecode", "SD"), ("adaskip", "ADA")]
)
def test_a_run_leaves_a_record_per_sample_and_a_finished_manifest(options, tmp_path, phase, strategy, short):
    budget = 0 if strategy == "full" else 2
    assert cli.main(["run", *cell(strategy, phase, None if strategy == "full" else "2"), *options]) == 0
    folder = tmp_path / "runs" / f"llama-{short}-{phase.upper()}" / f"{budget}-sublayers"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["finished"]
    assert manifest["budget"] == {"sublayers": budget, "layers": budget / 2, "fraction": budget / 6}
    assert manifest["dtype"] == "float32"
    assert (manifest["profile"] is not None) == (strategy == "adaskip")
    found = records(folder)
    assert {task: len(rows) for task, rows in found.items()} == manifest["tasks"]
    for task, rows in found.items():
        assert [(row["id"], row["task"], row["index"]) for row in rows] == [
            (f"{task}-{index}", task, index) for index in range(NUM_SAMPLES)
        ]
        assert len({row["prediction"] for row in rows}) > 1
        for row in rows:
            assert 1 <= row["new_tokens"] <= 24
            assert skipped(row, "prefill") == (0 if phase == "decode" else budget)
            assert skipped(row, "decode") == budget + len(row["online_ffns"])
    assert not list(folder.glob(".*"))


def skipped(row: dict, stage: str) -> int:
    return sum(len(layers) for layers in row["plan"][stage].values())


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7])
def test_a_run_cut_anywhere_and_continued_equals_an_uninterrupted_one(options, tmp_path, batch_size):
    argv = ["run", *cell("adaskip", "e2e"), *options, "--batch-size", str(batch_size)]
    assert cli.main(argv) == 0
    folder = tmp_path / "runs/llama-ADA-E2E/2-sublayers"
    whole, path = records(folder), folder / "gov_report.jsonl"
    content = path.read_bytes()
    for cut in (0, 10, len(content) // 2, len(content) - 1):
        path.write_bytes(content[:cut])
        assert cli.main(argv) == 0
        assert records(folder) == whole


def test_a_finished_run_is_not_made_again(options, tmp_path, capsys, monkeypatch):
    argv = ["run", *cell(), *options]
    assert cli.main(argv) == 0
    monkeypatch.setattr(runner, "generate", None)
    assert cli.main(argv) == 0
    assert f"{2 * NUM_SAMPLES} samples, {2 * NUM_SAMPLES} of them before" in capsys.readouterr().out


def test_limit_takes_the_first_samples(options, tmp_path):
    assert cli.main(["run", *cell(), *options, "--limit", "2", "--tasks", "multi_news"]) == 0
    found = records(tmp_path / "runs/llama-EE-DECODE/2-sublayers")
    assert [row["id"] for row in found.pop("multi_news")] == ["multi_news-0", "multi_news-1"]
    assert not found


def test_every_form_of_the_budget_is_the_same_cell(options, tmp_path):
    for form in (["--budget", "2"], ["--skip_full_layer_num", "1"], ["--skip-sub-layer-num", "2"], ["--alpha", "1.5"]):
        assert cli.main(["run", *cell(budget=None), *form, *options]) == 0
    assert [path.name for path in (tmp_path / "runs/llama-EE-DECODE").iterdir()] == ["2-sublayers"]


def test_another_configuration_in_the_same_folder_is_refused(options, capsys):
    assert cli.main(["run", *cell(), *options]) == 0
    capsys.readouterr()
    assert cli.main(["run", *cell(), *options, "--limit", "3", "--batch-size", "2"]) == 2
    assert "limit was null, is 3" in (line := error_of(capsys))
    assert "batch_size was 1, is 2" in line


def test_two_runs_into_one_folder_are_refused(options, tmp_path, capsys):
    folder = tmp_path / "runs/llama-EE-DECODE/2-sublayers"
    with exclusive(folder / ".lock"):
        assert cli.main(["run", *cell(), *options]) == 2
    assert f"{folder} is in use by process {os.getpid()}" in error_of(capsys)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("no memory\nat all"), OSError(28, "No space left on device")])
def test_a_failure_half_way_is_one_line_and_keeps_what_is_made(options, tmp_path, capsys, monkeypatch, error):
    calls, real = [], runner.generate

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(runner, "generate", failing)
        assert cli.main(["run", *cell(), *options]) == 1
    line = error_of(capsys)
    assert "llama-EE-DECODE/2-sublayers stopped at gov_report, samples 2 to 2: " in line
    assert "at all" not in line
    folder = tmp_path / "runs/llama-EE-DECODE/2-sublayers"
    assert len(records(folder)["gov_report"]) == 2
    assert cli.main(["run", *cell(), *options]) == 0
    assert [row["index"] for row in records(folder)["gov_report"]] == list(range(NUM_SAMPLES))


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["run", *cell(budget="3")], "a whole-layer strategy needs an even number of sublayers; got 3"),
        (["run", *cell(budget="6")], "too large"),
        (["run", *cell("adaskip", budget="6")], "too large"),
        (["run", *cell(), "--profile", "nowhere.json"], None),
        (["run", *cell("adaskip"), "--profile", "nowhere.json"], "--profile nowhere.json does not exist"),
        (["run", *cell(), "--tasks", "lcc"], "has no lcc"),
        (["run", *cell(model="lama")], "unknown model 'lama'. Did you mean 'llama'?"),
        (["run"], "missing --model, --phase, --strategy"),
        (["walk"], "invalid choice: 'walk'"),
        ([], "required: COMMAND"),
        (["run", *cell(), "--checkpoint", "/nowhere/at/all"], "/nowhere/at/all"),
        (["run", *cell(), "--data-dir", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_code_2(options, tmp_path, capsys, argv, expected):
    given = argv[:1] + (options if len(argv) > 1 else []) + argv[1:]
    if expected is None:  # a profile that the strategy does not use is not looked at
        assert cli.main(given) == 0
        return
    assert cli.main(given) == 2
    assert expected in error_of(capsys)
    assert not list(tmp_path.glob("runs/*/*/manifest.json"))


def test_the_profile_is_measured_once_and_a_given_one_is_used(options, tmp_path, capsys):
    assert cli.main(["run", *cell("adaskip"), *options]) == 0
    (kept,) = (tmp_path / "profiles").iterdir()
    made = kept.stat().st_mtime_ns
    assert cli.main(["run", *cell("most_skip"), *options]) == 0
    assert kept.stat().st_mtime_ns == made
    calibrate = [option for option in options if option not in ("--output-dir", str(tmp_path / "runs"))]
    calibrate = calibrate[: calibrate.index("--max-new-tokens")]
    assert cli.main(["calibrate", "--model", "llama", "--output", str(tmp_path / "mine.json"), *calibrate]) == 0
    assert (tmp_path / "mine.json").read_text() == kept.read_text()
    argv = ["run", *cell("adaskip", "e2e"), *options, "--profile", str(tmp_path / "mine.json")]
    assert cli.main(argv) == 0
    manifest = json.loads((tmp_path / "runs/llama-ADA-E2E/2-sublayers/manifest.json").read_text())
    assert manifest["profile"] == str(tmp_path / "mine.json")


def test_answers_end_before_the_stop_string(options, checkpoint):
    from adaskip.models import load_model

    loaded = load_model("internlm", checkpoint=str(checkpoint), device="cpu", dtype="float32")
    stop = loaded.spec.stop_strings[0]
    loaded.tokenizer.decode = lambda ids, **_: f"yes{stop} no"
    assert runner.decode([5], loaded) == "yes"


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


def script(monkeypatch, *argv) -> int:
    """Exit code of `python <argv>`, run in this process."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", list(argv))
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(argv[0], run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize(
    ("line", "label"),
    [
        ("prefill/run_llama_EE.py --model llama-EE-PREFILL --skip_full_layer_num 2", "llama-EE-PREFILL/4-sublayers"),
        (
            "decode/run_internlm_ADA.py --model internlm-ADA-DECODE --skip_sub_layer_num 4",
            "internlm-ADA-DECODE/4-sublayers",
        ),
        ("e2e/run_vicuna_US.py --model vicuna-US-E2E --skip_full_layer_num 1", "vicuna-US-E2E/2-sublayers"),
        ("e2e/run_vicuna_US.py --skip_full_layer_num 0", "vicuna-US-E2E/0-sublayers"),
    ],
)
def test_the_artifacts_lines_work(options, monkeypatch, capsys, line, label):
    assert script(monkeypatch, *line.split(), *options, "--limit", "1") == 0
    assert capsys.readouterr().out.startswith(f"{label}: ")


@pytest.mark.parametrize("asked", ["vicuna-EE-PREFILL", "llama-EE-DECODE", "llama-ADA-PREFILL", "llama"])
def test_a_script_refuses_another_runs_name(monkeypatch, capsys, asked):
    argv = ["prefill/run_llama_EE.py", "--model", asked, "--skip_full_layer_num", "1"]
    assert script(monkeypatch, *argv) == 2
    assert "llama-EE-PREFILL" in error_of(capsys)


@pytest.mark.slow
def test_a_script_runs_as_typed(options):
    process = adaskip("prefill/run_llama_EE.py", "--model", "llama-EE-PREFILL", "--skip_full_layer_num", "1", *options)
    output, error = process.communicate()
    assert (process.returncode, error) == (0, "")
    assert output.startswith(f"llama-EE-PREFILL/2-sublayers: {3 * NUM_SAMPLES} samples")


def wait_for_records(folder: Path, count: int, process: subprocess.Popen) -> None:
    while sum(path.read_bytes().count(b"\n") for path in folder.glob("*.jsonl")) < count:
        assert process.poll() is None, process.communicate()
        time.sleep(0.002)


@pytest.mark.slow
@pytest.mark.parametrize("batch_size", ["1", "2"])
def test_a_run_killed_twice_and_continued_equals_an_uninterrupted_one(options, tmp_path, batch_size):
    argv = ["-m", "adaskip", "run", *cell("adaskip", "e2e"), *options, "--batch-size", batch_size]
    assert cli.main([*argv[2:], "--output-dir", str(tmp_path / "whole/runs")]) == 0
    folder = tmp_path / "runs/llama-ADA-E2E/2-sublayers"
    for count in sorted(random.sample(range(1, 2 * NUM_SAMPLES), 2)):
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


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_cleanly_with_a_hint(options, tmp_path, number):
    process = adaskip("-m", "adaskip", "run", *cell(), *options)
    wait_for_records(tmp_path / "runs/llama-EE-DECODE/2-sublayers", 1, process)
    process.send_signal(number)
    _, error = process.communicate()
    assert error == f"stopped by {number.name}; the same command continues\n"
    assert process.returncode == 128 + number
    assert not (tmp_path / "runs/llama-EE-DECODE/2-sublayers/.lock").exists()


GRID = ["--models", "llama", "--phases", "decode", "--budgets", "2", "--jobs", "2"]


@pytest.mark.slow
def test_a_grid_runs_every_cell_and_then_finds_them_complete(options, tmp_path, capsys):
    assert cli.main(["grid", *GRID, *options, "--dry-run"]) == 0
    assert capsys.readouterr().out.endswith(f"0 of 5 cells done in {tmp_path / 'runs'}\n")
    assert cli.main(["grid", *GRID, *options]) == 0
    made = 5 * 2 * NUM_SAMPLES
    assert capsys.readouterr().out == f"5 of 5 cells complete in {tmp_path / 'runs'}, {made} samples made now\n"
    assert len(list((tmp_path / "profiles").iterdir())) == 1
    assert cli.main(["grid", *GRID, *options]) == 0
    assert capsys.readouterr().out == f"5 of 5 cells complete in {tmp_path / 'runs'}, 0 samples made now\n"
    assert cli.main(["grid", *GRID, *options, "--dry-run"]) == 0
    assert "5 of 5 cells done" in capsys.readouterr().out


@pytest.mark.slow
def test_a_failed_cell_is_reported_and_the_others_go_on(options, tmp_path, capsys):
    held = tmp_path / "runs/llama-SD-DECODE/2-sublayers"
    with exclusive(held / ".lock"):
        assert cli.main(["grid", *GRID, *options]) == 1
    output = capsys.readouterr()
    assert output.out.startswith("4 of 5 cells complete")
    assert f"llama-SD-DECODE/2-sublayers failed: {held} is in use by process {os.getpid()}" in output.err


@pytest.mark.slow
def test_a_killed_grid_takes_its_workers_with_it_and_continues(options, tmp_path):
    argv = ["-m", "adaskip", "grid", *GRID, *options]
    process = adaskip(*argv)
    while len(list((tmp_path / "runs").glob("*/*/*.jsonl"))) < 3:
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.kill()
    process.communicate()  # the workers hold the pipes as long as they live
    process = adaskip(*argv)
    output, error = process.communicate()
    assert process.returncode == 0
    assert all(line.endswith(" complete") for line in error.splitlines())
    assert output.startswith("5 of 5 cells complete")


@pytest.mark.slow
def test_ctrl_c_ends_a_grid_with_one_line(options, tmp_path):
    process = adaskip("-m", "adaskip", "grid", *GRID, *options, start_new_session=True)
    while not list((tmp_path / "runs").glob("*/*/.lock")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers, too
    _, error = process.communicate()
    lines = [line for line in error.splitlines() if not line.endswith(" complete")]
    assert lines == ["stopped by SIGINT; the same command continues"]
    assert process.returncode == 130


@pytest.mark.slow
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
