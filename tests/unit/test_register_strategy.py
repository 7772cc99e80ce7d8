"""A strategy from outside: what is registered, what is refused, and that every list reads what it declares."""

from __future__ import annotations

import os
import re
import sys
from dataclasses import dataclass
from functools import cached_property

import pytest

from adaskip.common import own_options, plugins
from adaskip.common.plugins import PLUGINS
from adaskip.core.plan import Budget, SkipPlan
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from adaskip.runs.cells import Cell, parse_run_name
from adaskip.runs.config import GridConfig, RunConfig
from adaskip.strategies import (
    GRID_STRATEGIES,
    LABELS,
    LOOKS,
    NAMES,
    PAPER_STRATEGIES,
    SHORT_NAMES,
    STRATEGIES,
    Look,
    Strategy,
    build,
    needs_profile,
    needs_selection,
    register_strategy,
    strategy_name,
    strategy_option,
)
from adaskip.strategies.registry import registry
from adaskip.studies.bench.settings import BenchConfig
from adaskip.studies.plots.score_curves import plot_retention, plot_scores
from adaskip.studies.plots.skip_maps import plot_skip_map
from adaskip.studies.tables import labels
from adaskip.studies.tables.results import load_results
from tests.outside_strategy import COLOR, LABEL, MODULE, NAME, SHORT_NAME, install, write_module
from tests.saved_runs import write_run

LOOK = Look("#123456", "P", (2, 3))


@pytest.fixture(autouse=True)
def own_registry(monkeypatch):
    """What a test registers and imports is forgotten after it."""
    monkeypatch.setattr(registry, "classes", dict(registry.classes))
    monkeypatch.setattr(registry, "loaded", set(registry.loaded))
    monkeypatch.setenv(PLUGINS, "")
    plugins._entry_points.cache_clear()
    yield
    sys.modules.pop(MODULE, None)
    plugins._entry_points.cache_clear()


def parse_options(name: str, given: list[str]) -> dict:
    return own_options.parse_options(name, STRATEGIES.get(name), given, "--strategy-option")


def toy(*, frozen=True, fields=None, **declared) -> type[Strategy]:
    """A strategy class that skips the last FFNs; declared: instead of what it declares otherwise, None for nothing."""
    declared = {"name": "toy", "short_name": "TOY", "label": "Toy", "look": LOOK, **declared}
    namespace = {name: value for name, value in declared.items() if value is not None}

    def skipped(self) -> SkipPlan:
        layers = range(self.num_layers - self.budget.num_sublayers(self.num_layers), self.num_layers)
        return SkipPlan(ffn=frozenset(layers))

    namespace |= {"__annotations__": dict(fields or {}), "skipped": cached_property(skipped)}
    cls = type("Toy", (Strategy,), namespace)
    cls.__dict__["skipped"].__set_name__(cls, "skipped")
    return dataclass(frozen=True, kw_only=True)(cls) if frozen else cls


def test_every_list_reads_what_a_registered_strategy_declares():
    cls = register_strategy(toy(in_grid=True))
    assert STRATEGIES["toy"] is cls
    assert (SHORT_NAMES["toy"], LABELS["toy"], LOOKS["toy"]) == ("TOY", "Toy", LOOK)
    assert labels.STRATEGIES["toy"] == "Toy"
    assert NAMES[-1] == GRID_STRATEGIES[-1] == "toy"
    assert "toy" not in PAPER_STRATEGIES
    assert not needs_profile("toy")
    assert parse_run_name("llama-TOY-E2E") == ("llama", "e2e", "toy")
    assert Cell("llama", "e2e", "toy", 4).run_name == "llama-TOY-E2E"
    assert GridConfig().strategies[-1] == BenchConfig().strategies[-1] == "toy"
    built = build("toy", phase="e2e", budget=Budget(sublayers=2), num_layers=8)
    assert built is not None
    assert built.skipped == SkipPlan(ffn=frozenset({6, 7}))


def test_a_strategy_outside_the_grid_is_taken_by_name_only():
    register_strategy(toy())
    assert "toy" in NAMES
    assert "toy" not in GridConfig().strategies
    assert GridConfig(strategies=("toy",)).strategies == BenchConfig(strategies=("toy",)).strategies == ("toy",)


def test_the_kind_of_profile_is_what_the_class_declares():
    cls = register_strategy(toy(profile_type=ImportanceProfile, fields={"profile": ImportanceProfile}))
    assert needs_profile(cls.name)
    assert not needs_selection(cls.name)
    with pytest.raises(ValueError, match="toy needs a profile"):
        build("toy", phase="e2e", budget=Budget(sublayers=2), num_layers=8)


def test_to_register_a_class_again_changes_nothing():
    cls = register_strategy(toy())
    assert register_strategy(cls) is cls
    assert list(STRATEGIES).count("toy") == 1


@pytest.mark.parametrize(
    ("declared", "message"),
    [
        ({"name": "adaskip"}, "name 'adaskip' is taken by AdaSkip"),
        ({"name": "full"}, "name 'full' is taken by the full model"),
        ({"short_name": "EE"}, "short name 'EE' is taken by EarlyExit"),
        ({"short_name": "FULL"}, "short name 'FULL' is taken by the full model"),
        ({"label": "Early Exit"}, "label 'Early Exit' is taken by EarlyExit"),
        ({"name": None}, "Toy must declare name, a str"),
        ({"short_name": None}, "Toy must declare short_name, a str"),
        ({"label": None}, "Toy must declare label, a str"),
        ({"label": ""}, "Toy must declare label, a str; got ''"),
        ({"look": None}, "Toy must declare look, a Look"),
        ({"look": "blue"}, "Toy must declare look, a Look; got 'blue'"),
        ({"name": "My Toy"}, "Toy declares name 'My Toy'; allowed"),
        ({"short_name": "T-Y"}, "Toy declares short_name 'T-Y'; allowed"),  # a run's name is split at its dashes
        ({"short_name": "toy"}, "Toy declares short_name 'toy'; allowed"),
        ({"in_grid": "yes"}, "Toy must declare in_grid as True or False"),
        ({"profile_type": ImportanceProfile}, "a profile_type but no field profile"),
        ({"fields": {"profile": ImportanceProfile}}, "a field profile but no profile_type"),
        (
            {"profile_type": SelectionProfile, "fields": {"profile": SelectionProfile}, "method": "greedy"},
            "declares method 'greedy'; allowed: search, cosine_window",
        ),
        (
            {"profile_type": dict, "fields": {"profile": dict}},
            "declares profile_type <class 'dict'>; allowed: None, Imp",
        ),
        ({"frozen": False}, "Toy must be a frozen dataclass"),
    ],
)
def test_what_cannot_be_registered_is_refused(declared, message):
    before = list(STRATEGIES)
    with pytest.raises(ValueError, match=re.escape(message)) as refused:
        register_strategy(toy(**declared))
    assert "\n" not in str(refused.value)
    assert list(STRATEGIES) == before


def test_an_abstract_class_or_no_strategy_is_refused():
    @dataclass(frozen=True, kw_only=True)
    class Abstract(Strategy):
        name, short_name, label, look = "abstract", "ABS", "Abstract", LOOK

    with pytest.raises(ValueError, match="Abstract is abstract: define skipped"):
        register_strategy(Abstract)
    for given in (dict, 3, toy()(num_layers=4, budget=Budget(sublayers=1))):
        with pytest.raises(ValueError, match="takes a class derived from"):
            register_strategy(given)  # pyright: ignore


@pytest.mark.parametrize("way", ["class", "plugin", "plugin class", "entry point"])
def test_each_way_to_name_a_module_outside_imports_its_strategy(way, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str((install if way == "entry point" else write_module)(tmp_path / "packages")))
    if way == "class":
        assert strategy_name(f"{MODULE}:OutsideSkip") == NAME
        assert os.environ[PLUGINS] == f"{MODULE}:OutsideSkip"  # what worker processes inherit
    elif way != "entry point":
        monkeypatch.setenv(PLUGINS, MODULE if way == "plugin" else f" {MODULE}:OutsideSkip ,")
    assert STRATEGIES[NAME].__module__ == MODULE
    assert RunConfig(model="llama", phase="e2e", strategy=NAME).strategy == NAME
    assert RunConfig(model="llama", phase="e2e", strategy=f"{MODULE}:OutsideSkip").strategy == NAME


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        ("no_such_module_at_all:Class", "importing no_such_module_at_all raised ModuleNotFoundError"),
        (f"{MODULE}:NoSuchClass", f"module {MODULE} has no class NoSuchClass"),
        (f"{MODULE}:dataclass", "register_strategy takes a class derived from"),
    ],
)
def test_a_plugin_that_cannot_be_had_is_one_line(plugin, message, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(write_module(tmp_path / "packages")))
    with pytest.raises(ValueError, match=message):
        strategy_name(plugin)
    monkeypatch.setenv(PLUGINS, plugin)
    for _ in range(2):  # not only the first time
        with pytest.raises(ValueError, match=message):
            list(NAMES)


def test_options_are_read_in_the_types_that_the_strategy_declares():
    @register_strategy
    @dataclass(frozen=True, kw_only=True)
    class Optioned(Strategy):
        name, short_name, label, look = "optioned", "OPT", "With options", LOOK
        count: int = strategy_option("a number", 1)
        share: float | None = strategy_option("a share", None)
        inner: bool = strategy_option("a switch", True)
        how: str = strategy_option("a word", "near")
        hidden: int = 0

        @property
        def skipped(self) -> SkipPlan:
            return SkipPlan()

    given = ["count=3", "share=0.5", "inner=false", "how=a=b"]
    assert parse_options("optioned", given) == {"count": 3, "share": 0.5, "inner": False, "how": "a=b"}
    assert parse_options("optioned", ["share=none"]) == {"share": None}
    config = RunConfig(model="llama", phase="e2e", strategy="optioned", strategy_option=("count=2",))
    assert config.strategy_options == {"count": 2}
    refused = {
        "count": "takes NAME=VALUE; got 'count'",
        "count=x": "count must be int, not 'x'",
        "inner=2": "inner must be bool, not '2'",
        "hidden=1": "optioned has no option hidden; allowed: count, share, inner, how",
    }
    for text, message in refused.items():
        with pytest.raises(ValueError, match=message):
            parse_options("optioned", [text])
    with pytest.raises(ValueError, match="gives count more than once"):
        parse_options("optioned", ["count=1", "count=1"])
    with pytest.raises(ValueError, match="early_exit has no option count; allowed: none"):
        parse_options("early_exit", ["count=1"])


def test_an_option_given_in_both_spellings_is_refused():
    given = {"learning_window": 3, "strategy_option": ("learning_window=4",)}
    config = RunConfig(model="llama", phase="e2e", strategy="adaskip", **given)
    with pytest.raises(ValueError, match="given by --learning-window and by --strategy-option"):
        config.strategy_options  # noqa: B018


def test_tables_and_plots_show_a_strategy_from_outside_where_it_was_run(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(write_module(tmp_path / "packages")))
    strategy_name(f"{MODULE}:OutsideSkip")
    runs_dir = tmp_path / "runs"
    for strategy, sublayers in (("full", 0), ("adaskip", 4), (NAME, 4)):
        write_run(runs_dir, Cell("llama", "e2e", strategy, sublayers), 0.8, num_samples=2)
    results = load_results(runs_dir)
    assert results.skipping == (*GRID_STRATEGIES[1:], NAME)
    written = [*plot_scores(results, "e2e", tmp_path), *plot_retention(results, tmp_path)]
    for path in written[1::2]:
        svg = path.read_text(encoding="utf-8")
        assert COLOR in svg
        assert f"<!-- {LABEL} -->" in svg
    skip_map = plot_skip_map(results, "llama", tmp_path)[1].read_text(encoding="utf-8")
    assert all(f"<!-- {word} -->" in skip_map for word in LABEL.split())
    assert SHORT_NAME in {path.name.split("-")[1] for path in runs_dir.iterdir()}


def test_a_strategy_that_was_not_run_and_is_not_of_the_grid_has_no_rows(tmp_path):
    register_strategy(toy())
    write_run(tmp_path, Cell("llama", "e2e", "adaskip", 4), 0.8, num_samples=2)
    assert load_results(tmp_path).skipping == GRID_STRATEGIES[1:]
