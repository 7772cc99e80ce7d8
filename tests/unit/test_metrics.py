"""Sets of samples: LongBench's eval.py to the last digit, and what it hides is counted."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from adaskip.benchmarks import metrics
from adaskip.benchmarks.scoring import (
    BUCKETS,
    STANDARD_ROUGE,
    BucketScore,
    MetricError,
    SampleScore,
    sample_score,
    score_buckets,
    score_sample,
    score_samples,
)

QA = "qasper"


def sample(prediction: str, *references: str, length: int = 5000, all_classes=None) -> dict:
    return {"prediction": prediction, "references": list(references), "all_classes": all_classes, "length": length}


def graded(score_in_thousands: int, length: int = 5000) -> dict:
    """A passage_count sample that scores n / 1000: n right numbers of 1000."""
    numbers = ["1"] * score_in_thousands + ["2"] * (1000 - score_in_thousands)
    return sample(" ".join(numbers), "1", length=length)


# One sample


def test_the_best_reference_counts():
    assert score_sample(QA, "big cat", ["dog", "cat", "big"]) == 2 / 3


@given(st.lists(st.text("ab c", max_size=6), min_size=1, max_size=4), st.text("ab c", max_size=6))
def test_more_references_never_lower_the_score(references, prediction):
    scores = [score_sample(QA, prediction, [reference]) for reference in references]
    assert score_sample(QA, prediction, references) == max(scores)


@pytest.mark.parametrize(
    ("task", "scored_lines"),
    [("triviaqa", 1), ("triviaqa_e", 1), ("trec", 1), ("samsum", 1), ("qasper", 2), ("gov_report", 2)],
)
def test_only_some_tasks_score_the_first_line_alone(task, scored_lines):
    classes = ["yes", "no"]
    text = "\n\nyes\nno"
    one = sample_score(task, "yes", ["yes"], classes).score
    assert (sample_score(task, text, ["yes"], classes).score == one) == (scored_lines == 1)


def test_the_first_line_is_cut_at_newlines_only():
    assert score_sample("triviaqa", "a cat\r", ["cat"]) == 1.0
    assert score_sample("triviaqa", " \ncat", ["cat"]) == 0.0, "a line of white space is a line"
    assert score_sample("triviaqa", "cat\u2028dog", ["cat dog"]) == 1.0, "not a newline to LongBench"


def test_a_sample_without_references_or_with_an_unknown_metric_is_refused():
    with pytest.raises(MetricError, match="a sample of qasper has no references"):
        score_sample(QA, "x", [])
    with pytest.raises(MetricError, match="unknown metric 'bleu'; metrics: qa_f1, "):
        sample_score(QA, "x", ["x"], metric="bleu")
    with pytest.raises(ValueError, match=r"unknown LongBench task 'qaspar'\. Did you mean qasper"):
        score_sample("qaspar", "x", ["x"])


# A set


def eval_py(scores: list[float]) -> float:
    """The plain set's score as eval.py adds it up."""
    total_score = 0.0
    for score in scores:
        total_score += score
    return round(100 * total_score / len(scores), 2)


@given(st.lists(st.integers(0, 1000), min_size=1, max_size=40))
def test_the_score_of_a_set_is_eval_pys(grades):
    result = score_samples("passage_count", [graded(grade) for grade in grades])
    assert result.per_sample == tuple(grade / 1000 for grade in grades)
    assert result.score == eval_py([grade / 1000 for grade in grades])
    assert result.n == len(grades)


def test_the_mean_is_a_running_sum_not_a_compensated_one():
    thirds = [sample("big cat sat", "cat"), sample("cat cat", "cat")] * 1000
    result = score_samples(QA, thirds)
    assert result.score == eval_py([0.5, 2 / 3] * 1000) == 58.33


def test_what_the_original_hides_is_counted(monkeypatch):
    def overflows_on_repeats(prediction, reference, all_classes=None):
        if "again again" in prediction:
            raise metrics.ScoredZero("rouge: RecursionError: maximum recursion depth exceeded")
        return metrics.rouge(prediction, reference)

    monkeypatch.setitem(metrics.METRICS, "rouge", overflows_on_repeats)
    records = [sample("a b", "a b"), sample("", "a b"), sample(" \n", "a b"), sample("again again", "a", "b")]
    result = score_samples("gov_report", records)
    assert result.n == 4
    assert result.num_empty == 2
    assert result.errors == {
        "rouge: ValueError: Collections must contain at least 1 sentence.": 1,
        "rouge: RecursionError: maximum recursion depth exceeded": 1,
    }
    assert result.per_sample[1:] == (0.0, 0.0, 0.0)
    assert str(result).startswith("gov_report: 25.00 (n=4, 2 empty, 1 x rouge: ValueError")


def test_a_real_overflow_scores_zero_and_is_counted():
    result = score_samples("gov_report", [sample("again" + " and" * 1200, "again"), sample("again", "again")])
    assert result.per_sample[0] == 0.0
    assert sum(result.errors.values()) == 1
    assert "RecursionError" in next(iter(result.errors))


def test_an_answer_of_code_without_a_line_of_code_is_empty_for_the_tasks_metric_alone():
    assert sample_score("lcc", "# only this", ["x = 1"]) == SampleScore(0.0, is_empty=True)
    assert not sample_score("lcc", "# only this", ["x = 1"], metric="qa_f1").is_empty


@pytest.mark.parametrize("references", [("", "a b"), ("a b", "")])
def test_an_error_on_one_reference_keeps_the_other_references_score_and_is_no_zero(references):
    result = score_samples("gov_report", [sample("a b", *references)])
    assert result.per_sample[0] == pytest.approx(1.0)
    assert result.errors == {}


def test_an_error_on_one_reference_is_counted_where_no_other_scores():
    result = score_samples("gov_report", [sample("a b", "", "c d")])
    assert result.per_sample == (0.0,)
    assert sum(result.errors.values()) == 1


def test_no_samples_is_no_score():
    result = score_samples(QA, [])
    assert result.score is None
    assert result.n == 0
    assert str(result) == "qasper: no samples"


def test_the_standard_rouge_stands_beside_longbenchs():
    records = [sample("The cat. Sat", "the cat sat")]
    ours = score_samples("gov_report", records)
    standard = score_samples("gov_report", records, metric=STANDARD_ROUGE[ours.metric])
    assert (ours.metric, standard.metric) == ("rouge", "rouge_standard")
    assert standard.score == 100.0
    assert ours.score is not None
    assert ours.score < 50


# LongBench-E


def scorer_e(scores: list[float], lengths: list[int]) -> dict[str, float]:
    """The buckets' scores as eval.py computes them; NaN where a bucket is empty."""
    buckets = {"0-4k": [], "4-8k": [], "8k+": []}
    for score, length in zip(scores, lengths, strict=True):
        if length < 4000:
            buckets["0-4k"].append(score)
        elif length < 8000:
            buckets["4-8k"].append(score)
        else:
            buckets["8k+"].append(score)
    return {key: float(round(100 * np.mean(values), 2)) if values else math.nan for key, values in buckets.items()}


@given(st.lists(st.tuples(st.integers(0, 1000), st.integers(1, 12000)), min_size=1, max_size=40))
def test_the_buckets_are_eval_pys(graded_lengths):
    scores, lengths = [grade / 1000 for grade, _ in graded_lengths], [length for _, length in graded_lengths]
    results, expected = score_buckets(scores, lengths), scorer_e(scores, lengths)
    assert list(results) == list(expected) == list(BUCKETS)
    assert sum(result.n for result in results.values()) == len(scores)
    for name, result in results.items():
        if math.isnan(expected[name]):
            assert result == BucketScore(0, None)
        else:
            assert result.score == expected[name]


@pytest.mark.parametrize(
    ("length", "bucket"), [(1, "0-4k"), (3999, "0-4k"), (4000, "4-8k"), (7999, "4-8k"), (8000, "8k+"), (50000, "8k+")]
)
def test_a_buckets_lower_bound_is_in_and_its_upper_bound_out(length, bucket):
    results = score_buckets([1.0], [length])
    assert {name for name, result in results.items() if result.n} == {bucket}


def test_a_plain_set_and_a_bucket_round_differently_as_in_the_original():
    """eval.py rounds a plain set with Python and a bucket with NumPy; 0.005 is 0.01 to one and 0.0 to the other."""
    result = score_samples("passage_count", [graded(1)] + [graded(0)] * 19)
    assert result.score == 0.01
    assert score_buckets(result.per_sample, [5000] * 20)["4-8k"].score == 0.0
