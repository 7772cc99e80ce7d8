"""What is known of a run before its model is loaded: that it cannot be, or that it is finished."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from adaskip import cli
from adaskip.benchmarks import longbench_tasks
from adaskip.runs import loading
from adaskip.runs.checks import build_strategies, check
from adaskip.runs.config import RunConfig
from adaskip.runs.estimate import assumed_plans
from adaskip.runs.job import resolve
from tests.tiny_runs import NUM_SAMPLES, NUM_SHORT, ROOT, cell, error_of, records, write_samples

LABEL = "llama-EE-DECODE/2-sublayers"
NEWER = ("sets", "min_length", "max_prompt_tokens", "stop_token_ids", "stop_strings", "templates_fingerprint")


@pytest.fixture
def options(options):
    """Short answers: none of these tests looks at them."""
    return [*options, "--max-new-tokens", "4"]


@pytest.fixture
def no_model(monkeypatch):
    """From here on a model that is loaded fails the test."""

    def load_source(*arguments, **options):
        raise AssertionError("a model was loaded")

    def forbid():
        monkeypatch.setattr(loading, "load_source", load_source)
        monkeypatch.setattr(loading, "_held", {})

    return forbid


@pytest.fixture
def own(checkpoint, data_dir, tmp_path):
    """A copy of checkpoint and data to break, and the options that name them."""
    copies = {"checkpoint": checkpoint, "data-dir": data_dir}
    folders = {name: Path(shutil.copytree(source, tmp_path / name)) for name, source in copies.items()}
    given = [part for name, folder in folders.items() for part in (f"--{name}", str(folder))]
    return folders["checkpoint"], folders["data-dir"], given


def manifest_of(tmp_path: Path, label: str = LABEL) -> dict:
    return json.loads((tmp_path / "runs" / label / "manifest.json").read_text())


def edit_manifest(tmp_path: Path, edited: dict, label: str = LABEL) -> None:
    (tmp_path / "runs" / label / "manifest.json").write_text(json.dumps(edited))


# What cannot be


def break_weights(checkpoint: Path, data: Path) -> None:
    (checkpoint / "model.safetensors").write_bytes((checkpoint / "model.safetensors").read_bytes()[:-50])


def remove_weights(checkpoint: Path, data: Path) -> None:
    (checkpoint / "model.safetensors").unlink()


def break_data(checkpoint: Path, data: Path) -> None:
    with (data / "multi_news_e.jsonl").open("a") as handle:
        handle.write("{\n")


def break_calibration(checkpoint: Path, data: Path) -> None:
    (data / "qasper_e.jsonl").write_text("{\n")


def remove_calibration(checkpoint: Path, data: Path) -> None:
    (data / "qasper_e.jsonl").unlink()


def break_profile(checkpoint: Path, data: Path) -> None:
    (data / "profile.json").write_text("{")


def nothing(checkpoint: Path, data: Path) -> None: ...


@pytest.mark.parametrize(
    ("damage", "run", "more", "says"),
    [
        (break_weights, cell(), [], "model.safetensors is truncated or not a safetensors file"),
        (remove_weights, cell(), [], "has no weights"),
        (break_data, cell(), [], "multi_news_e.jsonl:16: not valid JSON"),
        (break_calibration, cell("adaskip"), [], "qasper_e.jsonl:1: not valid JSON"),
        (remove_calibration, cell("adaskip"), [], "has no qasper_e or qasper (.jsonl)"),
        (remove_calibration, cell("calibrated"), [], "has no qasper_e or qasper (.jsonl)"),
        (break_profile, cell("adaskip"), ["--profile", "profile.json"], "profile.json is not JSON"),
        (nothing, cell("adaskip"), ["--profile", "nowhere.json"], "nowhere.json does not exist"),
        (nothing, cell(budget="3"), [], "an even number of sublayers; got 3"),
        (nothing, cell("most_skip", budget="3"), [], "an even number of sublayers; got 3"),
        (
            nothing,
            cell("cosine_window", budget="3"),
            [],
            "no set for budget sublayers=3, of 3 sublayers; it has sets of",
        ),
        (nothing, cell("evopress", budget="5"), [], "of up to 4 sublayers, budget sublayers=5 needs 5"),
        (nothing, cell("early_exit", budget="6"), [], "too large"),
        (nothing, cell("adaskip"), ["--beta-quantile", "2"], "beta_quantile must be between 0 and 1; got 2"),
        (nothing, cell("calibrated"), ["--learning-window", "3"], "calibrated has no option learning_window"),
        (break_weights, cell("calibrated", budget=None), ["--target-speedup", "1.2"], "is truncated"),
        (remove_calibration, cell("calibrated", budget=None), ["--target-speedup", "1.2"], "has no qasper_e or qasper"),
    ],
)
def test_what_cannot_be_is_refused_before_the_model_is_loaded(
    options, own, no_model, tmp_path, capsys, damage, run, more, says
):
    checkpoint, data, given = own
    damage(checkpoint, data)
    no_model()
    more = [str(data / part) if part.endswith(".json") else part for part in more]
    assert cli.main(["run", *run, *options, *given, *more]) == 2
    assert says in error_of(capsys)
    assert not (tmp_path / "runs").exists()


def test_check_alone_says_nothing_of_a_run_that_can_be(own, no_model):
    checkpoint, data, _ = own
    no_model()
    for strategy, sublayers in (
        ("full", None),
        ("skipdecode", 2),
        ("adaskip", 5),
        ("least_skip", 4),
        ("calibrated", 5),
        ("block_influence", 2),
        ("cosine_window", 4),
        ("blockpruner", 5),
        ("evopress", 4),
    ):
        config = RunConfig(
            **{"model": "llama", "phase": "e2e", "strategy": strategy, "budget": sublayers, "device": "cpu"},
            **{"checkpoint": str(checkpoint), "data_dir": str(data)},
        )
        check(resolve(config))
    break_weights(checkpoint, data)
    with pytest.raises(ValueError, match="truncated"):
        check(resolve(config))


@pytest.mark.parametrize(("given", "expected"), [((), 8), (("max_decode_steps=3",), 3)])
def test_skipdecodes_last_step_is_the_cap_of_a_task_unless_it_is_given(checkpoint, data_dir, given, expected):
    config = RunConfig(
        **{"model": "llama", "phase": "decode", "strategy": "skipdecode", "budget": 4, "device": "cpu"},
        **{"checkpoint": str(checkpoint), "data_dir": str(data_dir), "max_new_tokens": 8, "strategy_option": given},
    )
    job = resolve(config)
    assert {strategy.max_decode_steps for strategy in build_strategies(job, None)} == {expected}
    _, plan_of_step = assumed_plans(job, 8, num_layers=8, new_tokens=8)
    assert len(plan_of_step(3).attention) == (4 if given else 3)


# What is finished


def test_a_finished_run_needs_neither_model_nor_weights_and_tells_its_samples(options, own, no_model, tmp_path, capsys):
    checkpoint, _, given = own
    argv = ["run", *cell("adaskip"), *options, *given]
    assert cli.main(argv) == 0
    before, manifest = capsys.readouterr().out, manifest_of(tmp_path, "llama-ADA-DECODE/2-sublayers")
    no_model()
    remove_weights(checkpoint, checkpoint)
    assert cli.main(argv) == 0
    made = 2 * NUM_SAMPLES
    assert before == capsys.readouterr().out.replace(f", {made} of them before", "")
    assert manifest_of(tmp_path, "llama-ADA-DECODE/2-sublayers") == manifest


def test_a_finished_run_is_no_other_profiles(options, own, tmp_path, capsys):
    argv = ["run", *cell("adaskip"), *options]
    assert cli.main(argv) == 0
    (kept,) = (tmp_path / "profiles").glob("*.json")
    assert cli.main([*argv, "--profile", str(kept)]) == 0
    profile = json.loads(kept.read_text())
    profile["ffn"]["scale"][0] += 1
    (tmp_path / "other.json").write_text(json.dumps(profile))
    capsys.readouterr()
    assert cli.main([*argv, "--profile", str(tmp_path / "other.json")]) == 2
    assert "profile_fingerprint was" in error_of(capsys)


def test_a_run_with_a_given_profile_is_not_the_one_without(options, tmp_path, capsys):
    made = str(tmp_path / "other.json")
    calibrate = ["calibrate", "--model", "llama", *options[:-4], "--samples", "3", "--output", made]
    assert cli.main(calibrate) == 0
    argv = ["run", *cell("adaskip"), *options]
    assert cli.main([*argv, "--profile", made]) == 0
    capsys.readouterr()
    assert cli.main(argv) == 2
    assert "profile_given was true, is false" in error_of(capsys)


def test_a_run_without_the_chat_template_is_not_the_one_with_it(options, own, capsys):
    checkpoint, _, given = own
    (checkpoint / "chat_template.jinja").write_text("w1 {{ messages[0]['content'] }} w2")
    argv = ["run", *cell("full", budget=None), *options, *given]
    for first, second in (("none", "template"), ("template", "none")):
        (folder := checkpoint.parent / first).mkdir()
        chosen = [*argv, "--output-dir", str(folder), "--chat"]
        assert cli.main([*chosen, first]) == 0
        assert cli.main([*chosen, first]) == 0
        capsys.readouterr()
        assert cli.main([*chosen, second]) == 2
        assert "chat_template was" in error_of(capsys)


def test_records_that_a_finished_run_lacks_are_made_only_with_its_versions(options, tmp_path, capsys):
    argv = ["run", *cell(), *options]
    assert cli.main(argv) == 0
    whole, manifest = records(tmp_path / "runs" / LABEL), manifest_of(tmp_path)
    edit_manifest(tmp_path, {**manifest, "versions": {**manifest["versions"], "torch": "1.0"}})
    assert cli.main(argv) == 0  # it is complete
    (tmp_path / "runs" / LABEL / "gov_report.jsonl").write_text("")
    capsys.readouterr()
    assert cli.main(argv) == 2
    assert "versions was" in error_of(capsys)
    edit_manifest(tmp_path, manifest)
    assert cli.main(argv) == 0
    assert records(tmp_path / "runs" / LABEL) == whole
    assert len(manifest_of(tmp_path)["resumed"]) == 1


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_from_before_the_newer_fields_is_still_that_run(options, tmp_path, capsys, finished):
    argv = ["run", *cell(), *options]
    assert cli.main(argv) == 0
    whole, manifest = records(tmp_path / "runs" / LABEL), manifest_of(tmp_path)
    assert all(manifest.pop(name) is not None for name in NEWER)
    if not finished:
        manifest["finished"] = None
        (tmp_path / "runs" / LABEL / "gov_report.jsonl").write_text("")
    edit_manifest(tmp_path, manifest)
    assert cli.main(argv) == 0
    assert manifest_of(tmp_path)["finished"]
    assert records(tmp_path / "runs" / LABEL) == whole


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_prompt_tokens", 9),
        ("stop_strings", ["."]),
        ("templates_fingerprint", "x"),
        ("min_length", 0),
        ("sets", {}),
        ("max_length", 5),
    ],
)
@pytest.mark.parametrize("finished", [True, False])
def test_a_run_with_another_protocol_is_another_run(options, tmp_path, capsys, no_model, name, value, finished):
    argv = ["run", *cell(), *options]
    assert cli.main(argv) == 0
    edit_manifest(tmp_path, {**manifest_of(tmp_path), name: value, "finished": finished or None})
    capsys.readouterr()
    no_model()
    assert cli.main(argv) == 2
    assert f"{name} was {json.dumps(value)}, is " in error_of(capsys)


def test_an_unfinished_run_with_other_stop_tokens_is_not_continued(options, tmp_path, capsys):
    argv = ["run", *cell(), *options]
    assert cli.main(argv) == 0
    assert manifest_of(tmp_path)["stop_token_ids"] == [2]
    edit_manifest(tmp_path, {**manifest_of(tmp_path), "stop_token_ids": [7], "finished": None})
    capsys.readouterr()
    assert cli.main(argv) == 2
    assert "stop_token_ids was [7], is [2]" in error_of(capsys)


def test_another_template_is_another_run(options, capsys, monkeypatch):
    argv = ["run", *cell(), *options]
    assert cli.main(argv) == 0
    task = replace(longbench_tasks.TASKS["gov_report"], template="{context}")
    monkeypatch.setitem(longbench_tasks.TASKS, "gov_report", task)
    capsys.readouterr()
    assert cli.main(argv) == 2
    assert "templates_fingerprint was" in error_of(capsys)


def test_a_checkpoint_of_fewer_positions_has_a_lower_limit_and_is_another_run(options, own, capsys):
    checkpoint, _, given = own
    argv = ["run", *cell(), *options, *given]
    assert cli.main(argv) == 0
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    capsys.readouterr()
    assert cli.main(argv) == 2
    assert "max_prompt_tokens was 31500, is 256" in error_of(capsys)


# Which records


def test_records_of_any_length_can_be_had(options, tmp_path):
    assert cli.main(["run", *cell(), *options, "--min-length", "0", "--tasks", "multi_news"]) == 0
    manifest = manifest_of(tmp_path)
    assert manifest["tasks"] == {"multi_news": NUM_SAMPLES + NUM_SHORT}
    assert (manifest["sets"], manifest["min_length"]) == ({"multi_news": "multi_news_e"}, 0)
    assert {row["length"] for row in records(tmp_path / "runs" / LABEL)["multi_news"]} == {3000, 5000}


@pytest.fixture
def both(own):
    """The data with a plain set of trec beside LongBench-E's."""
    _, data, given = own
    lines = (data / "trec_e.jsonl").read_text().splitlines()
    write_samples(data / "trec.jsonl", [{**json.loads(line), "_id": f"plain-{n}"} for n, line in enumerate(lines[:3])])
    return given


@pytest.mark.parametrize(
    ("chosen", "tasks", "sets"),
    [
        ([], ["trec"], {"trec": "trec_e"}),
        (["--longbench-set", "extended"], ["trec"], {"trec": "trec_e"}),
        (["--longbench-set", "plain"], ["trec"], {"trec": "trec"}),
        (["--longbench-set", "plain"], ["trec", "trec_e"], {"trec": "trec", "trec_e": "trec_e"}),
    ],
)
def test_plain_and_extended_sets_can_be_had(options, both, tmp_path, chosen, tasks, sets):
    assert cli.main(["run", *cell(), *options, *both, *chosen, "--tasks", *tasks]) == 0
    assert manifest_of(tmp_path)["sets"] == sets
    for task, rows in records(tmp_path / "runs" / LABEL).items():
        assert {row["id"].split("-")[0] for row in rows} == {"plain" if sets[task] == "trec" else "trec"}


def test_another_set_is_another_run(options, both, capsys):
    argv = ["run", *cell(), *options, *both, "--tasks", "trec"]
    assert cli.main(argv) == 0
    capsys.readouterr()
    assert cli.main([*argv, "--longbench-set", "plain"]) == 2
    assert 'sets was {"trec": "trec_e"}, is {"trec": "trec"}' in error_of(capsys)


def test_a_grid_takes_the_same_choices(options, both, capsys):
    grid = ["grid", "--models", "llama", "--phases", "decode", "--strategies", "full", "--dry-run", "--tasks", "trec"]
    counts = {}
    for given in ([], ["--min-length", "0"], ["--longbench-set", "plain"]):
        assert cli.main([*grid, *options, *both, *given]) == 0
        counts[" ".join(given)] = int(capsys.readouterr().out.split()[1])
    assert counts == {"": NUM_SAMPLES, "--min-length 0": NUM_SAMPLES + NUM_SHORT, "--longbench-set plain": 3}


# What the command line shows


@pytest.mark.slow
def test_warnings_are_shown_on_standard_error(own, tmp_path):
    checkpoint, data, given = own
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    lines = (data / "qasper_e.jsonl").read_text().splitlines()
    (data / "qasper_e.jsonl").write_text("\n".join(lines[:5]))
    command = [sys.executable, "-m", "adaskip", "calibrate", "--model", "llama", "--device", "cpu", *given]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, "--output-dir", str(tmp_path / "runs")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert sorted(ended.stderr.splitlines()) == [
        f"{checkpoint} has fewer positions than llama: prompts are cut to 256 tokens instead of 31500",
        "calibration on 5 samples of qasper instead of 20: the data has no more",
    ]
