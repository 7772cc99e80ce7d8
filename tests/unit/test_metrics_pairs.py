"""Each metric on one pair: values worked out by hand, and plain transcriptions of LongBench's rules."""

import subprocess
import sys
import threading

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from rouge import Rouge

from adaskip.benchmarks import metrics
from adaskip.benchmarks.metrics import METRICS, MetricError, ScoredZero
from adaskip.common.optional import MissingPackageError

VOCABULARY = ["the", "a", "an", "cat", "Dog", "sat,", "on.", "mat!", "it's", ".", "..", "3"]
words = st.lists(st.sampled_from(VOCABULARY), max_size=12).map(" ".join)


# Question answering


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("Paris", "paris", 1.0),
        ("The Eiffel Tower!", "eiffel tower", 1.0),
        ("the", "a", 0.0),  # both normalise to nothing: no common word is 0, not 1
        ("", "cat", 0.0),
        ("big cat sat", "cat", 0.5),  # precision 1/3, recall 1
        ("cat cat", "cat", 2 / 3),  # words are counted: precision 1/2, recall 1
        ("U.S.A.", "USA", 1.0),  # punctuation goes without leaving a space
        ("well-known", "well known", 0.0),
        ("a.b the.c", "ab thec", 1.0),  # punctuation goes before articles
        ("“cat”", "cat", 0.0),  # only ASCII punctuation goes
    ],
)
def test_qa_f1_by_hand(prediction, reference, expected):
    assert metrics.qa_f1(prediction, reference) == expected


@given(words, words)
def test_qa_f1_equals_a_plain_transcription(prediction, reference):
    def tokens(text):
        kept = [c for c in text.lower() if c not in "!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~"]
        return [word for word in "".join(kept).split() if word not in ("a", "an", "the")]

    left, right = tokens(prediction), tokens(reference)
    unmatched, same = list(right), 0
    for word in left:
        if word in unmatched:
            unmatched.remove(word)
            same += 1
    if same == 0:
        expected = 0
    else:
        precision, recall = 1.0 * same / len(left), 1.0 * same / len(right)
        expected = (2 * precision * recall) / (precision + recall)
    assert metrics.qa_f1(prediction, reference) == expected


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("北京。", "北京", 1.0),
        ("ABC，北京！", "abc 北京", 1.0),  # noqa: RUF001 - lower case; Chinese and ASCII punctuation and spaces go
        ("。！", "北京", 0.0),  # noqa: RUF001
        ("北京北京", "北京", 2 / 3),
    ],
)
def test_qa_f1_zh_by_hand(prediction, reference, expected):
    pytest.importorskip("jieba")
    assert metrics.qa_f1_zh(prediction, reference) == expected


def test_chinese_metrics_name_the_missing_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    with pytest.raises(MissingPackageError, match=r"the package jieba, .*: pip install 'adaskip\[zh\]'"):
        metrics.qa_f1_zh("北京", "北京")


# Rouge


def test_rouge_by_hand():
    """Hypothesis words {a, b, d}, reference words {a, b, c}, common subsequence {a, b}: P = R = 2/3."""
    precision = recall = 2 / 3
    expected = 2.0 * ((precision * recall) / (precision + recall + 1e-8))
    assert metrics.rouge("a b d", "a b c") == expected


def test_rouge_counts_unique_words_keeps_case_and_splits_at_full_stops():
    assert metrics.rouge("a a a a", "a") == metrics.rouge("a", "a")
    assert metrics.rouge("Cat", "cat") == 0.0
    # one sentence: only one of the two swapped words is in the common subsequence; two sentences: both are
    assert metrics.rouge("b a", "a b") < metrics.rouge("b. a", "a. b")


@given(words, words)
def test_rouge_equals_the_package_called_as_longbench_calls_it(prediction, reference):
    try:
        expected = Rouge().get_scores([prediction], [reference], avg=True)["rouge-l"]["f"]
    except Exception:
        with pytest.raises(ScoredZero):
            metrics.rouge(prediction, reference)
    else:
        assert metrics.rouge(prediction, reference) == expected


@pytest.mark.parametrize("empty", ["", ".", "..."])
def test_rouge_fails_on_an_empty_side_and_says_so(empty):
    with pytest.raises(ScoredZero, match="must contain at least 1 sentence"):
        metrics.rouge(empty, "a b")
    with pytest.raises(ScoredZero):
        metrics.rouge("a b", empty)


EVAL_PY = """
from rouge import Rouge

def rouge_score(prediction, ground_truth, **kwargs):
    rouge = Rouge()
    try:
        scores = rouge.get_scores([prediction], [ground_truth], avg=True)
    except:
        return 0.0
    return scores["rouge-l"]["f"]

def scorer(prediction):
    score = 0.
    score = max(score, rouge_score(prediction, "x", all_classes=None))
    return score

if __name__ == "__main__":
    low, high = 100, 2000
    while high - low > 1:
        middle = (low + high) // 2
        if scorer("x" + " y" * middle) == 0.0:
            high = middle
        else:
            low = middle
    print(high)
"""


def test_a_long_repeat_overflows_exactly_where_it_does_in_longbenchs_eval():
    """EVAL_PY calls `rouge` through eval.py's three frames and prints the shortest repeat that scores 0."""
    run = subprocess.run([sys.executable, "-c", EVAL_PY], capture_output=True, text=True, check=True)
    shortest = int(run.stdout)
    assert 900 < shortest < 1100
    assert metrics.rouge("x" + " y" * (shortest - 1), "x") > 0.0
    with pytest.raises(ScoredZero, match="RecursionError"):
        metrics.rouge("x" + " y" * shortest, "x")


def test_the_overflow_does_not_depend_on_how_deep_the_caller_is():
    text = "x" + " y" * 900

    def deep(levels):
        return metrics.rouge(text, "x") if levels == 0 else deep(levels - 1)

    assert deep(300) == deep(0) > 0


def test_rouge_leaves_no_thread_behind():
    before = threading.active_count()
    metrics.rouge("a b", "a b")
    assert threading.active_count() == before


def test_rouge_zh_is_rouge_over_segmented_words():
    jieba = pytest.importorskip("jieba")
    prediction, reference = "我们讨论了明年的预算", "会议讨论了预算"
    expected = Rouge().get_scores([" ".join(jieba.cut(prediction))], [" ".join(jieba.cut(reference))], avg=True)
    assert metrics.rouge_zh(prediction, reference) == expected["rouge-l"]["f"]


def test_the_standard_rouge_is_another_score():
    """Google's: lower-cased, a-z and 0-9 only, counts words. "the cat" against "The cat sat": P = 1, R = 2/3."""
    assert metrics.rouge_standard("the cat", "The cat sat.") == pytest.approx(0.8, abs=1e-12)
    assert metrics.rouge_standard("", "cat") == 0.0
    assert metrics.rouge_standard("a a a a", "a") == pytest.approx(0.4, abs=1e-12)


def test_the_standard_rouge_sees_chinese_words():
    pytest.importorskip("jieba")
    assert metrics.rouge_standard_zh("讨论预算", "讨论预算") == 1.0
    assert metrics.rouge_standard("讨论预算", "讨论预算") == 0.0


# Classification


def classification_as_longbench(prediction, reference, all_classes):
    """LongBench's rule, removal from the walked list included."""
    found = []
    for name in all_classes:
        if name in prediction:
            found.append(name)
    for name in found:
        if name in reference and name != reference:
            found.remove(name)
    if reference in found:
        return 1.0 / len(found)
    return 0.0


@pytest.mark.parametrize(
    ("prediction", "reference", "classes", "expected"),
    [
        ("City", "City", ["City", "State"], 1.0),
        ("City or State", "City", ["City", "State"], 0.5),
        ("nothing", "City", ["City", "State"], 0.0),
        ("state", "State", ["City", "State"], 0.0),  # case counts
        ("Other location", "Other location", ["location", "Other location"], 1.0),  # the shorter one is dropped
        # two droppable ones in a row: the second slides into the gap and is never looked at
        ("Other big location", "Other big location", ["location", "big", "Other big location"], 0.5),
        # with the reference in the gap nothing is missed
        ("a bc", "a bc", ["a", "a bc", "b"], 1.0),
    ],
)
def test_classification_by_hand(prediction, reference, classes, expected):
    assert metrics.classification(prediction, reference, classes) == expected
    assert classification_as_longbench(prediction, reference, classes) == expected


@settings(max_examples=500)
@given(
    st.lists(st.text("ab ", min_size=1, max_size=4), min_size=1, max_size=8),
    st.text("ab ", max_size=12),
    st.integers(0, 7),
)
def test_classification_equals_the_mutating_walk(classes, prediction, which):
    reference = classes[which % len(classes)]
    assert metrics.classification(prediction, reference, classes) == classification_as_longbench(
        prediction, reference, classes
    )


def test_classification_without_classes_is_refused():
    with pytest.raises(MetricError, match="needs all_classes"):
        metrics.classification("City", "City", None)


# Retrieval, counting


@pytest.mark.parametrize(
    ("prediction", "expected"),
    [
        ("Paragraph 3", 1.0),
        ("3", 1.0),
        ("3 or 4", 0.5),
        ("13", 0.0),
        ("", 0.0),
        ("none", 0.0),
        ("03", 0.0),
        ("3 3 1", 2 / 3),
    ],
)
def test_retrieval_by_hand(prediction, expected):
    assert metrics.retrieval(prediction, "Paragraph 3") == expected
    assert metrics.retrieval_zh(prediction, "段落3") == expected
    assert metrics.count(prediction, "3") == expected


def test_retrieval_refuses_a_reference_without_a_paragraph():
    with pytest.raises(MetricError, match="names no paragraph"):
        metrics.retrieval("3", "3")


# Code


@pytest.mark.parametrize(
    ("prediction", "reference", "expected"),
    [
        ("x = 1", "x = 1", 1.0),
        ("\n\nx = 1\nmore", "x = 1", 1.0),
        ("# note\n```python\n// c\nx = 1", "x = 1", 1.0),  # the first line without ` # //
        ("# only a comment", "x = 1", 0.0),
        ("", "", 1.0),
        ("abcd", "bcde", 0.75),  # 2 * 3 common / 8
        ("ab", "abc", 0.8),
        ("x", "abcdefg", 0.0),
    ],
)
def test_code_sim_by_hand(prediction, reference, expected):
    assert metrics.code_sim(prediction, reference) == expected


code = st.text("abc =().\n", max_size=30)


@settings(max_examples=300)
@given(code, code.filter(lambda text: "\n" not in text))
@example("a" * 150 + "b" * 150, "b" * 150 + "a" * 150)  # over 200 characters difflib calls frequent ones junk
def test_code_sim_equals_fuzzywuzzy(prediction, reference):
    fuzz = pytest.importorskip("fuzzywuzzy.fuzz", reason="fuzzywuzzy is the reference for code similarity")
    assume(fuzz.SequenceMatcher.__module__ == "difflib")  # python-Levenshtein gives other digits; LongBench has none
    line = prediction.lstrip("\n").split("\n")[0]
    assert metrics.code_sim(prediction, reference) == fuzz.ratio(line, reference) / 100


# All


@pytest.mark.parametrize("name", [name for name in METRICS if not name.endswith("_zh")])
@given(words, words)
def test_every_metric_stays_between_0_and_1(name, prediction, reference):
    if name == "retrieval":
        reference = f"Paragraph 3 {reference}"
    try:
        score = METRICS[name](prediction, reference, ["cat", "Dog", reference])
    except ScoredZero:
        score = 0.0
    assert 0.0 <= score <= 1.0
