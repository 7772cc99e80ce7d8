"""LongBench's metrics on one prediction and one reference, equal to its `metrics.py` to the last digit.

Every metric maps (prediction, reference, all classes) to a number in [0, 1]. Where the original swallows an exception
and scores 0, the metric raises `ScoredZero`, so that `adaskip.benchmarks.scoring` can score 0 and count it.
"""

from __future__ import annotations

import difflib
import logging
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from threading import Thread
from typing import Any

from adaskip.common.optional import optional_import

Metric = Callable[[str, str, Sequence[str] | None], float]

_PUNCTUATION = set(string.punctuation)
_PUNCTUATION_ZH = _PUNCTUATION | set(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞〟〰〾〿–—‘’‛“”„‟…‧﹏."  # noqa: RUF001
)


class MetricError(ValueError):
    """A metric cannot be computed on what it was given."""


class ScoredZero(Exception):
    """The original metric fails on this pair and scores it 0."""


# Question answering


def qa_f1(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """F1 of the bags of words, lower-cased, without punctuation and English articles."""
    return _bag_f1(_words(prediction), _words(reference))


def qa_f1_zh(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """F1 of the bags of jieba's words, lower-cased, without punctuation and spaces."""
    return _bag_f1(_words_zh(prediction), _words_zh(reference))


def _words(text: str) -> list[str]:
    bare = "".join(character for character in text.lower() if character not in _PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", bare).split()


def _words_zh(text: str) -> list[str]:
    words = ("".join(c for c in word.lower() if c not in _PUNCTUATION_ZH) for word in _segment_zh(text))
    return [bare for word in words if (bare := "".join(word.split()))]


def _bag_f1(prediction: list[str], reference: list[str]) -> float:
    num_common = (Counter(prediction) & Counter(reference)).total()
    if num_common == 0:
        return 0.0
    precision, recall = num_common / len(prediction), num_common / len(reference)
    return 2 * precision * recall / (precision + recall)


def _segment_zh(text: str) -> list[str]:
    with optional_import():
        import jieba  # only the Chinese tasks need it
    jieba.setLogLevel(logging.WARNING)
    return list(jieba.cut(text, cut_all=False))


# Summaries


class _RougeRun(Thread):
    """Runs `rouge` at the bottom of a fresh call stack, as deep as LongBench's eval.py calls it.

    `rouge` recurses once per word, so whether a long repeat overflows the recursion limit, and scores 0, would
    otherwise depend on how deep our caller is.
    """

    def __init__(self, prediction: str, reference: str) -> None:
        super().__init__(daemon=True)
        self.pair = prediction, reference
        self.score = 0.0
        self.error: Exception | None = None

    def run(self) -> None:
        try:
            scores: Any = _rouge_l().get_scores([self.pair[0]], [self.pair[1]], avg=True)
            self.score = scores["rouge-l"]["f"]
        except Exception as error:  # the original's bare except; `rouge` below turns it into ScoredZero
            self.error = error


@lru_cache(maxsize=1)
def _rouge_l() -> Any:
    with optional_import():
        from rouge import Rouge
    return Rouge(metrics=["rouge-l"], stats=["f"])


def rouge(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Rouge-L F of the PyPI package `rouge` 1.0.1: sentences end at ".", words keep case, sets of words, not counts."""
    _rouge_l()  # a missing package is no score of 0
    run = _RougeRun(prediction, reference)
    run.start()
    run.join()
    if run.error is not None:
        raise ScoredZero(f"rouge: {type(run.error).__name__}: {run.error}")
    return run.score


def rouge_zh(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """`rouge` over jieba's words."""
    return rouge(" ".join(_segment_zh(prediction)), " ".join(_segment_zh(reference)))


def rouge_standard(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """RougeL F of Google's `rouge_score` without stemming: the field's standard, not LongBench's score."""
    return _google_rouge(prediction, reference, tokenizer=None)


def rouge_standard_zh(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """`rouge_standard` over jieba's words (its own tokenizer drops everything but a-z and 0-9)."""
    return _google_rouge(prediction, reference, tokenizer=_ZhTokenizer())


class _ZhTokenizer:
    def tokenize(self, text: str) -> list[str]:
        return [word for word in _segment_zh(text) if word.strip()]


def _google_rouge(prediction: str, reference: str, tokenizer: Any) -> float:
    with optional_import():
        from rouge_score.rouge_scorer import RougeScorer  # pulls in nltk; only this metric needs it

    scorer = RougeScorer(["rougeL"], use_stemmer=False, tokenizer=tokenizer)
    return scorer.score(reference, prediction)["rougeL"].fmeasure


# Classification, retrieval, counting, code


def classification(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """1 / (number of classes named in the prediction) if the reference is among them, else 0.

    A named class that is a proper part of the reference does not count; the original removes those from the list it is
    walking, so the class after a removed one is never looked at. That is kept.
    """
    if all_classes is None:
        raise MetricError("classification needs all_classes, the list of class names, and was given none")
    named = [name for name in all_classes if name in prediction]
    position = 0
    while position < len(named):
        if named[position] in reference and named[position] != reference:
            named.remove(named[position])
        position += 1
    return 1.0 / len(named) if reference in named else 0.0


def retrieval(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Share of the prediction's numbers that are the reference's paragraph number."""
    return _share_of_numbers(prediction, _paragraph_number(reference, r"Paragraph (\d+)"))


def retrieval_zh(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """`retrieval` for references such as "段落3"."""
    return _share_of_numbers(prediction, _paragraph_number(reference, r"段落(\d+)"))


def count(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Share of the prediction's numbers that are the reference."""
    return _share_of_numbers(prediction, reference)


def _paragraph_number(reference: str, pattern: str) -> str:
    match = re.search(pattern, reference)
    if match is None:
        raise MetricError(f"the reference {reference!r} names no paragraph; expected a match of {pattern!r}")
    return match.group(1)


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def code_sim(prediction: str, reference: str, all_classes: Sequence[str] | None = None) -> float:
    """Similarity of the first line that looks like code, as fuzzywuzzy 0.18 computes it without python-Levenshtein."""
    line = code_line(prediction)
    if line == reference:
        return 1.0
    if not line or not reference:
        return 0.0
    return round(100 * difflib.SequenceMatcher(None, line, reference).ratio()) / 100


def code_line(text: str) -> str:
    """The line of a prediction that `code_sim` reads: the first one that looks like code; empty if there is none."""
    lines = text.lstrip("\n").split("\n")
    return next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")


METRICS: dict[str, Metric] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "rouge_standard": rouge_standard,
    "rouge_standard_zh": rouge_standard_zh,
    "classification": classification,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "count": count,
    "code_sim": code_sim,
}
STANDARD_ROUGE = {"rouge": "rouge_standard", "rouge_zh": "rouge_standard_zh"}
"""For a task scored with LongBench's `rouge`, the field's standard to report beside it."""
