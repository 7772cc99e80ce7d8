"""Protocol small_context: whole prompts of at most so many tokens are scored, longer ones are searched on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from adaskip import cli
from adaskip.benchmarks.longbench import load_both_sets
from adaskip.benchmarks.prompts import count_tokens
from adaskip.models.loading import load_tokenizer
from adaskip.runs import config
from adaskip.runs.calibrate_config import CalibrateConfig
from adaskip.runs.cells import find_setup
from adaskip.runs.checks import check
from adaskip.runs.config import GridConfig, RunConfig
from adaskip.runs.job import find_cells, resolve
from adaskip.runs.profiles import calibrate_to
from adaskip.runs.records import prompt_ids
from tests.smollm2 import ONE_PROCESS
from tests.tiny_runs import NUM_SAMPLES, NUM_SHORT, cell, error_of, write_samples

LIMIT = 40
ALL = NUM_SAMPLES + NUM_SHORT


@pytest.fixture
def given(checkpoint, data_dir, tmp_path):
    """A configuration of the tiny checkpoint under the protocol."""
    return {
        **{"model": "llama", "protocol": "small_context", "max_prompt_tokens": LIMIT, "checkpoint": str(checkpoint)},
        **{"data_dir": str(data_dir), "output_dir": str(tmp_path / "runs"), "device": "cpu", "tasks": ("triviaqa",)},
    }


def tokens(job, sample) -> int:
    prompt = job.records.benchmark.prompt("triviaqa", sample)
    return count_tokens(prompt, load_tokenizer(job.loading.source.path))


def test_whole_prompts_are_scored_and_longer_ones_searched_on(given):
    job = resolve(RunConfig(**given, strategy="calibrated", phase="prefill"))
    (part,) = job.parts
    searched = [sample for _, sample in job.records.unscored(("triviaqa",), ALL - len(part.samples))]
    assert {tokens(job, sample) <= LIMIT for sample in part.samples} == {True}
    assert {tokens(job, sample) > LIMIT for sample in searched} == {True}
    assert 0 < len(part.samples) < ALL
    assert {sample["_id"] for sample in (*part.samples, *searched)} == {
        *(f"triviaqa-{number}" for number in range(NUM_SAMPLES)),
        *(f"triviaqa-short-{number}" for number in range(NUM_SHORT)),
    }
    assert {sample["length"] for sample in part.samples} == {3000, 5000}, "words do not matter"


def test_the_searchs_prompts_are_cut_and_the_scored_ones_are_not(given, monkeypatch):
    seen = {}

    def select(model, prompts, phase, **options):
        seen["searched"] = [len(prompt) for prompt in prompts]
        raise KeyboardInterrupt

    monkeypatch.setattr("adaskip.runs.profiles.select", select)
    monkeypatch.setattr(config, "find_setup", lambda *names: replace(find_setup(*names), search_prompt_tokens=20))
    with pytest.raises(KeyboardInterrupt):
        calibrate_to(CalibrateConfig(**given, select="prefill", samples=3))
    assert len(seen["searched"]) == 3
    assert max(seen["searched"]) <= 20 < LIMIT, "each was longer than the limit"
    job = resolve(RunConfig(**given, strategy="full", phase="prefill"))
    (part,) = job.parts
    prompts = prompt_ids(job.records.benchmark, "triviaqa", part.samples, job.loading.load())
    assert [len(prompt) for prompt in prompts] == [tokens(job, sample) for sample in part.samples]


def test_calibration_prompts_of_any_length_in_words_are_cut_to_the_limit(given):
    job = resolve(RunConfig(**given, strategy="adaskip", phase="prefill"))
    assert job.calibration is not None
    assert len(job.calibration.samples) == 20
    prompts = prompt_ids(job.records.benchmark, "qasper", job.calibration.samples, job.loading.load())
    assert max(map(len, prompts)) <= LIMIT < max(tokens(job, sample) for sample in job.calibration.samples)


@pytest.mark.parametrize(
    ("limit", "strategy", "says"),
    [
        (2, "full", "longbench has no record of triviaqa whose prompt has at most 2 tokens; the shortest has"),
        (
            9999,
            "calibrated",
            "searches on 10 samples of triviaqa that no run is scored on, with prompts of over 9999 to",
        ),
    ],
)
def test_too_few_records_are_refused_before_anything_is_written(given, tmp_path, limit, strategy, says):
    given["max_prompt_tokens"] = limit
    job = resolve(RunConfig(**given, strategy=strategy, phase="prefill"))
    with pytest.raises(ValueError, match=says):
        check(job)
    assert not (tmp_path / "runs").exists()


def test_a_model_has_its_own_protocol_which_a_flag_overrides():
    def setup(model, **options):
        return RunConfig(model=model, strategy="full", phase="decode", **options).setup

    assert [setup(model).name for model in ("smollm2", "llama")] == ["small_context", "paper"]
    assert setup("smollm2", protocol="paper").phases["decode"].max_new_tokens == 512
    assert setup("llama", protocol="small_context").phases["decode"].max_new_tokens == 128
    with pytest.raises(ValueError, match=r"unknown --protocol of benchmark longbench 'papr'\. Did you mean 'paper'"):
        setup("llama", protocol="papr")


@ONE_PROCESS
def test_models_of_one_grid_keep_their_own_protocols(given):
    options = {**given, "protocol": None, "checkpoint": None, "max_prompt_tokens": None}
    del options["model"]
    cells = find_cells(GridConfig(**options, models=("llama", "smollm2"), strategies=("full",), phases=("decode",)))
    assert [(cell.model, cell.setup.name) for cell in cells] == [("llama", "paper"), ("smollm2", "small_context")]


def test_another_protocol_is_another_run(given, capsys):
    argv = ["run", *cell("full", "prefill", None), "--tasks", "triviaqa", "--dtype", "float32", "--device", "cpu"]
    for name in ("checkpoint", "data_dir", "output_dir"):
        argv += [f"--{name.replace('_', '-')}", given[name]]
    assert cli.main([*argv, "--protocol", "small_context", "--max-new-tokens", "2"]) == 0
    capsys.readouterr()
    assert cli.main([*argv, "--max-new-tokens", "2"]) == 2
    assert 'protocol was "small_context", is "paper"' in error_of(capsys)


def test_both_sets_have_each_record_once(data_dir, tmp_path):
    extended = [json.loads(line) for line in (data_dir / "triviaqa_e.jsonl").read_text().splitlines()]
    same_id, same_text = {**extended[0], "input": "other"}, {**extended[1], "_id": "plain-1"}
    new = {**extended[2], "_id": "plain-2", "input": "other"}
    write_samples(tmp_path / "triviaqa_e.jsonl", extended)
    write_samples(tmp_path / "triviaqa.jsonl", [same_id, same_text, new])
    ids = [record["_id"] for record in extended]
    assert load_both_sets("triviaqa", tmp_path, None)["_id"][:] == [*ids, "plain-2"]
    assert load_both_sets("triviaqa_e", tmp_path, None)["_id"][:] == ids
    assert load_both_sets("triviaqa", tmp_path, 4000)["_id"][:] == [*ids[:NUM_SAMPLES], "plain-2"]
    (tmp_path / "triviaqa_e.jsonl").unlink()
    assert load_both_sets("triviaqa", tmp_path, None, limit=2)["_id"][:] == [ids[0], "plain-1"]
