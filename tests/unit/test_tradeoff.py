"""Score kept against measured speedup: points, Pareto front, counts, and what is said where something is missing."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

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


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Runs and speeds of two models, prefill and end to end."""
    made = tmp_path_factory.mktemp("written")
    for model in ("llama", "vicuna"):
        for phase in ("prefill", "e2e"):
            write_run(made / "runs", Cell(model, phase, "full", 0), 1.0)
            for (strategy, sublayers), quality in QUALITIES.items():
                write_run(made / "runs", Cell(model, phase, strategy, sublayers), quality)
        faster = 1.0 if model == "llama" else 1.1
        speedups = {(phase, *key): faster * x for key, x in SPEEDS.items() for phase in ("prefill", "e2e")}
        write_speeds(made / f"{model}.json", speedups)
    return made


@pytest.fixture
def folder(written, tmp_path):
    """A copy that a test may change."""
    return Path(shutil.copytree(written, tmp_path, dirs_exist_ok=True))


@pytest.fixture(scope="module")
def results(written):
    return load_results(written / "runs")


@pytest.fixture(scope="module")
def tradeoff(results, written):
    """That of scores kept."""
    return find(results, written)


def find(results, folder):
    """That of scores kept, with the speeds in `folder`."""
    return find_tradeoffs(results, [str(folder / "{model}.json")])[0]


def panel_of(tradeoff, phase, model):
    return {(point.strategy, point.fraction): point for point in tradeoff.panel(phase, model).itertuples()}


def test_a_point_is_the_mean_retention_against_the_measured_speedup(tradeoff, results):
    panel = panel_of(tradeoff, "e2e", "llama")
    assert panel["full", 0.0].speedup == panel["full", 0.0].value == 1.0
    assert panel["adaskip", 0.125].speedup == pytest.approx(1.1)
    cells = results.cell_of
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
    point = panel_of(find(load_results(folder / "runs"), folder), "e2e", "llama")["adaskip", 0.125]
    prompt, answer = FULL_TTFT_S, PHASE_STEPS * FULL_TPOT_S
    assert point.speedup == pytest.approx((prompt + answer) / (prompt + answer / 2))


def test_end_to_end_speedup_lies_between_those_of_prefill_and_decode_whatever_the_full_models_median_time(folder):
    """The ratios are to the runs beside a cell, which may be slower than the full model's median run."""
    content = json.loads((folder / "llama.json").read_text())
    for entry in content["entries"]:
        if (entry["phase"], entry["strategy"], entry["budget"]) == ("e2e", "adaskip", 4):
            entry |= {"ttft_s": 2.0, "tpot_s": 2.0, "speedup_prefill": 1.2, "speedup_decode": 1.3}
    (folder / "llama.json").write_text(json.dumps(content))
    point = panel_of(find(load_results(folder / "runs"), folder), "e2e", "llama")["adaskip", 0.125]
    assert point.speedup == pytest.approx((1.2 + PHASE_STEPS * 1.3) / (1 + PHASE_STEPS))


def test_two_results_of_one_name_are_refused(results, folder):
    (folder / "other").mkdir()
    shutil.copy(folder / "llama.json", folder / "other")
    shutil.copy(folder / "vicuna.json", folder / "other")
    with pytest.raises(ValueError, match="two results llama of llama; rename one"):
        find_tradeoffs(results, [str(folder / "{model}.json"), str(folder / "other" / "{model}.json")])
    with pytest.raises(ValueError, match=r"\{name\}\.json not found"):
        find_tradeoffs(results, [str(folder / "{name}.json")])


def test_the_front_holds_what_nothing_dominates(tradeoff):
    on_front = {key for key, point in panel_of(tradeoff, "prefill", "llama").items() if point.on_front}
    # 8 sublayers of Early Exit are slower than AdaSkip's and keep less; the full model is slower and keeps no more.
    assert on_front == {("adaskip", 0.125), ("early_exit", 0.125), ("adaskip", 0.25)}


def test_the_mean_over_models_is_geometric_in_speed(tradeoff):
    mean = panel_of(tradeoff, "prefill", None)
    assert mean["adaskip", 0.25].speedup == pytest.approx((1.25 * 1.375) ** 0.5)
    model = panel_of(tradeoff, "prefill", "llama")["adaskip", 0.25]
    assert mean["adaskip", 0.25].value == pytest.approx(model.value)  # both models answer alike here
    assert geometric_mean([0.5, 2.0]) == pytest.approx(1.0)


def test_fronts_are_counted_for_the_readme(tradeoff):
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
    assert fastest.endswith("number of panels out of 2 x 2: Early Exit 0, AdaSkip 4, the full model 0.")


def test_where_nothing_keeps_enough_the_full_model_is_the_fastest(tradeoff):
    assert tradeoff.fastest("prefill", "llama", 0.95) == "adaskip"
    assert tradeoff.fastest("prefill", "llama", 1.01) is None


def test_runs_without_a_speed_and_unfinished_ones_are_named(folder):
    write_run(folder / "runs", Cell("llama", "e2e", "unified", 4), 0.5)
    write_run(folder / "runs", Cell("llama", "e2e", "skipdecode", 4), 0.5, num_samples=5, expected=12)
    missing = find(load_results(folder / "runs"), folder).missing
    assert missing == {NO_SPEED: ("llama-US-E2E/4-sublayers",), UNFINISHED: ("llama-SD-E2E/4-sublayers",)}


def test_a_run_that_keeps_the_kv_has_the_speed_of_a_benchmark_that_does_and_no_other_run_has_it(folder):
    path = folder / "runs/llama-ADA-PREFILL/4-sublayers/manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "strategy_options": {"keep_kv": True}}))
    kept = write_speeds(folder / "kept.json", {("prefill", "adaskip", n): 1.05 for n in (4, 8)})
    content = json.loads(kept.read_text())
    kept.write_text(json.dumps({**content, "manifest": {"identity": {"keep_kv": True}}}))
    results, plain = load_results(folder / "runs"), str(folder / "{model}.json")
    assert "llama-ADA-PREFILL/4-sublayers" in find(results, folder).missing[NO_SPEED]
    panel = panel_of(find_tradeoffs(results, [str(kept), plain])[0], "prefill", "llama")
    assert panel["adaskip", 0.125].speedup == pytest.approx(1.05)
    assert panel["adaskip", 0.25].speedup == pytest.approx(1.25)
    lines = sentences(find_tradeoffs(results, [str(kept), plain])[0])
    assert "With keep_kv, skipping only while the prompt is read: AdaSkip." in lines
    assert (
        panel_of(find_tradeoffs(results, [str(kept), plain])[0], "prefill", None)
        .keys()
        .isdisjoint({("adaskip", 0.125)})
    )


def test_pop_has_the_speed_of_any_benchmark(folder):
    cell = Cell("llama", "prefill", "pop", 4)
    write_run(folder / "runs", cell, 0.5)
    path = cell.folder(folder / "runs") / "manifest.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "strategy_options": {"keep_kv": True}}))
    more = write_speeds(folder / "more.json", {("prefill", "pop", 4): 1.02})
    found = find_tradeoffs(load_results(folder / "runs"), [str(folder / "{model}.json"), str(more)])[0]
    assert panel_of(found, "prefill", "llama")["pop", 0.125].speedup == pytest.approx(1.02)


def test_a_missing_speed_file_is_one_line_with_the_command_that_makes_it(results, folder):
    (folder / "llama.json").unlink()
    with pytest.raises(
        ValueError, match=r"no measured speeds: .*llama\.json not found; .*adaskip bench --figure llama$"
    ):
        find(results, folder)


def test_other_files_and_results_without_the_full_model_are_refused(results, folder):
    write_speeds(folder / "llama.json", {("e2e", "adaskip", 4): 1.1}, full=False)
    with pytest.raises(ValueError, match="no entry of the full model"):
        find(results, folder)
    (folder / "llama.json").write_text("[]")
    with pytest.raises(ValueError, match="not a benchmark's result"):
        find(results, folder)


def test_figures_and_tables_are_written_and_twice_the_same(results, written, tmp_path):
    first, second = (
        write_tradeoffs(find_tradeoffs(results, [str(written / "{model}.json")]), tmp_path / name)
        for name in ("first", "second")
    )
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


@pytest.fixture
def smollm2(tmp_path):
    """A model that the paper has not: AdaSkip finished, Early Exit begun, Unified Skipping without a speed."""
    for name, quality, loss, options in (
        ("full", 0.9, 2.8, {}),
        ("adaskip", 0.7, 3.1, {}),
        ("early_exit", 0.2, 7.3, {"num_samples": 4, "expected": 12}),
        ("unified", 0.1, 6.2, {}),
    ):
        cell = Cell("smollm2", "decode", name, 0 if name == "full" else 8)
        write_run(tmp_path / "runs", cell, quality, num_layers=30, loss=loss, **options)
    speeds = {("decode", "adaskip", 8): 1.1, ("decode", "early_exit", 8): 1.2}
    write_speeds(tmp_path / "smollm2.json", speeds, prompt_tokens=(1024, 2048))
    return tmp_path


def test_fidelity_and_loss_have_points_of_any_model_and_of_unfinished_runs(smollm2):
    results = load_results(smollm2 / "runs")
    kept, fidelity, loss = find_tradeoffs(results, [str(smollm2 / "{model}.json")], 1024)
    assert [each.quality.name for each in (kept, fidelity, loss)] == ["kept", "fidelity", "loss_added"]
    assert {*kept.points["strategy"]} == {"full", "adaskip"}
    for tradeoff in (fidelity, loss):
        points = {point.strategy: point for point in tradeoff.panel("decode", "smollm2").itertuples()}
        assert {name: point.partial for name, point in points.items()} == {
            "full": False,
            "adaskip": False,
            "early_exit": True,
        }
        assert tradeoff.missing == {NO_SPEED: ("smollm2-US-DECODE/8-sublayers",)}
        assert [points[name].on_front for name in points] == [True, True, True]
    loss_of = {point.strategy: point.value for point in loss.panel("decode", "smollm2").itertuples()}
    assert loss_of == pytest.approx({"full": 0.0, "adaskip": 0.3, "early_exit": 4.5})
    cells = results.cell_of
    expected = sum(cells["decode", "smollm2", "adaskip", 8 / 60, t].fidelity for t in ("gov_report", "multi_news")) / 2
    (point,) = fidelity.panel("decode", "smollm2").query("strategy == 'adaskip'").itertuples()
    assert (point.value, point.speedup) == (pytest.approx(expected), pytest.approx(1.1))


def test_the_more_loss_at_less_speed_is_not_on_the_front(smollm2):
    write_speeds(smollm2 / "smollm2.json", {("decode", "adaskip", 8): 1.3, ("decode", "early_exit", 8): 1.2})
    *_, loss = find_tradeoffs(load_results(smollm2 / "runs"), [str(smollm2 / "{model}.json")])
    points = loss.panel("decode", "smollm2")
    assert {*points.loc[points["on_front"], "strategy"]} == {"full", "adaskip"}


def test_of_several_prompt_lengths_one_is_chosen(smollm2):
    results, pattern = load_results(smollm2 / "runs"), str(smollm2 / "{model}.json")
    _, fidelity, _ = find_tradeoffs(results, [pattern], 2048)
    assert fidelity.panel("decode", "smollm2").query("strategy == 'adaskip'")["speedup"].item() == pytest.approx(1.21)
    with pytest.raises(ValueError, match="has prompts of 1024, 2048 tokens: choose with --prompt-tokens"):
        find_tradeoffs(results, [pattern])
    with pytest.raises(ValueError, match="has no prompts of 512 tokens; it has 1024, 2048"):
        find_tradeoffs(results, [pattern], 512)


def test_a_strategys_speed_is_of_the_first_result_that_has_it(smollm2):
    patterns = [str(smollm2 / f"{{model}}{suffix}.json") for suffix in ("", "_more")]
    more = {("decode", "adaskip", 8): 9.0, ("decode", "unified", 8): 1.7}
    write_speeds(smollm2 / "smollm2_more.json", more, prompt_tokens=(1024, 2048))
    _, fidelity, _ = find_tradeoffs(load_results(smollm2 / "runs"), patterns, 1024)
    speedups = fidelity.panel("decode", "smollm2").set_index("strategy")["speedup"]
    assert (speedups["adaskip"], speedups["unified"]) == (pytest.approx(1.1), pytest.approx(1.7))
    assert not fidelity.missing
    told = (
        "Speedups of AdaSkip, Early Exit from smollm2; Unified Skipping from smollm2_more: each over the full model of"
    )
    assert any(line.startswith(told) for line in sentences(fidelity))


def test_a_model_whose_scores_are_at_their_floor_is_drawn_by_fidelity_and_loss_alone(smollm2):
    folder = Cell("smollm2", "decode", "full", 0).folder(smollm2 / "runs")
    for path in folder.glob("*.jsonl"):
        lines = [{**json.loads(line), "prediction": "zebra"} for line in path.open()]
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = find_tradeoffs(load_results(smollm2 / "runs"), [str(smollm2 / "{model}.json")], 1024)
    assert [each.quality.name for each in found] == ["fidelity", "loss_added"]
    written = {path.name: path for path in write_tradeoffs(found, smollm2)}
    assert list(written) == ["tradeoff_measures.md", "tradeoff_measures.png", "tradeoff_measures.svg"]
    assert "| AdaSkip    | **1.10, +0.300** [+0.300, +0.300] " in written["tradeoff_measures.md"].read_text()
    svg = written["tradeoff_measures.svg"].read_text()
    for text in ("fidelity", "loss above the full model", "unfinished run"):
        assert f"<!-- {text}" in svg
