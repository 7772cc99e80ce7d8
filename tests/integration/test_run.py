"""`adaskip run` and `calibrate` and the run scripts, in this process."""

import json
import os
import runpy
import shutil
import sys

import pytest
import torch
from transformers import LlamaForCausalLM

from adaskip import cli, testbed
from adaskip.common.locks import exclusive
from adaskip.models.loading import load_model
from adaskip.runs import runner
from adaskip.strategies.adaskip import LEARNING_WINDOW
from dev.testbed_training.families import model_config
from dev.testbed_training.tokenizer import build_tokenizer
from tests.tiny_runs import NUM_SAMPLES, ROOT, cell, error_of, records

BEYOND_THE_WINDOW = ("--max-new-tokens", str(LEARNING_WINDOW + 4))
"""Answers in which AdaSkip skips what it has learnt."""


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
@pytest.mark.parametrize(
    ("strategy", "short"), [("full", "FULL"), ("early_exit", "EE"), ("skipdecode", "SD"), ("adaskip", "ADA")]
)
def test_a_run_leaves_a_record_per_sample_and_a_finished_manifest(options, tmp_path, phase, strategy, short):
    budget = 0 if strategy == "full" else 2
    argv = ["run", *cell(strategy, phase, None if strategy == "full" else "2"), *options]
    assert cli.main([*argv, *BEYOND_THE_WINDOW] if strategy == "adaskip" else argv) == 0
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
            assert 1 <= row["new_tokens"] <= (LEARNING_WINDOW + 4 if strategy == "adaskip" else 8)
            assert skipped(row, "prefill") == (0 if phase == "decode" else budget)
            assert skipped(row, "decode") == budget + len(row["online_ffns"])
    assert not list(folder.glob(".*"))


def skipped(row: dict, stage: str) -> int:
    return sum(len(layers) for layers in row["plan"][stage].values())


@pytest.mark.parametrize("batch_size", [1, 2, 5, 7])
def test_a_run_cut_anywhere_and_continued_equals_an_uninterrupted_one(options, tmp_path, batch_size):
    argv = ["run", *cell("adaskip", "e2e"), *options, *BEYOND_THE_WINDOW, "--batch-size", str(batch_size)]
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


def test_a_subset_is_one_random_draw_for_every_cell(options, tmp_path):
    """Every strategy gets the same samples, the seed decides which, and a larger subset begins with the smaller."""
    drawn = {}
    for size, seed, strategy in ((3, 0, "early_exit"), (3, 0, "unified"), (4, 0, "early_exit"), (3, 1, "early_exit")):
        out = tmp_path / f"{size}-{seed}-{strategy}"
        given = ["--subset", str(size), "--seed", str(seed), "--output-dir", str(out)]
        assert cli.main(["run", *cell(strategy), *options, *given]) == 0
        (folder,) = out.glob("*/2-sublayers")
        manifest = json.loads((folder / "manifest.json").read_text())
        assert (manifest["subset"], manifest["seed"], manifest["limit"]) == (size, seed, None)
        drawn[size, seed, strategy] = [row["id"] for row in records(folder)["gov_report"]]
        assert len(set(drawn[size, seed, strategy])) == size
    assert drawn[3, 0, "early_exit"] == drawn[3, 0, "unified"] == drawn[4, 0, "early_exit"][:3]
    assert drawn[3, 1, "early_exit"] != drawn[3, 0, "early_exit"]


def test_a_subset_of_more_than_there_is_is_all_of_it(options, tmp_path):
    assert cli.main(["run", *cell(), *options, "--subset", "100"]) == 0
    found = records(tmp_path / "runs/llama-EE-DECODE/2-sublayers")
    assert {row["id"] for row in found["gov_report"]} == {f"gov_report-{index}" for index in range(NUM_SAMPLES)}


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


def state_of(options, capsys, *given) -> str:
    """What the dry run says of the one cell."""
    grid = ["grid", "--models", "llama", "--phases", "decode", "--strategies", "early_exit", "--budgets", "2"]
    assert cli.main([*grid, *options, *given, "--dry-run"]) == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("size", ["--limit", "--subset"])
def test_a_run_goes_on_with_more_samples(options, tmp_path, capsys, size):
    """It makes those that are missing, and its records are those of a run that was given all of them at once."""
    argv = ["run", *cell(), *options, size]
    assert cli.main([*argv, "2"]) == 0
    assert "unfinished" in state_of(options, capsys, size, "4")
    assert cli.main([*argv, "4"]) == 0
    assert "8 samples, 4 of them before" in capsys.readouterr().out
    folder = tmp_path / "runs/llama-EE-DECODE/2-sublayers"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["tasks"] == {"gov_report": 4, "multi_news": 4}
    assert manifest["finished"]
    assert len(manifest["resumed"]) == 1
    at_once = tmp_path / "at_once"
    assert cli.main([*argv, "4", "--output-dir", str(at_once)]) == 0
    assert records(folder) == records(at_once / "llama-EE-DECODE/2-sublayers")
    assert cli.main([*argv, "4"]) == 0
    assert "8 samples, 8 of them before" in capsys.readouterr().out


def test_a_run_of_few_samples_goes_on_to_all_of_them(options, tmp_path, capsys):
    assert cli.main(["run", *cell(), *options, "--limit", "2"]) == 0
    assert cli.main(["run", *cell(), *options]) == 0
    assert f"{2 * NUM_SAMPLES} samples, 4 of them before" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (("--limit", "4"), ("--limit", "2")),
        (("--limit", "2"), ("--subset", "4")),
        (("--subset", "2"), ("--subset", "4", "--seed", "1")),
        (("--limit", "3", "--batch-size", "2"), ("--limit", "5", "--batch-size", "2")),  # the last batch is cut
    ],
    ids=" ".join,
)
def test_a_run_whose_samples_are_not_the_first_of_those_wanted_does_not_go_on(options, capsys, before, after):
    assert cli.main(["run", *cell(), *options, *before]) == 0
    capsys.readouterr()
    assert cli.main(["run", *cell(), *options, *after]) == 2
    assert "holds a run with another configuration" in error_of(capsys)


@pytest.mark.parametrize("field", ["data_fingerprint", "versions"])
def test_a_run_of_other_data_or_versions_does_not_go_on(options, tmp_path, capsys, field):
    assert cli.main(["run", *cell(), *options, "--limit", "2"]) == 0
    path = tmp_path / "runs/llama-EE-DECODE/2-sublayers/manifest.json"
    manifest = json.loads(path.read_text())
    path.write_text(json.dumps({**manifest, field: "another"}))
    capsys.readouterr()
    assert cli.main(["run", *cell(), *options, "--limit", "4"]) == 2
    assert f"{field} was" in error_of(capsys)


def test_a_cell_of_other_weights_or_settings_does_not_count_as_done(options, checkpoint, tmp_path, capsys):
    assert cli.main(["run", *cell(), *options]) == 0
    capsys.readouterr()
    assert "1 of 1 cells done" in state_of(options, capsys)
    for given, says in (
        (["--dtype", "bfloat16"], 'other dtype: "float32", here "bfloat16"'),
        (["--attn-implementation", "eager"], 'other attn implementation: "sdpa", here "eager"'),
        (["--chat", "Q: {prompt}"], 'other chat template: null, here "Q: {prompt}"'),
        (["--subset", "3"], "other tasks: "),
    ):
        output = state_of(options, capsys, *given)
        assert says in output
        assert "0 of 1 cells done" in output
        assert cli.main(["run", *cell(), *options, *given]) == 2
        assert "holds a run with another configuration" in error_of(capsys)
    other = shutil.copytree(checkpoint, tmp_path / "other")
    assert "1 of 1 cells done" in state_of(options, capsys, "--checkpoint", str(other))
    model = LlamaForCausalLM.from_pretrained(other)
    model.lm_head.weight.data.mul_(1.5)
    model.save_pretrained(other)
    output = state_of(options, capsys, "--checkpoint", str(other))
    assert "other weight files: " in output
    assert cli.main(["run", *cell(), *options, "--checkpoint", str(other)]) == 2
    assert "weights_fingerprint was" in error_of(capsys)


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
        (["run", *cell(), "--profile", "nowhere.json"], "--profile nowhere.json is of no use: strategy 'early_exit'"),
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
    assert cli.main(given) == 2
    assert expected in error_of(capsys)
    assert not list(tmp_path.glob("runs/*/*/manifest.json"))


def test_the_profile_is_measured_once_and_a_given_one_is_used(options, tmp_path, capsys):
    assert cli.main(["run", *cell("adaskip"), *options]) == 0
    (kept,) = (tmp_path / "profiles").iterdir()
    made = kept.stat().st_mtime_ns
    assert cli.main(["run", *cell("most_skip"), *options]) == 0
    assert kept.stat().st_mtime_ns == made
    calibrate = options[: options.index("--max-new-tokens")]
    assert cli.main(["calibrate", "--model", "llama", "--output", str(tmp_path / "mine.json"), *calibrate]) == 0
    assert (tmp_path / "mine.json").read_text() == kept.read_text()
    argv = ["run", *cell("adaskip", "e2e"), *options, "--profile", str(tmp_path / "mine.json")]
    assert cli.main(argv) == 0
    manifest = json.loads((tmp_path / "runs/llama-ADA-E2E/2-sublayers/manifest.json").read_text())
    assert manifest["profile"] == str(tmp_path / "mine.json")


def test_answers_end_before_the_stop_string(options, checkpoint):
    loaded = load_model("internlm", checkpoint=str(checkpoint), device="cpu", dtype="float32")
    stop = loaded.spec.stop_strings[0]
    loaded.tokenizer.decode = lambda ids, **_: f"yes{stop} no"
    assert runner.decode([5], loaded) == "yes"


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


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("prefill/run_llama_EE.py", "phase: decode"),
        ("prefill/run_llama_EE.py", "model: vicuna"),
        ("speed/run_llama_speed.py", "figure: overhead_100m"),
    ],
)
def test_a_scripts_yaml_file_does_not_name_what_the_script_decides(monkeypatch, capsys, tmp_path, path, text):
    (tmp_path / "c.yaml").write_text(f"{text}\n")
    assert script(monkeypatch, path, "--config", str(tmp_path / "c.yaml")) == 2
    assert f"c.yaml names {text.split(':')[0]}, which is decided here: leave it out" in error_of(capsys)


def test_the_testbed_is_one_more_checkpoint_and_its_records(tmp_path):
    path = tmp_path / "checkpoint"
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(path)
    LlamaForCausalLM(model_config("vicuna", len(tokenizer), num_layers=3)).save_pretrained(path)
    argv = ["run", *cell("adaskip", "e2e", model="vicuna"), "--testbed", "--checkpoint", str(path), "--device", "cpu"]
    given = ["--limit", "2", "--batch-size", "2", "--max-new-tokens", "4", "--output-dir", str(tmp_path / "runs")]
    assert cli.main([*argv, *given]) == 0
    folder = tmp_path / "runs/vicuna-ADA-E2E/2-sublayers"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["benchmark"] == "testbed"
    assert manifest["chat_template"] is None
    assert manifest["tasks"] == {"gov_report": 2, "multi_news": 2}
    expected = testbed.records("gov_report", limit=2)
    assert [row["references"] for row in records(folder)["gov_report"]] == [sample["answers"] for sample in expected]
    assert all(row["prompt_tokens"] > 500 for row in records(folder)["gov_report"])
