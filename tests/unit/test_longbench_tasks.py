"""The tasks as data: every template, cap, metric and rule is LongBench's."""

import hashlib
import json

import pytest

from adaskip.benchmarks.longbench import EXTENDED_TASKS, TASKS, LongBenchError, TaskSpec, get_task, set_meant
from adaskip.benchmarks.protocol import BenchmarkError
from adaskip.benchmarks.scoring import METRICS
from adaskip.common import configs
from adaskip.common.configs import ConfigError, load_yaml

# LongBench's config/dataset2maxlen.json
CAPS = {
    "narrativeqa": 128,
    "qasper": 128,
    "multifieldqa_en": 64,
    "multifieldqa_zh": 64,
    "hotpotqa": 32,
    "2wikimqa": 32,
    "musique": 32,
    "dureader": 128,
    "gov_report": 512,
    "qmsum": 512,
    "multi_news": 512,
    "vcsum": 512,
    "trec": 64,
    "triviaqa": 32,
    "samsum": 128,
    "lsht": 64,
    "passage_count": 32,
    "passage_retrieval_en": 32,
    "passage_retrieval_zh": 32,
    "lcc": 64,
    "repobench-p": 64,
}
EXTENDED = [
    "qasper",
    "multifieldqa_en",
    "hotpotqa",
    "2wikimqa",
    "gov_report",
    "multi_news",
    "trec",
    "triviaqa",
    "samsum",
    "passage_count",
    "passage_retrieval_en",
    "lcc",
    "repobench-p",
]


def test_tasks_and_caps_are_longbenchs():
    assert {name: task.max_new_tokens for name, task in TASKS.items()} == CAPS
    assert list(TASKS) == list(CAPS)


def test_thirteen_tasks_have_an_extended_set():
    assert sorted(EXTENDED_TASKS) == sorted(EXTENDED)
    assert len(EXTENDED_TASKS) == 13


def test_a_bare_name_means_longbench_e_where_it_has_a_set_unless_the_plain_one_is_asked_for():
    assert [set_meant("trec", extended) for extended in (None, True, False)] == ["trec_e", "trec_e", "trec"]
    assert [set_meant("trec_e", extended) for extended in (None, True, False)] == ["trec_e"] * 3
    assert [set_meant("narrativeqa", extended) for extended in (None, False)] == ["narrativeqa"] * 2


def test_templates_are_longbenchs_to_the_character():
    """dataset2prompt.json has 4979 characters with "as concisely" in the later spelling, 4977 as published."""
    text = json.dumps({name: task.template for name, task in TASKS.items()}, ensure_ascii=False, indent=4)
    assert len(text) == 4977
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "56d22ad4f382169c2b8a11ff4c982a4a1bea096c8152b0f0b85b64686b157c30"
    )


def test_first_line_and_chat_rules():
    assert {name for name, task in TASKS.items() if task.first_line_only} == {"trec", "triviaqa", "samsum", "lsht"}
    no_chat = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {name for name, task in TASKS.items() if not task.chat} == no_chat


def test_only_samsum_asks_for_a_token_and_stops_at_a_newline():
    assert {name for name, task in TASKS.items() if task.min_new_tokens} == {"samsum"}
    assert {name for name, task in TASKS.items() if task.stop_at_newline} == {"samsum"}
    assert TASKS["samsum"].min_new_tokens == 1


def test_every_metric_exists_and_is_longbenchs():
    by_metric = {}
    for name, task in TASKS.items():
        assert task.metric in METRICS
        by_metric.setdefault(task.metric, set()).add(name)
    assert by_metric == {
        "qa_f1": {"narrativeqa", "qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "musique", "triviaqa"},
        "qa_f1_zh": {"multifieldqa_zh"},
        "rouge": {"gov_report", "qmsum", "multi_news", "samsum"},
        "rouge_zh": {"dureader", "vcsum"},
        "classification": {"trec", "lsht"},
        "retrieval": {"passage_retrieval_en"},
        "retrieval_zh": {"passage_retrieval_zh"},
        "count": {"passage_count"},
        "code_sim": {"lcc", "repobench-p"},
    }


def test_the_extended_set_shares_the_tasks_spec():
    assert get_task("trec_e") is TASKS["trec"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("multinews", "unknown LongBench task 'multinews'. Did you mean multi_news"),
        ("TREC", "Did you mean trec?"),
        ("xyz", "unknown LongBench task 'xyz'. Tasks: narrativeqa, qasper"),
        ("narrativeqa_e", "LongBench-E has no set of 'narrativeqa'; it has: qasper"),
    ],
)
def test_unknown_task_is_one_line_with_what_is_allowed(name, says):
    with pytest.raises(LongBenchError) as caught:
        get_task(name)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_spec_refuses_a_template_without_context():
    with pytest.raises(BenchmarkError, match=r"no \{context\}"):
        TaskSpec(name="new", template="{input}", max_new_tokens=32, metric="qa_f1")


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "is missing"), ("a: [", "is not valid YAML"), ("- a", "must hold a mapping, not list")],
)
def test_load_yaml_says_what_is_wrong_in_one_line(tmp_path, monkeypatch, content, says):
    monkeypatch.setattr(configs, "CONFIG_DIR", tmp_path)
    if content is not None:
        (tmp_path / "models.yaml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_yaml("models")
    assert says in str(caught.value)
    assert "models.yaml" in str(caught.value)
    assert "\n" not in str(caught.value)
