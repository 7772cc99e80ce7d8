"""A benchmark from outside: what is registered, what is refused, and what its records and scores must be."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from adaskip.benchmarks.longbench import LongBench, as_dataset
from adaskip.benchmarks.protocol import BENCHMARKS, Benchmark, Task, build_benchmark, register_benchmark
from adaskip.common import plugins
from adaskip.common.plugins import PLUGINS
from adaskip.runs import records
from adaskip.runs.config import RunConfig
from adaskip.runs.job import Part
from adaskip.runs.records import Records
from adaskip.strategies import STRATEGIES
from adaskip.strategies.registry import registry
from adaskip.testbed.benchmark import Testbed
from tests import outside_benchmark, outside_strategy

CELL = {"model": "llama", "phase": "e2e", "strategy": "early_exit"}
TASK = Task(name="ask", template="{question}", max_new_tokens=4, metric="exact")
RECORD = {"_id": "1", "answers": ["yes"], "question": "Is it?"}


@pytest.fixture(autouse=True)
def own_registries(monkeypatch):
    """What a test registers and imports is forgotten after it."""
    for each in (BENCHMARKS, registry):
        monkeypatch.setattr(each, "classes", dict(each.all()))
        monkeypatch.setattr(each, "loaded", set(each.loaded))
    monkeypatch.setenv(PLUGINS, "")
    plugins._entry_points.cache_clear()
    records._read.cache_clear()
    yield
    for module in (outside_benchmark.MODULE, outside_strategy.MODULE):
        sys.modules.pop(module, None)
    plugins._entry_points.cache_clear()


def toy(*, frozen=True, fields=None, made=(RECORD,), **declared) -> Any:
    """A benchmark class; declared: instead of what it declares otherwise, None for nothing."""
    declared = {"name": "toy", "tasks": (TASK,), **declared}
    methods = {
        "records": lambda self, task, limit=None: made,
        "score": lambda self, task, prediction, references, **kept: float(prediction in references),
    }
    namespace = {**methods, **{name: value for name, value in declared.items() if value is not None}}
    cls = type("Toy", (Benchmark,), {**namespace, "__annotations__": fields or {}})
    return dataclass(frozen=True, kw_only=True)(cls) if frozen else cls


def test_the_librarys_own_come_first():
    cls = register_benchmark(toy())
    assert list(BENCHMARKS.all().values()) == [LongBench, Testbed, cls]
    assert register_benchmark(cls) is cls
    assert RunConfig(**CELL, benchmark="toy").find_benchmark() == cls()


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"name": "longbench"}, "name 'longbench' is taken by LongBench"),
        ({"name": None}, "Toy must declare name, a str"),
        ({"name": "My Toy"}, "Toy declares name 'My Toy'; allowed"),
        ({"tasks": None}, "Toy must declare tasks, a tuple of at least one Task; got None"),
        ({"tasks": ()}, "Toy must declare tasks, a tuple of at least one Task; got ()"),
        ({"tasks": ("ask",)}, "Toy must declare tasks, a tuple of at least one Task"),
        ({"tasks": (TASK, TASK)}, "Toy names a task twice: ask, ask"),
        ({"fields": {"path": str}}, "Toy: fields of a benchmark have defaults; path has none"),
        ({"score": None, "records": None}, None),
        ({"frozen": False}, "Toy must be a frozen dataclass"),
    ],
)
def test_what_cannot_be_registered_is_refused(declared, message):
    before = list(BENCHMARKS.all())
    if message is None:
        cls, message = type("Toy", (Benchmark,), {"name": "toy", "tasks": (TASK,)}), "abstract: define records, score"
    else:
        cls = toy(**declared)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        register_benchmark(cls)
    assert "\n" not in str(refused.value)
    assert list(BENCHMARKS.all()) == before


@pytest.mark.parametrize(
    ("changes", "message"), [({"name": "a/b"}, "task 'a/b' has an invalid name"), ({"max_new_tokens": 0}, "at least 1")]
)
def test_a_task_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        replace(TASK, **changes)


@pytest.mark.parametrize("way", ["class", "plugin", "plugin class", "entry point"])
def test_each_way_to_name_a_module_outside_imports_its_benchmark(way, tmp_path, monkeypatch):
    make = outside_benchmark.install if way == "entry point" else outside_benchmark.write_module
    monkeypatch.syspath_prepend(str(make(tmp_path / "packages")))
    given = f"{outside_benchmark.MODULE}:OutsideTasks"
    if way in ("plugin", "plugin class"):
        monkeypatch.setenv(PLUGINS, outside_benchmark.MODULE if way == "plugin" else given)
    name = given if way == "class" else outside_benchmark.NAME
    config = RunConfig(**CELL, benchmark=name, benchmark_option=("size=7",))
    assert config.benchmark == outside_benchmark.NAME
    assert config.find_benchmark().options == {"size": 7}
    assert str(config.runs_dir).endswith("results/outside/runs")
    assert config.setup.phases["e2e"].tasks == ("repeat", "first-words")


def test_plugins_of_both_kinds_go_each_into_their_own_registry(tmp_path, monkeypatch):
    packages = outside_strategy.write_module(outside_benchmark.write_module(tmp_path / "packages"))
    monkeypatch.syspath_prepend(str(packages))
    classes = (f"{outside_benchmark.MODULE}:OutsideTasks", f"{outside_strategy.MODULE}:OutsideSkip")
    monkeypatch.setenv(PLUGINS, ",".join(classes))
    assert outside_benchmark.NAME in BENCHMARKS.all()
    assert outside_strategy.NAME in STRATEGIES
    assert outside_strategy.NAME not in BENCHMARKS.all()


def test_its_options_are_its_fields():
    @register_benchmark
    @dataclass(frozen=True, kw_only=True)
    class Placed(toy()):
        name = "placed"
        data_dir: str | None = None
        size: int = field(default=2)

    assert build_benchmark("placed", data_dir="x", size=3) == Placed(data_dir="x", size=3)
    assert Placed(data_dir="x").options == {"size": 2}, "where the data is makes no other run"
    assert RunConfig(**CELL, benchmark="placed", data_dir="x").find_benchmark() == Placed(data_dir="x")
    with pytest.raises(ValueError, match="benchmark placed has no option length; allowed: data_dir, size"):
        build_benchmark("placed", length=3)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        ([{"_id": "1"}], "record 0 of task ask of benchmark toy has no 'answers'; it has: _id"),
        ([RECORD, {**RECORD, "_id": 2}], "record 1 of task ask of benchmark toy has the '_id' 2"),
        ([{**RECORD, "answers": "yes"}], "has 'answers' that are not a non-empty list of strings"),
        ([{**RECORD, "answers": []}], "has 'answers' that are not a non-empty list of strings"),
        ([{**RECORD, "more": float("nan")}], "cannot be written as JSON"),
        ([{**RECORD, "more": "\ud800"}], "cannot be written as JSON"),
        ([RECORD, RECORD], "two records of task ask of benchmark toy have the same '_id'"),
    ],
)
def test_records_that_no_run_can_hold_are_refused(made, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        Records(toy(made=made)()).scored("ask")


def test_a_benchmark_without_unscored_records_calibrates_nothing():
    for ask in (lambda: Records(toy()()).calibration("ask", 2), lambda: Records(toy()()).unscored(["ask"], 2)):
        with pytest.raises(ValueError, match="benchmark toy has no records that no run is scored on"):
            ask()


def test_a_record_without_a_field_of_the_template_is_named():
    with pytest.raises(ValueError, match="record 1 has no field 'question', which the prompt of ask needs"):
        toy()().prompt("ask", {"_id": "1", "answers": ["yes"]})


def test_a_prompt_of_its_own_is_what_a_run_is_told_apart_by():
    asked = toy(prompt=lambda self, task, record: record["question"].upper())
    parts = [Part(cls(), "ask", (RECORD,), 4) for cls in (toy(), asked)]
    assert [part.template for part in parts] == ["{question}", ["IS IT?"]]


def test_a_score_is_a_fraction():
    wrong = toy(score=lambda self, task, prediction, references: 100.0)()
    with pytest.raises(ValueError, match=r"a score is 100\.0; allowed: 0 to 1"):
        wrong.evaluate("ask", [{"prediction": "yes", "references": ["yes"]}], {})


def test_fidelity_is_the_score_against_the_full_models_answer():
    benchmark = toy()()
    pairs = {("yes", "yes "): 1.0, ("yes", "no"): 0.0, ("", ""): 1.0, ("", "no"): 0.0}
    assert {pair: benchmark.fidelity("ask", *pair) for pair in pairs} == pairs


def test_a_subset_is_the_one_that_datasets_draws():
    made = [{**RECORD, "_id": str(number)} for number in range(30)]
    blank = {"input": "", "context": "", "length": 1, "dataset": "", "language": "", "all_classes": None}
    shuffled = as_dataset([{"_id": each["_id"], "answers": ["yes"], **blank} for each in made]).shuffle(seed=3)
    drawn = Records(toy(made=made)(), seed=3).scored("ask", subset=7)
    assert [sample["_id"] for sample in drawn] == list(shuffled["_id"])[:7]
