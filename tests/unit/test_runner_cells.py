"""Cells, run names and the grid."""

import pytest

from adaskip.core.plan import PHASES
from adaskip.runs.cells import MODELS, Cell, grid, load_setup, parse_run_name
from adaskip.strategies import NAMES
from adaskip.strategies.names import GRID_STRATEGIES, SHORT_NAMES


def test_every_strategy_has_a_short_name():
    assert set(SHORT_NAMES) == set(NAMES)


def test_run_name_is_the_artifacts_and_reads_back():
    cell = Cell("llama", "prefill", "early_exit", 8)
    assert cell.run_name == "llama-EE-PREFILL"
    assert cell.label == "llama-EE-PREFILL/8-sublayers"
    for model in MODELS:
        for phase in PHASES:
            for strategy in SHORT_NAMES:
                name = Cell(model, phase, strategy, 0 if strategy == "full" else 2).run_name
                assert parse_run_name(name) == (model, phase, strategy)


@pytest.mark.parametrize("name", ["llama", "llama-EE", "llama-XX-PREFILL", "llama-EE-NIGHT", "-EE-DECODE", ""])
def test_other_names_are_refused_with_the_form(name):
    with pytest.raises(ValueError, match="is not a run name: expected <model>-<FULL"):
        parse_run_name(name)


def test_whole_grid_is_144_cells_with_one_full_model_per_phase():
    cells = list(grid(MODELS, PHASES, GRID_STRATEGIES, load_setup("testbed").budgets))
    assert len(cells) == len(set(cells)) == 3 * 3 * (5 * 3 + 1)
    assert [cell.label for cell in cells][:3] == [
        "llama-FULL-PREFILL/0-sublayers",
        "llama-EE-PREFILL/4-sublayers",
        "llama-EE-PREFILL/6-sublayers",
    ]


@pytest.mark.parametrize(("strategy", "sublayers"), [("full", 4), ("full", -2), ("adaskip", -2)])
def test_a_budget_that_contradicts_the_strategy_is_refused(strategy, sublayers):
    with pytest.raises(ValueError, match=rf"'{strategy}' cannot skip {sublayers} sublayers; allowed: "):
        Cell("llama", "e2e", strategy, sublayers)


def test_unknown_names_come_with_the_nearest_and_all():
    with pytest.raises(ValueError, match=r"unknown strategy 'adskip'\. Did you mean 'adaskip'\? Allowed: full, "):
        Cell("llama", "e2e", "adskip", 4)


@pytest.mark.parametrize(("name", "num_layers"), [("paper", 32), ("small_context", 32), ("testbed", 16)])
def test_setups_have_the_papers_fractions_and_tasks(name, num_layers):
    setup = load_setup(name)
    assert [budget / (2 * num_layers) for budget in setup.budgets] == [0.125, 0.1875, 0.25]
    assert setup.phases["prefill"].tasks == ("multifieldqa_en", "triviaqa", "trec")
    assert setup.phases["prefill"].max_new_tokens == 32
    assert setup.phases["decode"].tasks == setup.phases["e2e"].tasks == ("gov_report", "multi_news")
