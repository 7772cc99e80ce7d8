"""Fidelity and floors: what an answer is worth against the full model's own, and what no answer at all is worth."""

from __future__ import annotations

import json

import pytest

from adaskip import testbed
from adaskip.benchmarks import scoring
from adaskip.benchmarks.longbench import LongBench
from adaskip.runs.cells import Cell
from adaskip.studies.tables.floors import EMPTY, FIRST_SENTENCE, MAJORITY, first_sentence, floors
from adaskip.studies.tables.results import load_results
from adaskip.studies.tables.runs import ResultsError, load_run
from tests.saved_runs import write_run

CLASSES = ["Food", "City", "Other location", "Date"]
FULL = Cell("llama", "prefill", "full", 0)


def of(task: str, ours: str, full: str) -> float:
    return LongBench().fidelity(task, ours, full, all_classes=CLASSES if task == "trec" else None)


@pytest.mark.parametrize("task", ["multifieldqa_en", "triviaqa", "trec", "gov_report", "samsum"])
@pytest.mark.parametrize("answer", ["", " \n", "the", "no class at all", "Food", "so " * 600])
def test_an_answer_equal_to_the_full_models_is_worth_all(task, answer):
    """Also where the metric fails on it (`rouge` on nothing, on long repeats) or finds no words in it."""
    assert of(task, answer, answer) == 1.0


@pytest.mark.parametrize("task", ["passage_retrieval_en", "passage_retrieval_zh", "passage_count"])
def test_an_answer_of_the_full_model_that_cannot_be_a_reference_is_met_by_the_same_answer_alone(task):
    assert of(task, "Paragraph 3", "It is the fifth one") == 0.0
    assert of(task, "It is the fifth one", "It is the fifth one") == 1.0


@pytest.mark.parametrize("task", ["multifieldqa_en", "trec", "gov_report"])
def test_an_empty_answer_is_worth_nothing_unless_the_full_models_is_empty_too(task):
    assert of(task, "", "Food in Oslo") == of(task, "Food in Oslo", " ") == 0.0


@pytest.mark.parametrize("task", ["multifieldqa_en", "triviaqa", "gov_report"])
def test_other_answers_are_scored_by_the_tasks_metric(task):
    ours, full = "Ada sells red ships", "Ada buys red ships"
    assert 0 < of(task, ours, full) == scoring.score_sample(task, ours, [full]) < 1


def test_only_the_line_that_the_metric_reads_counts_in_both_answers():
    assert of("triviaqa", "Oslo\nPassage: one", "\nOslo\nPassage: another") == 1.0
    assert of("triviaqa", "Oslo\nPassage: one", "Bergen\nPassage: one") == 0.0
    assert of("multifieldqa_en", "Oslo\none", "Oslo\nanother") == 0.5


@pytest.mark.parametrize("task", ["lcc", "repobench-p"])
@pytest.mark.parametrize(
    ("ours", "full", "expected"),
    [
        ("return x\nfoo = 1", "return x\nbar = 2", 1.0),
        ("\n\nreturn x\nfoo = 1", "# the result\nreturn x", 1.0),
        ("```python\nreturn x\n```", "return x", 1.0),
        ("return x", "return y\nreturn x", 0.88),
        ("# a comment", "// another", 1.0),  # no code in either
        ("# a comment", "return x", 0.0),
        (" \nfoo = 1", "\t\nbar = 2", 1.0),  # a line of white space is the line that the metric reads
        (" \nreturn x", "return x", 0.0),
    ],
)
def test_of_code_the_line_that_the_metric_reads_counts_in_both_answers(task, ours, full, expected):
    assert of(task, ours, full) == of(task, full, ours) == expected


@pytest.mark.parametrize(
    ("ours", "full", "expected"),
    [
        ("Type: Food", "Food", 1.0),  # wordings differ, classes do not
        ("Food", "Type: Food", 1.0),  # the metric itself takes a bare class only
        ("Food or City", "Food", 0.5),  # as the metric has it
        ("City", "Food", 0.0),
        ("City or Food", "Food, then City", 1.0),
        ("Food", "Food, then City", 0.5),
        ("nothing known", "I do not know", 0.0),
        ("nothing known", "Food", 0.0),
    ],
)
def test_of_classes_those_that_answers_name_are_compared(ours, full, expected):
    assert of("trec", ours, full) == expected
    if full in CLASSES:
        assert scoring.score_sample("trec", ours, [full], CLASSES) == expected


def test_floors_are_what_trivial_answers_score(tmp_path):
    run = load_run(write_run(tmp_path, FULL, 1.0, num_samples=9))
    classes = [record["references"][0] for record in run.tasks["trec"].records]
    found = floors(run, "trec")
    assert found[EMPTY] == 0.0
    assert found[MAJORITY] == pytest.approx(max(classes.count(name) for name in classes) / 9)
    assert set(floors(run, "triviaqa")) == {EMPTY, FIRST_SENTENCE}


def with_records(folder, task, records):
    """A run's task on real records, answered right."""
    answered = [
        {"id": r["_id"], "index": i, "prediction": r["answers"][0], "references": r["answers"], **NOTHING_SKIPPED}
        for i, r in enumerate(records)
    ]
    (folder / f"{task}.jsonl").write_text("".join(json.dumps(each) + "\n" for each in answered))
    return load_run(folder)


NOTHING_SKIPPED = {"all_classes": None, "length": 9, "new_tokens": 3, "online_ffns": []}


def test_the_first_sentence_of_the_testbeds_contexts_is_known(tmp_path):
    records = testbed.records("multi_news", limit=4)
    folder = write_run(tmp_path, Cell("llama", "e2e", "full", 0), 1.0, num_samples=4)
    found = floors(with_records(folder, "multi_news", records), "multi_news")
    sentences = [first_sentence(record["context"]) for record in records]
    scores = [scoring.score_sample("multi_news", s, r["answers"]) for s, r in zip(sentences, records, strict=True)]
    assert found[FIRST_SENTENCE] == pytest.approx(sum(scores) / 4) != 0
    assert floors(load_run(folder), "gov_report")[FIRST_SENTENCE] is None, "ids that the testbed has not made"


def test_contexts_of_longbench_come_from_its_data(tmp_path):
    folder = write_run(tmp_path / "runs", Cell("llama", "e2e", "full", 0), 1.0, num_samples=2)
    manifest = json.loads((folder / "manifest.json").read_text()) | {"testbed": False}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    fields = {"input": "", "length": 5, "dataset": "multi_news", "language": "en", "all_classes": None}
    context = "Passage 1:\nAda sells red ships to Oslo. She is rich."
    records = [{**fields, "_id": name, "context": context, "answers": ["Ada sells red ships"]} for name in ("a", "b")]
    run = with_records(folder, "multi_news", records)
    assert FIRST_SENTENCE not in floors(run, "multi_news")
    (tmp_path / "multi_news.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    expected = scoring.score_sample("multi_news", "Ada sells red ships to Oslo.", ["Ada sells red ships"])
    assert floors(run, "multi_news", str(tmp_path))[FIRST_SENTENCE] == pytest.approx(expected)
    run = with_records(folder, "multi_news", [{**records[0], "_id": "c"}])
    with pytest.raises(ResultsError, match=r"has no record c of multi_news, which llama-FULL-E2E/0-sublayers answered"):
        floors(run, "multi_news", str(tmp_path))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Passage 1:\nAda sells ships to Oslo. More.", "Ada sells ships to Oslo."),
        ("  Is it so in all of Oslo? Yes.", "Is it so in all of Oslo?"),
        ("A title\nfollowed by a line of words\nmore", "followed by a line of words"),
        (" too short ", "too short"),
    ],
)
def test_the_first_sentence_is_the_first_of_at_least_five_words(text, expected):
    assert first_sentence(text) == expected


def test_a_full_model_whose_interval_reaches_a_trivial_answers_score_is_at_its_floor(tmp_path):
    write_run(tmp_path, FULL, {"multifieldqa_en": 0.9, "triviaqa": 0.0, "trec": 0.2}, num_samples=20)
    cells = load_results(tmp_path).cells.query("model == 'llama' and phase == 'prefill' and strategy == 'full'")
    assert dict(zip(cells["task"], cells["at_floor"], strict=True)) == {
        "multifieldqa_en": False,
        "triviaqa": True,
        "trec": True,
    }
