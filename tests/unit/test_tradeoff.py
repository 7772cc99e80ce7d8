"""Score kept against measured speedup: points, Pareto front, counts, and what is said where something is missing."""

from __future__ import annotations

import json

import pytest

from adaskip.common.intervals import geometric_mean, mean_ratio_estimate, ratio_estimate
from adaskip.runs.cells import Cell
from adaskip.studies.tables.report import write_tradeoffs
from adaskip.studies.tables.results import load_results
from adaskip.studies.tables.tradeoff import NO_SPEED, UNFINISHED, find_tradeoffs
from adaskip.studies.tables.tradeoff_text import fronts, sentences
from tests.saved_runs import write_run
from tests.saved_speeds import FULL_TPOT_S, FULL_TTFT_S, write_speeds

PHASE_STEPS = 39
"""Decode steps of the saved runs' answers of 40 tokens."""
QUALITIES = {("adaskip", 4): 1.0, ("adaskip", 8): 0.5, ("early_exit", 4): 0.7, ("early_exit", 8): 0.4}
SPEEDS = {("adaskip", 4): 1.1, ("adaskip", 8): 1.25, ("early_exit", 4): 1.15, ("early_exit", 8): 1.2}


@pytest.fixture
def folder(tmp_path):
    """Runs and speeds of two models, prefill and end to end."""
    for model in ("llama", "vicuna"):
        for phase in ("prefill", "e2e"):
            write_run(tmp_path / "runs", Cell(model, phase, "full", 0), 1.0)
            for (strategy, sublayers), quality in QUALITIES.items():
                write_run(tmp_path / "runs", Cell(model, phase, strategy, sublayers), quality)
        faster = 1.0 if model == "llama" else 1.1
        speedups = {(phase, *key): faster * x for key, x in SPEEDS.items() for phase in ("prefill", "e2e")}
        write_speeds(tmp_path / f"{model}.json", speedups)
    return tmp_path


def find_all(folder):
    return find_tradeoffs(load_results(folder / "runs"), str(folder / "{model}.json"))


def find(folder):
    """That of scores kept."""
    return find_all(folder)[0]


def panel_of(folder, phase, model):
    return {(point.strategy, point.fraction): point for point in find(folder).panel(phase, model).itertuples()}


def test_a_point_is_the_mean_retention_against_the_measured_speedup(folder):
    panel = panel_of(folder, "e2e", "llama")
    assert panel["full", 0.0].speedup == panel["full", 0.0].value == 1.0
    assert panel["adaskip", 0.125].speedup == pytest.approx(1.1)
    cells = load_results(folder / "runs").cell_of
    expected = sum(cells["e2e", "llama", "early_exit", 0.125, t].retention for t in ("gov_report", "multi_news")) / 2
    assert panel["early_exit", 0.125].value == pytest.approx(expected)
    assert 0 < expected < 1


def test_end_to_end_speedup_is_of_a_whole_request(folder):
    write_speeds(folder / "llama.json", {("decode", "adaskip", 4): 2.0})
    write_run(folder / "runs", Cell("llama", "decode", "full", 0), 1.0)
    write_run(folder / "runs", Cell("llama", "decode", "adaskip", 4), 1.0)
    content = json.loads((folder / "llama.json").read_text())
    content["entries"][1]["phase"] = "e2e"  # twice as fast in decode, as fast in prefill
    (folder / "llama.json").write_text(json.dumps(content))
    point = panel_of(folder, "e2e", "llama")["adaskip", 0.125]
    prompt, answer = FULL_TTFT_S, PHASE_STEPS * FULL_TPOT_S
    assert point.speedup == pytest.approx((prompt + answer) / (prompt + answer / 2))


def test_the_front_holds_what_nothing_dominates(folder):
    on_front = {key for key, point in panel_of(folder, "prefill", "llama").items() if point.on_front}
    # 8 sublayers of Early Exit are slower than AdaSkip's and keep less; the full model is slower and keeps no more.
    assert on_front == {("adaskip", 0.125), ("early_exit", 0.125), ("adaskip", 0.25)}


def test_the_mean_over_models_is_geometric_in_speed(folder):
    mean = panel_of(folder, "prefill", None)
    assert mean["adaskip", 0.25].speedup == pytest.approx((1.25 * 1.375) ** 0.5)
    model = panel_of(folder, "prefill", "llama")["adaskip", 0.25]
    assert mean["adaskip", 0.25].value == pytest.approx(model.value)  # both models answer alike here
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)


def test_fronts_are_counted_for_the_readme(folder):
    tradeoff = find(folder)
    assert fronts(tradeoff)["adaskip"] == {
        "points": 8,
        "on_front": 8,
        "panels": 4,
        "panels_on_front": 4,
        "panels_fastest": 4,
    }
    assert fronts(tradeoff)["early_exit"] == {
        "points": 8,
        "on_front": 4,
        "panels": 4,
        "panels_on_front": 4,
        "panels_fastest": 0,
    }
    on_fronts, fastest = sentences(tradeoff)
    assert "AdaSkip is on the front with 8 of its 8 points, on 4 of 4 fronts" in on_fronts
    assert fastest.endswith("(times in 2 x 2): Early Exit 0, AdaSkip 4, the full model 0.")


def test_where_nothing_keeps_enough_the_full_model_is_the_fastest(folder):
    tradeoff = find(folder)
    assert tradeoff.fastest("prefill", "llama", 0.95) == "adaskip"
    assert tradeoff.fastest("prefill", "llama", 1.01) is None


def test_runs_without_a_speed_and_unfinished_ones_are_named(folder):
    write_run(folder / "runs", Cell("llama", "e2e", "unified", 4), 0.5)
    write_run(folder / "runs", Cell("llama", "e2e", "skipdecode", 4), 0.5, num_samples=5, expected=12)
    missing = find(folder).missing
    assert missing == {NO_SPEED: ("llama-US-E2E/4-sublayers",), UNFINISHED: ("llama-SD-E2E/4-sublayers",)}


def test_a_missing_speed_file_is_one_line_with_the_command_that_makes_it(folder):
    (folder / "llama.json").unlink()
    with pytest.raises(
        ValueError, match=r"no measured speeds: .*llama\.json not found; .*adaskip bench --figure llama$"
    ):
        find(folder)


def test_other_files_and_results_without_the_full_model_are_refused(folder):
    write_speeds(folder / "llama.json", {("e2e", "adaskip", 4): 1.1}, full=False)
    with pytest.raises(ValueError, match="no entry of the full model"):
        find(folder)
    (folder / "llama.json").write_text("[]")
    with pytest.raises(ValueError, match="not a benchmark's result"):
        find(folder)


def test_figures_and_tables_are_written_and_twice_the_same(folder):
    first, second = (write_tradeoffs(find_all(folder), folder / name) for name in ("first", "second"))
    names = [f"{stem}.{kind}" for stem in ("tradeoff", "tradeoff_models") for kind in ("png", "svg")]
    names += ["tradeoff_measures.png", "tradeoff_measures.svg"]
    assert [path.name for path in first] == ["tradeoff.json", "tradeoff.md", "tradeoff_measures.md", *names]
    for one, other in zip(first, second, strict=True):
        assert one.read_bytes() == other.read_bytes()
    content = json.loads(first[0].read_text())
    assert {point["on_front"] for point in content["points"]} == {True, False}
    assert "| 12.5 %  | AdaSkip" in first[1].read_text()


def test_the_mean_of_ratios_agrees_with_the_ratio_for_one_group():
    pairs = [(0.2 * i, 1.0 + 0.1 * i) for i in range(12)]
    ours, single = mean_ratio_estimate([pairs]), ratio_estimate(*map(list, zip(*pairs, strict=True)))
    assert ours
    assert single
    assert ours.value == pytest.approx(single.value)
    assert ours.low == pytest.approx(single.low, abs=0.02)
    assert ours.high == pytest.approx(single.high, abs=0.02)
    assert mean_ratio_estimate([pairs, [(1.0, 0.0)]]) is None
