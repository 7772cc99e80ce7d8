"""eval/stories.py: what is said of saved losses, and that the study continues where it was stopped."""

from __future__ import annotations

import json

import pytest

from adaskip.models.loading import load_model
from adaskip.models.stories import STORIES, VARIABLE
from adaskip.studies.ablation import stories
from adaskip.studies.ablation.stories import COMPARED, StoriesConfig, find, measure
from tests.tiny_runs import make_checkpoint


def saved(calibrated: float) -> dict:
    """Losses of four stories: AdaSkip's mean is 2.5, the others' are larger."""
    losses = {name: [4.0, 5.0, 6.0, 7.0] for name in COMPARED} | {"adaskip": [1.0, 2.0, 3.0, 4.0]}
    losses["calibrated"] = [calibrated + loss for loss in losses["adaskip"]]
    cell = {"budget": 2, "plan": {"attention": [2], "ffn": [3]}, "losses": losses}
    phase = {"forwards": 900, "multiple": 12.3, "cells": [cell]}
    return {"manifest": {}, "full": [1.0, 1.0, 2.0, 2.0], "phases": {"decode": phase}}


@pytest.mark.parametrize(
    ("gap", "difference", "verdict"),
    [
        (-0.5, "-0.500 [-0.500, -0.500]", "better than AdaSkip"),
        (0.0, "+0.000 [+0.000, +0.000]", "equal to AdaSkip"),
        (0.25, "+0.250 [+0.250, +0.250]", "**worse than** AdaSkip"),
    ],
)
def test_calibrated_is_compared_with_the_best_of_the_others_story_by_story(gap, difference, verdict):
    text = find(saved(gap)).as_markdown()
    (row,) = [line for line in text.splitlines() if line.startswith("| decode")]
    assert [part.strip() for part in row.strip("|").split("|")] == [
        *("decode", "2", "5.500", "5.500", "5.500", "2.500", f"{2.5 + gap:.3f}"),
        *(difference, verdict),
    ]
    assert "4 stories the full model told itself (full model: 1.500)" in text
    assert "decode 900 forwards and 12 times its time" in text


def test_without_the_model_the_line_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    with pytest.raises(ValueError, match=f"{STORIES} is not available: {VARIABLE} must name the folder"):
        measure(StoriesConfig(output_dir=str(tmp_path)))
    assert not [path for path in tmp_path.iterdir() if path.suffix == ".json"]


@pytest.mark.slow
def test_a_stopped_study_continues_and_keeps_what_it_has(tmp_path, monkeypatch):
    """Of a random model's stories."""
    loaded = load_model(None, make_checkpoint(tmp_path / "model"), device="cpu", dtype="float32")
    monkeypatch.setattr(stories, "load_stories", lambda: loaded)
    monkeypatch.setattr(stories, "BUDGETS", (2,))
    config = StoriesConfig(stories=4, output_dir=str(tmp_path))
    measure(config)
    whole = json.loads(config.results_path.read_text())
    assert list(whole["phases"]) == ["prefill", "decode", "e2e"]
    config.results_path.write_text(json.dumps({**whole, "phases": {"prefill": whole["phases"]["prefill"]}}))
    measure(config)
    again = json.loads(config.results_path.read_text())
    assert again["phases"]["prefill"] == whole["phases"]["prefill"]
    assert {name: made["cells"] for name, made in again["phases"].items()} == {
        name: made["cells"] for name, made in whole["phases"].items()
    }
    with pytest.raises(ValueError, match="was measured with other stories, seed; give another --output-dir"):
        measure(StoriesConfig(stories=5, seed=1, output_dir=str(tmp_path)))
