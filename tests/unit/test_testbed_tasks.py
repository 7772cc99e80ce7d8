"""The generated tasks: LongBench's record format, the paper's sizes, and splits that share no fact."""

from __future__ import annotations

import functools
import random
import re
import subprocess
import sys

import pytest

from adaskip import testbed
from adaskip.benchmarks.longbench import TASKS
from adaskip.benchmarks.scoring import score_sample
from adaskip.testbed.lexicon import CLASSES, LEXICON
from adaskip.testbed.tasks import SUMMARIES, draw, split_of
from dev.testbed_training.tokenizer import build_tokenizer

FIELDS = {"input", "context", "answers", "length", "dataset", "language", "all_classes", "_id"}
FACT = re.compile(r"(\w+) \w+ (\w+) (\w+) to \w+\.")
TYPED = re.compile(r"What are the (\w+) (\w+) from (\w+)\?\nType: (?:\3 )?(\w+)")


records = functools.cache(testbed.records)
"""Of a split whole, which takes a fifth of a second."""


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def facts_of(task: str, record: dict) -> set[tuple[str, ...]]:
    """What a record's text states: (name, kind, goods) per sentence, (kind, goods, place, class) per typed question."""
    solved = f"{record['context']}\n{record['input']} {record['answers'][0]}"
    return set((TYPED if task == "trec" else FACT).findall(solved))


@pytest.mark.parametrize("task", testbed.TASKS)
def test_records_are_the_same_on_every_call(task):
    assert testbed.records(task, limit=5) == testbed.records(task, limit=8)[:5]


@pytest.mark.parametrize("task", testbed.TASKS)
def test_records_have_longbench_format(task):
    for record in testbed.records(task, limit=20):
        assert set(record) == FIELDS
        assert record["dataset"] == task
        assert record["length"] == len(record["context"].split())
        assert record["all_classes"] == (list(CLASSES) if task == "trec" else None)
        assert score_sample(task, record["answers"][0], record["answers"], record["all_classes"]) == pytest.approx(1)


@pytest.mark.parametrize("task", testbed.TASKS)
@pytest.mark.parametrize("split", testbed.SPLITS)
def test_records_of_a_split_differ_from_each_other(task, split):
    found = records(task, split)
    assert len({record["_id"] for record in found}) == len(found) == 200


@pytest.mark.parametrize("task", testbed.TASKS)
def test_contexts_have_500_to_1000_tokens(task, tokenizer):
    lengths = [len(tokenizer(record["context"])["input_ids"]) for record in records(task, "test")]
    assert min(lengths) >= 500
    assert max(lengths) <= 1000


@pytest.mark.parametrize("task", SUMMARIES)
def test_summaries_have_64_to_110_tokens(task, tokenizer):
    lengths = [len(tokenizer("\n" + record["answers"][0])["input_ids"]) for record in records(task, "test")]
    assert min(lengths) >= 64
    assert max(lengths) <= 110


@pytest.mark.parametrize("task", testbed.TASKS)
def test_every_generated_text_survives_the_tokenizer(task, tokenizer):
    for record in testbed.records(task, limit=40):
        text = TASKS[task].template.format(**record) + f" {record['answers'][0]}"
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("task", testbed.TASKS)
def test_no_fact_is_in_two_splits(task):
    facts = {split: set() for split in testbed.SPLITS}
    for split in testbed.SPLITS:
        for record in records(task, split):
            facts[split] |= facts_of(task, record)
    rng = random.Random(1)
    for size in (30, 100, 300, 640) * 10:
        facts["train"] |= facts_of(task, draw(task, "train", size, rng).record())
    assert min(len(found) for found in facts.values()) > 200
    for split, found in facts.items():
        assert {split_of(*fact) for fact in found} == {split}


def test_words_of_different_kinds_do_not_overlap():
    words = [word for kind in LEXICON.values() for word in kind]
    assert len(words) == len(set(words))


def test_no_class_name_contains_another():
    assert not [(a, b) for a in CLASSES for b in CLASSES if a != b and a in b]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: testbed.records("trek"), "unknown testbed task 'trek'; one of multifieldqa_en"),
        (lambda: testbed.records("trec", "dev"), "unknown split 'dev'; one of train, calibration, test"),
        (lambda: testbed.records("trec", limit=0), "limit is 0"),
        (lambda: testbed.records("trec", limit=201), "limit is 201"),
        (lambda: testbed.checkpoint_dir("gpt"), "unknown testbed family 'gpt'; one of llama, internlm, vicuna"),
    ],
)
def test_wrong_names_and_limits_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()


def test_importing_the_testbed_needs_no_torch():
    code = "import sys, adaskip.testbed; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
