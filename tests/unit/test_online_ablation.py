"""The ablation of online learning: what is compared with what, what is said of it, and that nothing runs to draw it."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict
from types import SimpleNamespace

import pytest
from pandas import DataFrame

from adaskip.models.stories import NOT_AT_HAND, STORIES
from adaskip.studies.ablation import online, online_findings
from adaskip.studies.ablation.online import AblationConfig, Variant, keep, mean_skipped, read, variants
from adaskip.studies.ablation.online_findings import COLUMNS, compare, find, main

NUM_SAMPLES = 12
OFF_4, OFF_6, ONLINE, IDLE = Variant(4), Variant(6), Variant(4, 20, 0.25), Variant(4, 20)


def samples(quality: float, skipped: float, added: int = 0) -> list[list]:
    """Qualities that differ from sample to sample in the same way in every variant."""
    return [[f"s{i}", quality + 0.01 * i, skipped, added, 10.0] for i in range(NUM_SAMPLES)]


def results(online: float, measure="score", skipped=5.0) -> dict:
    """Of one model: 4 sublayers offline keep 0.8 and 6 keep 0.4, so 5 keep 0.6; online learning keeps `online`."""
    by_variant = {
        OFF_4: samples(0.8, 4),
        OFF_6: samples(0.4, 6),
        ONLINE: samples(online, skipped, 2),
        IDLE: samples(0.8, 4),
    }
    saved = [{**asdict(variant), "samples": each} for variant, each in by_variant.items()]
    return {"measure": measure, "sources": {"checkpoint": "none"}, "variants": saved}


def frames(*models: dict) -> list:
    return [
        {
            Variant(v["sublayers"], v["window"], v["quantile"]): DataFrame(v["samples"], columns=list(COLUMNS))
            for v in model["variants"]
        }
        for model in models
    ]


@pytest.mark.parametrize(("online", "verdict"), [(0.7, "better"), (0.6, "within chance"), (0.5, "worse")])
def test_what_is_learnt_is_judged_against_as_many_sublayers_offline(online, verdict):
    compared = compare(frames(results(online)), ONLINE)
    assert compared.over_offline is not None
    assert compared.over_offline.value == pytest.approx(online - 0.6)
    assert compared.over_off.value == pytest.approx(online - 0.8)
    if verdict == "within chance":  # equal but for the last bits of the interpolation
        assert compared.over_offline.value == pytest.approx(0, abs=1e-12)
    else:
        assert compared.verdict == verdict


def test_a_window_that_never_fires_adds_nothing():
    compared = compare(frames(results(0.7)), IDLE)
    assert compared.verdict == "adds nothing"
    assert compared.fired == compared.over_off.value == 0


def test_nothing_is_extrapolated_beyond_the_offline_sets():
    compared = compare(frames(results(0.7, skipped=6.5)), ONLINE)
    assert compared.over_offline is None
    assert compared.verdict == "beyond the offline sets"


def test_models_are_matched_one_by_one():
    compared = compare(frames(results(0.7, skipped=4.0), results(0.7, skipped=6.0)), ONLINE)
    assert compared.over_offline is not None
    assert compared.over_offline.value == pytest.approx(((0.7 - 0.8) + (0.7 - 0.4)) / 2)


def test_models_are_taken_together_if_the_same_variants_were_run(tmp_path):
    deeper = results(0.7)
    for variant in deeper["variants"]:
        variant["sublayers"] *= 2
    saved = {"llama": results(0.7), "smollm2": deeper, "vicuna": results(0.6), STORIES: results(-1, "loss")}
    names = list(dict.fromkeys(row["models"] for row in find(saved).numbers))
    assert names == ["llama, vicuna", "smollm2", STORIES]


@pytest.mark.parametrize(("steps", "expected"), [(40, 4 + 3 * 20 / 40), (20, 4), (10, 4), (0, 4)])
def test_what_joined_counts_from_the_end_of_the_window(steps, expected):
    assert mean_skipped(Variant(4, 20), 3, steps) == pytest.approx(expected)


def test_the_measure_of_quality_is_named():
    found = find({"smollm2": results(-3.2, "reference_loss", skipped=5.0)})
    assert "Quality: negative loss of the reference answer, nats per token. More is better." in found.as_markdown()
    assert "0.855 [0.835, 0.874]" in found.as_markdown(), "nats, not per cent"


@pytest.mark.parametrize(("quality", "expected"), [("score", 1.0), ("reference_loss", -2.5)])
def test_quality_is_the_score_or_the_loss_of_the_reference(quality, expected, monkeypatch):
    record = {"id": "a", "new_tokens": 4, "online_ffns": [], "reference_loss": 2.5}
    fake_run(monkeypatch, record)
    config = AblationConfig(testbed=True, quality=quality)
    (first, *_) = online.read_runs(config, "llama")["variants"]
    assert first["samples"] == [["gov_report/a", expected, 0, 0, None]]


def test_records_without_a_loss_are_refused(monkeypatch):
    fake_run(monkeypatch, {"id": "a", "new_tokens": 4, "online_ffns": [], "reference_loss": None})
    with pytest.raises(ValueError, match="record 'a' has no reference loss; use --quality score"):
        online.read_runs(AblationConfig(testbed=True, quality="reference_loss"), "llama")


def fake_run(monkeypatch, record: dict) -> None:
    """Every run has this one record, of score 1."""
    scored = SimpleNamespace(records=SimpleNamespace(by_id={"a": record}), main=SimpleNamespace(by_id={"a": 1.0}))
    run = SimpleNamespace(manifest={"max_new_tokens": {"gov_report": 8}})
    monkeypatch.setattr(online, "load_run", lambda folder: run)
    monkeypatch.setattr(online, "score_run", lambda run: SimpleNamespace(tasks={"gov_report": scored}))


def test_the_verdict_is_in_words_and_names_what_is_missing():
    findings = find({"llama": results(0.7)})
    fires, helps, keeps = (claim.sentence for claim in findings.claims)
    assert (
        "the window adds FFNs: holds in 1 of 2 cases. At the paper's P = 20 and beta: in 0 % of the requests" in fires
    )
    assert "than as many sublayers chosen offline: holds." in helps
    assert "better beyond chance at P = 20 (q0.25); worse beyond chance at none" in helps
    assert "It costs quality beyond chance in 1 of 1." in keeps
    assert NOT_AT_HAND in findings.as_markdown()


def test_results_are_kept_whole_and_drawn_without_a_model(tmp_path, monkeypatch, capsys):
    config = AblationConfig(output_dir=str(tmp_path))
    kept = {"llama": results(0.7), STORIES: results(-1.5, "loss")}
    for name, each in kept.items():
        keep(config, {name: each})
    assert read(config) == kept
    monkeypatch.setattr(sys, "argv", ["online_ablation.py", "--draw-only", "--output-dir", str(tmp_path)])
    monkeypatch.setattr(online_findings.online, "measure", None)
    assert main("What it does.") == 0
    assert "stories260K: the window adds FFNs" in capsys.readouterr().out
    names = {path.name for path in tmp_path.glob("online_ablation.*")}
    assert names == {f"online_ablation.{kind}" for kind in ("md", "csv", "json", "png", "svg")}
    assert json.loads((tmp_path / "online_ablation.json").read_text())["sources"][STORIES] == {"checkpoint": "none"}


def test_drawing_what_was_not_measured_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["online_ablation.py", "--draw-only", "--output-dir", str(tmp_path / "none")])
    assert main("What it does.") == 2
    assert "does not exist; leave out --draw-only" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_variants_are_the_full_model_offline_budgets_and_every_p_and_beta():
    made = variants([4, 6], [5, 20], [0.5])
    assert [variant.label for variant in made] == [
        *("0-off", "4-off", "6-off", "4-P5-q0.5", "4-P5-paper", "4-P20-q0.5", "4-P20-paper")
    ]


@pytest.mark.parametrize(
    ("options", "line"),
    [({"windows": (0,)}, "at least 1 token"), ({"quantiles": (2.0,)}, "0 and 1"), ({"quality": "f1"}, "--quality")],
)
def test_impossible_options_are_refused(options, line):
    with pytest.raises(ValueError, match=line):
        AblationConfig(testbed=True, **options)
