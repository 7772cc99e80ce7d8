"""The observations' tests on planted similarities: they hold where they were made to, and only there."""

from __future__ import annotations

import csv
import json
import random

import numpy as np
import pytest
import torch
from pandas import DataFrame
from PIL import Image

from adaskip.calibration.measure import measure
from adaskip.studies.observations import figures, hit_rates, importance_check, similarity
from adaskip.studies.observations.hit_rates import chance_hits, hits
from adaskip.studies.observations.saved import (
    NotMeasuredError,
    chance_correlation,
    load_saved,
    most_similar,
    rank_correlation,
)
from adaskip.studies.observations.settings import ObserveConfig, Target
from adaskip.studies.study import Claim, Findings
from tests.families import random_model, random_prompts
from tests.saved_measurements import write_measured

DEPTH = 16
RISING = np.linspace(0.5, 0.98, DEPTH)
TREC, TRIVIA = Target("trec", "prefill"), Target("triviaqa", "prefill")


def verdicts(findings: Findings) -> list[str]:
    return [claim.verdict for claim in findings.claims]


def test_a_random_ranking_hits_what_chance_says():
    rng = np.random.default_rng(0)
    ranking, others = rng.random(DEPTH), rng.random((4000, DEPTH))
    for k in (2, 4, 10):
        assert np.mean(hits(ranking, others, k)) == pytest.approx(chance_hits(k, DEPTH), abs=0.06)


def test_random_rankings_stay_below_the_chance_correlation():
    rng = np.random.default_rng(0)
    rhos = [abs(rank_correlation(rng.random(DEPTH), rng.random(DEPTH))) for _ in range(2000)]
    assert np.mean(np.array(rhos) < chance_correlation(DEPTH)) == pytest.approx(0.95, abs=0.015)
    assert chance_correlation(2) == 1.0


def test_the_most_similar_come_first_and_of_equals_the_earlier_layer():
    assert most_similar(np.array([0.1, 0.9, 0.5, 0.9]), 3) == [1, 3, 2]
    assert rank_correlation(np.ones(4), np.arange(4)) == 0.0


@pytest.mark.parametrize(("holding", "verdict"), [(3, "holds"), (0, "does not hold"), (2, "holds in 2 of 3 cases")])
def test_a_claim_says_in_how_many_cases_it_holds(holding, verdict):
    assert Claim("x", holding, 3, "").verdict == verdict
    assert Claim("x", 0, 0, "").verdict == "not tested"


@pytest.mark.parametrize(("other", "expected"), [(RISING[::-1], "holds"), (RISING, "does not hold")])
def test_observation_1_asks_whether_models_differ(tmp_path, other, expected):
    for model, profile in (("llama", RISING), ("vicuna", other)):
        for target in (TREC, TRIVIA):
            write_measured(tmp_path, model, target, {"layer": profile}, noise=0.01)
    findings = similarity.find_layers(load_saved(tmp_path, [TREC, TRIVIA]), [TREC, TRIVIA])
    assert verdicts(findings) == [expected, "holds", expected]
    assert "llama: 15, 14, 13, 12, 11" in findings.claims[2].evidence


def test_models_of_different_depth_are_not_compared(tmp_path):
    write_measured(tmp_path, "llama", TREC, {"layer": RISING})
    write_measured(tmp_path, "vicuna", TREC, {"layer": RISING[:5]})
    findings = similarity.find_layers(load_saved(tmp_path, [TREC]), [TREC])
    assert verdicts(findings)[:2] == ["not tested", "not tested"]


@pytest.mark.parametrize(
    ("attention", "expected"),
    [
        (0.995 - 0.001 * np.arange(DEPTH), ["holds", "holds", "holds"]),
        (RISING, ["does not hold", "does not hold", "does not hold"]),
    ],
)
def test_observation_2_asks_whether_the_kinds_differ(tmp_path, attention, expected):
    write_measured(tmp_path, "llama", TREC, {"attention": attention, "ffn": RISING})
    assert verdicts(similarity.find_kinds(load_saved(tmp_path, [TREC]), [TREC])) == expected


@pytest.mark.parametrize(
    ("decode", "expected"),
    [
        (RISING + 0.01, ["holds", "holds", "holds", "holds"]),
        (RISING[::-1] - 0.5, ["does not hold", "does not hold", "does not hold", "does not hold"]),
    ],
)
def test_observation_3_asks_whether_the_phases_agree(tmp_path, decode, expected):
    targets = [TREC, Target("trec", "decode")]
    for target, profile in zip(targets, (RISING, decode), strict=True):
        write_measured(tmp_path, "llama", target, {"layer": profile})
    findings = similarity.find_phases(load_saved(tmp_path, targets), targets)
    assert verdicts(findings) == expected
    assert findings.numbers[0]["decoded_tokens"] == 5 * 60


def test_table_1_counts_hits_per_sample_beside_chance_and_the_paper(tmp_path):
    shuffled = RISING.copy()
    random.Random(0).shuffle(shuffled)
    write_measured(tmp_path, "llama", TRIVIA, {"attention": RISING, "ffn": RISING})
    target = Target("multi_news", "prefill")
    write_measured(tmp_path, "llama", target, {"attention": RISING, "ffn": shuffled})
    saved = load_saved(tmp_path, [TRIVIA, target])
    findings = hit_rates.find_offline(saved, [("triviaqa", "2wikimqa")], {"2wikimqa": "multi_news"})
    attention, ffn = findings.numbers
    assert [cell["ours"]["value"] for cell in attention["hits"]] == [4, 6, 10]
    assert [cell["chance"] for cell in attention["hits"]] == [1.0, 2.25, 6.25]
    assert [cell["paper"] for cell in attention["hits"]] == [3.79, 5.5, 9.68]
    expected = [len(set(most_similar(RISING, k)) & set(most_similar(shuffled, k))) for k in (4, 6, 10)]
    assert [cell["ours"]["value"] for cell in ffn["hits"]] == expected
    assert findings.table.iloc[0, 3] == "MultiNews (for 2WikiMQA)"


def test_table_2_leaves_out_requests_with_too_short_a_rest(tmp_path):
    target = Target("gov_report", "decode")
    write_measured(tmp_path, "llama", target, {"layer": RISING}, tokens=45, rest=RISING[::-1])
    findings = hit_rates.find_online(load_saved(tmp_path, [target]), ["gov_report"], [5, 20, 40])
    assert [row["samples"] for row in findings.numbers] == [5, 5, 0]  # 5 tokens after a window of 40 are too few
    assert [cell["ours"]["value"] for cell in findings.numbers[0]["hits"]] == [0, 0, 0]
    assert findings.numbers[2]["hits"][0]["ours"] is None
    assert findings.table.iloc[2, 4] == "-"
    assert findings.numbers[0]["hits"][0]["paper"] == 1.01


def test_a_shallow_model_has_no_hits_among_more_layers_than_it_has(tmp_path):
    target = Target("gov_report", "decode")
    write_measured(tmp_path, "small", target, {"layer": RISING[:5]})
    (row,) = hit_rates.find_online(load_saved(tmp_path, [target]), ["gov_report"], [5]).numbers
    assert [cell["ours"] is None for cell in row["hits"]] == [False, False, True]


def check_scores(most: list[float], least: list[float]) -> dict:
    def scores(value: float) -> dict:
        return {"trec": {"metric": "acc", "scores": [value] * 4}}

    by_layers = [{str(n): scores(value) for n, value in enumerate(values, 1)} for values in (most, least)]
    entry = {"num_layers": 16, "phase": "e2e", "full": scores(1.0), "sources": {}}
    return {"llama": {**entry, "most_skip": by_layers[0], "least_skip": by_layers[1]}}


def test_the_importance_check_compares_both_ends_of_the_ranking(tmp_path):
    check = check_scores(most=[0.9, 0.8], least=[0.1, 0.0])
    findings = importance_check.find(check)
    assert verdicts(findings) == ["holds", "holds", "holds"]
    assert list(findings.table.iloc[1, 2:]) == ["1", "90.0 [90.0, 90.0]", "10.0 [10.0, 10.0]"]
    assert verdicts(importance_check.find(check_scores([0.1, 0.0], [0.9, 0.8]))) == ["does not hold"] * 3
    for floor, verdict in ((0.2, "holds"), (1.0, "does not hold")):
        check["llama"]["floors"] = {"trec": {"empty answer": 0.0, "majority class": floor, "first sentence": None}}
        findings = importance_check.find(check)
        assert findings.claims[-1].verdict == verdict
        assert list(findings.table.iloc[-1, 2:]) == ["majority class", f"{100 * floor:.1f}", f"{100 * floor:.1f}"]
    assert [path.name for path in importance_check.draw(check, tmp_path)] == [
        "importance_check.png",
        "importance_check.svg",
    ]


def test_the_importance_check_compares_losses_where_they_are_measured(tmp_path):
    check = check_scores(most=[0.0, 0.0], least=[0.0, 0.0])
    entry = check["llama"]
    for found, loss in ((entry["full"], 2.0), (entry["most_skip"]["1"], 2.25), (entry["most_skip"]["2"], 2.5)):
        found["trec"]["losses"] = [loss] * 4
    entry["least_skip"]["1"]["trec"]["losses"] = entry["least_skip"]["2"]["trec"]["losses"] = [9.0] * 4
    findings = importance_check.find(check)
    claim = next(claim for claim in findings.claims if "less loss" in claim.text)
    assert (claim.verdict, claim.evidence) == ("holds", "On average 0.38 and 7.00 nats per token above the full model.")
    assert list(findings.table.iloc[1, 5:]) == ["+0.250 [+0.250, +0.250]", "+7.000 [+7.000, +7.000]"]
    importance_check.draw(check, tmp_path)
    with Image.open(tmp_path / "importance_check.png") as image:
        width, height = image.size
    importance_check.draw(check_scores([0.0, 0.0], [0.0, 0.0]), tmp_path)
    with Image.open(tmp_path / "importance_check.png") as image:
        assert (width, height) > image.size


def test_figures_have_a_panel_per_model_and_are_twice_the_same(tmp_path):
    targets = [TREC, Target("trec", "decode")]
    for model in ("llama", "internlm", "vicuna"):
        for target in targets:
            write_measured(tmp_path, model, target, {"attention": RISING, "ffn": RISING - 0.4}, noise=0.01)
    saved = load_saved(tmp_path, targets)
    assert list(saved) == ["llama", "internlm", "vicuna"]
    for name in ("first", "second"):
        figures.draw_layers(saved, targets[:1], tmp_path / name)
        figures.draw_kinds(saved, targets[:1], tmp_path / name)
        figures.draw_phases(saved, targets, tmp_path / name)
    for stem in ("ob1", "ob2", "ob3"):
        for kind in ("png", "svg"):
            one, other = (tmp_path / name / f"{stem}.{kind}" for name in ("first", "second"))
            assert one.read_bytes() == other.read_bytes()
        with Image.open(tmp_path / "first" / f"{stem}.png") as image:
            assert image.width > 1400


def test_the_axis_spreads_what_is_close_to_one_and_comes_back():
    values = np.array([-0.9, 0.0, 0.9, 0.99, 0.999])
    assert figures._backward(figures._forward(values)) == pytest.approx(values)
    assert np.diff(figures._forward(values[2:])) == pytest.approx([1, 1])


def test_unfinished_measurements_are_not_drawn(tmp_path):
    write_measured(tmp_path, "llama", TREC, {"layer": RISING}, finished=False)
    with pytest.raises(NotMeasuredError, match="no model with finished measurements of trec-prefill"):
        load_saved(tmp_path, [TREC])
    write_measured(tmp_path, "vicuna", TREC, {"layer": RISING})
    assert list(load_saved(tmp_path, [TREC])) == ["vicuna"]


def test_findings_are_written_as_text_table_and_numbers(tmp_path):
    claim = Claim("It does", 1, 2, "Half of it.")
    findings = Findings("ob9", "Title", ["A note."], [claim], DataFrame({"a": ["1"], "b": ["x, y"]}), {"a": 1.0})
    findings.write(tmp_path)
    text = (tmp_path / "ob9.md").read_text()
    assert "- **It does: holds in 1 of 2 cases.** Half of it." in text
    assert "![Title](ob9.png)" in text
    assert list(csv.reader((tmp_path / "ob9.csv").open())) == [["a", "b"], ["1", "x, y"]]
    assert json.loads((tmp_path / "ob9.json").read_text())["claims"][0]["verdict"] == "holds in 1 of 2 cases"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"models": ("lama",)}, "Did you mean 'llama'"),
        ({"tasks": ("trek",)}, "Did you mean trec"),
        ({"checkpoint": "x"}, "exactly one --model"),
        ({"max_prompt_tokens": 1}, "at least 2"),
        ({"limit": 0}, "--limit must be at least 1"),
    ],
)
def test_impossible_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ObserveConfig(**options)


def test_windows_are_the_sums_of_an_answers_first_tokens():
    """The naive twin: an answer that ends where the window does. The last new token is never an input."""
    model = random_model("llama")
    prompts = random_prompts([9, 5])
    for batch_size in (1, 2):
        options = {"phase": "decode", "batch_size": batch_size}
        whole = list(measure(model, prompts, max_new_tokens=9, windows=[3, 50], **options))
        short = list(measure(model, prompts, max_new_tokens=4, **options))
        for measured, twin in zip(whole, short, strict=True):
            assert int(measured.windows[3].tokens) == 3
            torch.testing.assert_close(measured.windows[3].sums, twin.sums)
            assert torch.equal(measured.windows[50].sums, measured.sums)
            assert int(measured.windows[50].tokens) == int(measured.tokens) == 8


@pytest.mark.parametrize(("phase", "windows"), [("prefill", [5]), ("decode", [0])])
def test_windows_are_of_decoded_tokens(phase, windows):
    with pytest.raises(ValueError, match="windows are numbers of decoded tokens"):
        list(measure(random_model("llama"), random_prompts([4]), phase=phase, windows=windows))
