"""Figures: drawn from saved results, told apart without colour, the same bytes for the same data."""

from __future__ import annotations

import json
from itertools import combinations

import matplotlib
import numpy as np
import pytest
from PIL import Image

from adaskip.runs.cells import Cell
from adaskip.strategies.names import GRID_STRATEGIES
from adaskip.studies.plots.score_curves import plot_retention, plot_scores
from adaskip.studies.plots.skip_maps import ONLINE, plot_skip_map, skip_shares
from adaskip.studies.plots.style import LOOKS
from adaskip.studies.tables.results import Results, load_results
from adaskip.studies.tables.runs import load_run
from tests.saved_runs import write_run


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> Results:
    runs_dir = tmp_path_factory.mktemp("runs")
    for number, strategy in enumerate(GRID_STRATEGIES):
        cell = Cell("llama", "e2e", strategy, 0 if strategy == "full" else 4)
        write_run(runs_dir, cell, 1 - 0.2 * number, num_samples=4)
    return load_results(runs_dir)


def test_looks_differ_in_colour_marker_and_dashes():
    for one, other in combinations([LOOKS[name] for name in GRID_STRATEGIES[1:]], 2):
        assert one.color != other.color
        assert one.marker != other.marker
        assert one.dashes != other.dashes


def test_figures_are_written_as_png_and_svg_and_twice_the_same(results, tmp_path):
    def draw(out_dir):
        written = [*plot_scores(results, "e2e", out_dir), *plot_retention(results, out_dir)]
        return written + plot_skip_map(results, "llama", out_dir)

    first, second = draw(tmp_path / "first"), draw(tmp_path / "second")
    names = [f"{stem}.{kind}" for stem in ("scores_e2e", "retention", "skip_map_llama") for kind in ("png", "svg")]
    assert [path.name for path in first] == names
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
        assert b"<dc:date>" not in one.read_bytes()
    for path in first[::2]:
        assert np.asarray(Image.open(path).convert("L")).std() > 5  # something is drawn


def test_a_phase_or_a_model_that_was_not_run_has_no_figure(results, tmp_path):
    assert plot_scores(results, "prefill", tmp_path) == []
    assert plot_skip_map(results, "vicuna", tmp_path) == []
    assert not list(tmp_path.iterdir())


def test_drawing_leaves_the_users_style_alone(results, tmp_path):
    before = dict(matplotlib.rcParams)
    plot_scores(results, "e2e", tmp_path)
    assert dict(matplotlib.rcParams) == before


def test_skip_shares_are_counted_from_the_records_plans(tmp_path):
    folder = write_run(tmp_path, Cell("llama", "decode", "adaskip", 4), 0.5, num_samples=4, online_ffns=2)
    shares = skip_shares(load_run(folder))
    assert shares is not None
    assert not shares.prefill.any()
    assert np.flatnonzero(shares.decode[0]).tolist() == [14, 15]
    assert np.flatnonzero(shares.decode[1]).tolist() == [1, 2]
    assert np.flatnonzero(shares.online[1]).tolist() == [6, 7]
    assert shares.category(1, 6) == (ONLINE, 0.5)
    assert shares.category(0, 14) == ("decode only", 1.0)
    assert shares.category(0, 3) is None


def test_what_is_skipped_in_both_phases_is_told_from_one(tmp_path):
    folder = write_run(tmp_path, Cell("llama", "e2e", "early_exit", 4), 0.5, num_samples=2)
    path = folder / "gov_report.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    for line in lines:
        line["plan"]["prefill"]["ffn"].append(3)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    shares = skip_shares(load_run(folder))
    assert shares is not None
    assert shares.category(1, 15) == ("prefill and decode", 1.0)
    assert shares.category(1, 3) == ("prefill only", 0.5)


def test_a_run_without_records_has_no_shares(tmp_path):
    folder = write_run(tmp_path, Cell("llama", "e2e", "early_exit", 4), 0.5, num_samples=2)
    for path in folder.glob("*.jsonl"):
        path.write_text("")
    assert skip_shares(load_run(folder)) is None
