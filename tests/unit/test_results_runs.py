"""Reading saved runs: what is whole is used, what is torn, broken or missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaskip.results.runs import ResultsError, find_run, load_run, load_runs
from adaskip.runs.cells import Cell
from tests.saved_runs import write_run

EE = Cell("llama", "prefill", "early_exit", 4)
ADA = Cell("llama", "e2e", "adaskip", 6)


def trec_of(folder: Path):
    return load_run(folder).tasks["trec"]


def rewrite(folder: Path, change) -> None:
    path = folder / "trec.jsonl"
    path.write_text(change(path.read_text()), encoding="utf-8")


def test_a_finished_run_is_complete(tmp_path):
    run = load_run(write_run(tmp_path, EE, 0.5))
    assert (run.cell, run.num_layers, run.fraction) == (EE, 16, 0.125)
    assert set(run.tasks) == {"multifieldqa_en", "triviaqa", "trec"}
    for task in run.tasks.values():
        assert task.complete
        assert [record["index"] for record in task.records] == list(range(12))


def test_records_are_ordered_by_index_whatever_their_order_in_the_file(tmp_path):
    folder = write_run(tmp_path, EE, 0.5)
    rewrite(folder, lambda text: "".join(reversed(text.splitlines(keepends=True))))
    assert [record["index"] for record in trec_of(folder).records] == list(range(12))


@pytest.mark.parametrize(
    ("change", "kept", "problem"),
    [
        (lambda text: text[:-20], 11, "trec.jsonl, line 12 is torn"),
        (lambda text: text.replace('{"id": "trec-3"', '{"id" "trec-3"'), 11, "trec.jsonl, line 4 is not JSON"),
        (lambda text: text + "[1, 2]\n", 12, "trec.jsonl, line 13 is not a record"),
        (lambda text: text + "\n", 12, "trec.jsonl, line 13 is not JSON"),
        (lambda text: text.replace('"references"', '"answers"', 1), 11, "trec.jsonl, line 1 lacks references"),
        (lambda text: text + text.splitlines(keepends=True)[0], 12, "trec.jsonl, line 13 repeats sample 'trec-0'"),
    ],
    ids=["torn", "not JSON", "no record", "blank", "lacks a field", "duplicate"],
)
def test_a_damaged_line_is_named_and_left_out(tmp_path, change, kept, problem):
    folder = write_run(tmp_path, EE, 0.5)
    rewrite(folder, change)
    task = trec_of(folder)
    assert len(task.records) == kept
    assert len(task.problems) == 1
    assert task.problems[0].startswith(problem)
    assert not task.complete


def test_bytes_that_are_no_text_are_named(tmp_path):
    folder = write_run(tmp_path, EE, 0.5)
    with (folder / "trec.jsonl").open("ab") as handle:
        handle.write(b'"\xff\xfe"\n')
    assert trec_of(folder).problems == ("trec.jsonl, line 13 is not JSON",)


def test_fewer_records_than_the_manifest_says_are_not_complete(tmp_path):
    task = trec_of(write_run(tmp_path, EE, 0.5, num_samples=3, expected=5))
    assert (len(task.records), task.expected, task.problems, task.complete) == (3, 5, (), False)


def test_an_empty_file_holds_no_records(tmp_path):
    folder = write_run(tmp_path, EE, 0.5)
    rewrite(folder, lambda text: "")
    task = trec_of(folder)
    assert (task.records, task.complete) == ((), False)


def test_a_missing_file_is_named(tmp_path):
    folder = write_run(tmp_path, EE, 0.5)
    (folder / "trec.jsonl").unlink()
    assert trec_of(folder).problems == ("trec.jsonl is missing",)


@pytest.mark.parametrize("text", ["{", "[]", '{"tasks": {}}'])
def test_a_broken_manifest_is_an_error_that_says_what_to_do(tmp_path, text):
    folder = write_run(tmp_path, EE, 0.5)
    (folder / "manifest.json").write_text(text)
    with pytest.raises(ResultsError, match=r"manifest\.json .* and run it again"):
        load_run(folder)


def test_every_run_is_found_and_a_folder_without_manifest_passed_over(tmp_path):
    write_run(tmp_path, ADA, 0.5)
    write_run(tmp_path, EE, 0.5)
    write_run(tmp_path, Cell("llama", "prefill", "early_exit", 12), 0.5)
    (tmp_path / "llama-US-PREFILL" / "4-sublayers").mkdir(parents=True)
    assert [run.cell.label for run in load_runs(tmp_path)] == [
        "llama-ADA-E2E/6-sublayers",
        "llama-EE-PREFILL/4-sublayers",
        "llama-EE-PREFILL/12-sublayers",
    ]


@pytest.mark.parametrize("name", ["absent", "."])
def test_no_runs_at_all_is_an_error(tmp_path, name):
    with pytest.raises(ResultsError, match="no results in"):
        load_runs(tmp_path / name)


@pytest.mark.parametrize("name", ["llama-EE-PREFILL", "llama-ee-prefill"])
def test_a_run_is_found_by_the_artifacts_name(tmp_path, name):
    for sublayers in (8, 4):
        write_run(tmp_path, Cell("llama", "prefill", "early_exit", sublayers), 0.5)
    assert [run.cell.sublayers for run in find_run(name, tmp_path)] == [4, 8]


def test_an_absent_run_is_an_error_that_lists_the_present_ones(tmp_path):
    write_run(tmp_path, EE, 0.5)
    with pytest.raises(ResultsError, match=r"no run llama-SD-PREFILL in .* Runs there: llama-EE-PREFILL"):
        find_run("llama-SD-PREFILL", tmp_path)


def test_a_run_of_the_testbed_only_is_pointed_to(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(Path("results/testbed/runs"), EE, 0.5)
    with pytest.raises(ResultsError, match="there is one in results/testbed/runs: add --testbed"):
        find_run("llama-EE-PREFILL", Path("results/runs"))


def test_a_name_of_another_form_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="no run name"):
        find_run("llama", tmp_path)


def test_the_fake_records_have_the_fields_that_are_required(tmp_path):
    line = (write_run(tmp_path, EE, 0.5) / "trec.jsonl").read_text().splitlines()[0]
    assert {"plan", "online_ffns", "ttft_s", "tpot_ms", "kv_bytes"} <= set(json.loads(line))
