"""Reading saved runs: what is whole is used, what is torn, broken or missing is named."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adaskip.runs.cells import Cell
from adaskip.runs.folder import RunFolder
from adaskip.studies.tables.runs import ResultsError, find_run, load_run, load_runs
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


def test_an_absent_run_is_an_error_that_lists_the_present_ones(tmp_path, away):
    write_run(tmp_path, EE, 0.5)
    with pytest.raises(ResultsError, match=r"no run llama-SD-PREFILL in .* Runs there: llama-EE-PREFILL"):
        find_run("llama-SD-PREFILL", tmp_path)


def test_a_run_of_the_testbed_only_is_pointed_to(away):
    write_run(Path("results/testbed/runs"), EE, 0.5)
    with pytest.raises(ResultsError, match="there is one in results/testbed/runs: give --benchmark testbed"):
        find_run("llama-EE-PREFILL", Path("results/runs"))


def test_a_name_of_another_form_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="not a run name"):
        find_run("llama", tmp_path)


def test_the_fake_records_have_the_fields_that_are_required(tmp_path):
    record = trec_of(write_run(tmp_path, EE, 0.5)).records[0]
    assert {"plan", "online_ffns", "ttft_s", "tpot_ms", "kv_bytes"} <= set(record)


@pytest.mark.parametrize("where", ["times", "records", "parts"])
def test_times_join_their_records_wherever_they_are_saved(tmp_path, where):
    folder = write_run(tmp_path, EE, 0.5)
    expected, place = trec_of(folder), RunFolder(folder)
    if where != "times":
        lines = "".join(json.dumps(record) + "\n" for record in expected.records)
        place.times_path("trec").unlink()
        place.records_path("trec").unlink()
        path = place.path / ("trec.jsonl" if where == "records" else "parts/trec.0-here-7.jsonl")
        path.parent.mkdir(exist_ok=True)
        path.write_text(lines)
    task = trec_of(folder)
    assert task.complete
    assert task.records == expected.records
    assert len({record["ttft_s"] for record in task.records}) == 12


def test_records_of_an_unfinished_run_are_read_from_all_its_files(tmp_path):
    """Some merged, some in two parts, one of them merged already: a kill came before its part was removed."""
    folder = write_run(tmp_path, EE, 0.5)
    whole, place = trec_of(folder), RunFolder(folder)
    rewrite(folder, lambda text: "".join(text.splitlines(keepends=True)[:4]))
    place.append("trec", whole.records[6:8], rank=0)
    place.append("trec", [whole.records[3], whole.records[9]], rank=1)
    task = trec_of(folder)
    assert [record["index"] for record in task.records] == [0, 1, 2, 3, 6, 7, 9]
    assert task.problems == ()
    assert not task.complete
    assert task.answers_sha256 != whole.answers_sha256


def test_a_damaged_line_of_times_is_named_and_costs_no_record(tmp_path):
    folder = write_run(tmp_path, EE, 0.5)
    path = RunFolder(folder).times_path("trec")
    path.write_text(path.read_text().replace('{"id": "trec-3"', '{"id" "trec-3"'))
    task = trec_of(folder)
    assert len(task.records) == 12
    assert task.problems == ("times/trec.jsonl, line 4 is not JSON",)
