"""Scoring a run once: the numbers are the metrics', kept by sample, and made anew only when something changed."""

from __future__ import annotations

import json
from importlib.metadata import PackageNotFoundError, version

import pytest

from adaskip.benchmarks import longbench, scoring
from adaskip.benchmarks.longbench import LongBench, LongBenchTasks
from adaskip.benchmarks.protocol import Benchmark
from adaskip.runs.cells import Cell
from adaskip.studies.tables import scores
from adaskip.studies.tables.runs import load_run
from adaskip.studies.tables.scores import score_run
from tests.saved_runs import write_run

EE = Cell("llama", "prefill", "early_exit", 4)
ADA = Cell("llama", "e2e", "adaskip", 6)


def test_scores_are_the_metrics(tmp_path):
    run = load_run(write_run(tmp_path, ADA, 0.6))
    for task, scored in score_run(run).tasks.items():
        expected = scoring.score_samples(task, run.tasks[task].records)
        assert scored.main.as_printed == expected.score
        assert tuple(scored.main.by_id.values()) == expected.per_sample
        assert scored.main.mean is not None
        assert 100 * scored.main.mean.value == pytest.approx(expected.score, abs=0.005)


def test_rouge_score_stands_beside_rouge_and_nowhere_else(tmp_path):
    summaries = score_run(load_run(write_run(tmp_path, ADA, 0.6))).tasks
    answers = score_run(load_run(write_run(tmp_path, EE, 0.6))).tasks
    assert all(task.rouge_score is not None and task.rouge_score.by_id for task in summaries.values())
    assert all(task.rouge_score is None for task in answers.values())


def as_extended(folder, task, lengths):
    """Make a run's task LongBench-E's, with records of these lengths."""
    path = folder / f"{task}.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lines = [{**record, "length": length} for record, length in zip(records, lengths, strict=True)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    manifest = json.loads((folder / "manifest.json").read_text())
    sets = {**dict.fromkeys(manifest["tasks"], "plain"), task: f"{task}_e"}
    (folder / "manifest.json").write_text(json.dumps({**manifest, "sets": sets}))
    return folder


def test_a_longbench_e_set_is_scored_by_buckets_and_others_are_not(tmp_path):
    lengths = [1000] * 3 + [3999] * 2 + [9000] * 7
    folder = as_extended(write_run(tmp_path, ADA, 0.6), "gov_report", lengths)
    scored = score_run(load_run(folder)).tasks
    per_sample = list(scored["gov_report"].main.by_id.values())
    assert scored["gov_report"].buckets == scoring.score_buckets(per_sample, lengths)
    assert scored["gov_report"].buckets["4-8k"] == scoring.BucketScore(0, None)
    assert scored["multi_news"].buckets is None
    assert score_run(load_run(folder)).tasks == scored, "read from scores.json"
    assert "NaN" not in (folder / "scores.json").read_text()


def test_a_record_without_a_length_belongs_to_no_bucket(tmp_path):
    folder = as_extended(write_run(tmp_path, EE, 0.6), "trec", [5000] * 12)
    text = (folder / "trec.jsonl").read_text().replace('"length"', '"words"')
    (folder / "trec.jsonl").write_text(text)
    with pytest.raises(scoring.MetricError, match="a record of trec has no 'length'"):
        score_run(load_run(folder))


def test_saved_scores_are_read_and_not_made_again(tmp_path, monkeypatch):
    folder = write_run(tmp_path, ADA, 0.6)
    first = score_run(load_run(folder))
    written = (folder / "scores.json").stat()
    monkeypatch.setattr(scores, "score_task", None)
    assert score_run(load_run(folder)) == first
    assert (folder / "scores.json").stat() == written


def test_fresh_scores_are_made_again(tmp_path, monkeypatch):
    folder = write_run(tmp_path, ADA, 0.6)
    score_run(load_run(folder))
    monkeypatch.setattr(scores, "score_task", None)
    with pytest.raises(TypeError):
        score_run(load_run(folder), fresh=True)


def test_changed_records_are_scored_again(tmp_path):
    folder = write_run(tmp_path, EE, 1.0)
    before = score_run(load_run(folder)).tasks["trec"].main.as_printed
    path = folder / "trec.jsonl"
    lines = [{**json.loads(line), "prediction": ""} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    after = score_run(load_run(folder)).tasks["trec"].main
    assert (before, after.as_printed, after.num_empty) == (100, 0, 12)


def test_changed_metrics_score_again(tmp_path, monkeypatch):
    folder = write_run(tmp_path, EE, 1.0)
    score_run(load_run(folder))
    monkeypatch.setattr(scoring, "fingerprint", lambda: "other code")
    monkeypatch.setattr(scores, "score_task", None)
    with pytest.raises(TypeError):
        score_run(load_run(folder))


@pytest.mark.parametrize("cls", [LongBenchTasks, Benchmark])
@pytest.mark.parametrize("name", ["fidelity", "evaluate"])
def test_a_changed_fidelity_or_evaluation_is_another_version_of_the_scores(cls, name, monkeypatch):
    longbench._scoring_code.cache_clear()
    before = LongBench().score_version()
    monkeypatch.setattr(cls, name, lambda self, *given, **kept: 0.5)
    longbench._scoring_code.cache_clear()
    assert LongBench().score_version() != before
    longbench._scoring_code.cache_clear()


def test_another_jieba_or_none_is_another_version_of_the_scores(monkeypatch):
    def without(package):
        if package == "jieba":
            raise PackageNotFoundError(package)
        return version(package)

    before = scoring.fingerprint()
    assert f"jieba {version('jieba')}" in before
    monkeypatch.setattr(scoring, "version", without)
    assert scoring.fingerprint.__wrapped__() == before.replace(f"jieba {version('jieba')}", "jieba none")


def test_torn_scores_are_made_again(tmp_path):
    folder = write_run(tmp_path, EE, 1.0)
    whole = score_run(load_run(folder))
    text = (folder / "scores.json").read_text()
    (folder / "scores.json").write_text(text[: len(text) // 2])
    assert score_run(load_run(folder)) == whole
    assert (folder / "scores.json").read_text() == text


def test_an_empty_file_has_no_score_and_never_nan(tmp_path):
    folder = write_run(tmp_path, EE, 1.0)
    (folder / "trec.jsonl").write_text("")
    scored = score_run(load_run(folder)).tasks["trec"]
    assert (scored.main.mean, scored.main.as_printed, scored.main.by_id) == (None, None, {})
    assert "NaN" not in (folder / "scores.json").read_text()


def test_samples_that_a_metric_fails_on_are_counted(tmp_path):
    folder = write_run(tmp_path, ADA, 1.0, num_samples=4)
    path = folder / "gov_report.jsonl"
    lines = [{**json.loads(line), "prediction": ""} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    main = score_run(load_run(folder)).tasks["gov_report"].main
    assert sum(main.errors.values()) == 4
    assert main.as_printed == 0
