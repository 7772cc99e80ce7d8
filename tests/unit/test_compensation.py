"""What stands in for a skipped sublayer: the closed-form fits, the study's verdict, and that it continues."""

from __future__ import annotations

import json
import sys

import numpy as np
import pytest
import torch
from tqdm import tqdm

from adaskip.calibration.compensation import (
    AFFINE,
    LEAST_SQUARES,
    NONE,
    SCALE,
    SHIFT,
    StreamMoments,
    stream_moments,
)
from adaskip.core.plan import Affine, Sublayer
from adaskip.models.stories import NOT_AT_HAND
from adaskip.runs.config import SharedConfig
from adaskip.runs.loading import find_loading
from adaskip.studies.ablation import compensation
from adaskip.studies.ablation.compensation import (
    PHASES,
    RESULTS_FILE,
    CompensationConfig,
    Subject,
    main,
    measure_subject,
)
from adaskip.studies.ablation.compensation_findings import CHANCE, HARMS, HELPS, MIXED, best, find, verdict
from tests.families import random_model, random_prompts

TOKENS, WIDTH = 57, 6


@pytest.fixture
def stream() -> tuple[torch.Tensor, torch.Tensor]:
    """Input and output with a mean far from 0 and a noisy, channel-wise relation."""
    generator = torch.Generator().manual_seed(0)
    a = 20 + 3 * torch.randn(TOKENS, WIDTH, generator=generator)
    return a, a * torch.linspace(0.5, 1.5, WIDTH) - 4 + torch.randn(TOKENS, WIDTH, generator=generator)


def moments(a: torch.Tensor, b: torch.Tensor) -> StreamMoments:
    """Fed in two pieces."""
    found = StreamMoments()
    for rows in (slice(0, 20), slice(20, None)):
        found.add(a[rows][None], (b - a)[rows][None])
    return found


def test_affine_is_least_squares_per_channel(stream):
    a, b = (x.double().numpy() for x in stream)
    fitted = moments(*stream).affine()
    for channel in range(WIDTH):
        design = np.stack([a[:, channel], np.ones(TOKENS)], axis=1)
        (scale, shift), *_ = np.linalg.lstsq(design, b[:, channel], rcond=None)
        assert fitted.scale[channel] == pytest.approx(scale, rel=1e-5)
        assert fitted.shift[channel] == pytest.approx(shift, rel=1e-4)


def test_scale_is_least_squares_over_all_channels(stream):
    a, b = (x.double().numpy().reshape(-1) for x in stream)
    (scale,), *_ = np.linalg.lstsq(a[:, None], b, rcond=None)
    assert moments(*stream).least_squares_scale() == pytest.approx(scale, rel=1e-6)


def test_shift_is_least_squares_given_the_scale(stream):
    a, b = (x.double().numpy() for x in stream)
    expected, *_ = np.linalg.lstsq(np.ones((TOKENS, 1)), b - 1.2 * a, rcond=None)
    fitted = moments(*stream).shift(1.2)
    assert fitted.scale == (1.2,) * WIDTH
    assert fitted.shift == pytest.approx(expected[0], rel=1e-5)


def test_a_channel_that_never_varies_is_shifted():
    a = torch.full((3, 1), 2.0)
    assert moments(a.repeat(20, 1), a.repeat(20, 1) + 5).affine() == Affine((1.0,), (5.0,))


@torch.no_grad()
def test_moments_are_those_of_the_stream_around_each_sublayer():
    model, prompts = random_model("llama"), random_prompts([9, 14])
    found = stream_moments(model, prompts)
    assert len(found) == 2 * len(model.model.layers)
    streams = [model(prompt[None], output_hidden_states=True).hidden_states for prompt in prompts]
    for layer in range(len(model.model.layers) - 1):  # the last entry stands behind the final norm
        change = torch.cat([(stream[layer + 1] - stream[layer])[0] for stream in streams]).mean(dim=0)
        kinds = ("attention", "ffn")
        shifts = sum(torch.tensor(found[Sublayer(kind, layer)].shift(1.0).shift) for kind in kinds)
        torch.testing.assert_close(shifts, change)


def test_nothing_seen_is_nothing_fitted():
    with pytest.raises(ValueError, match="no tokens were added"):
        StreamMoments().affine()


def cells(*affine: float) -> list[dict]:
    """Cells of eight prompts whose divergence is about 1 under Eq. (3)'s scale, and about `affine` of it."""
    scale = [0.9 + 0.02 * i for i in range(8)]
    others = {name: [x + 0.1 * (-1) ** i for i, x in enumerate(scale)] for name in (NONE, LEAST_SQUARES, SHIFT)}
    noise = [0.01 * (-1) ** i for i in range(8)]
    return [
        {
            **{"phase": "decode", "sublayers": 4 + i, "plan": {}},
            "divergences": {
                SCALE: scale,
                AFFINE: [x * factor + e for x, e in zip(scale, noise, strict=True)],
                **others,
            },
        }
        for i, factor in enumerate(affine)
    ]


@pytest.mark.parametrize(
    ("affine", "expected"), [((0.5, 1.0), HELPS), ((1.5, 1.0), HARMS), ((0.5, 1.1), MIXED), ((1.0, 1.0), CHANCE)]
)
def test_verdict_on_a_model(affine, expected):
    measured = cells(*affine)
    assert verdict(measured, AFFINE) == expected
    assert verdict(measured, NONE) == CHANCE
    assert best(measured) == (AFFINE if expected == HELPS else SCALE)


@pytest.mark.parametrize(("second", "choice"), [(0.9, AFFINE), (1.0, SCALE)])
def test_only_what_helps_on_every_model_is_kept(second, choice):
    results = {"llama": {"sources": {}, "cells": cells(0.5)}, "vicuna": {"sources": {}, "cells": cells(second)}}
    assert best(*(each["cells"] for each in results.values())) == choice
    findings = find(results)
    assert NOT_AT_HAND in findings.as_markdown()
    (claim,) = [claim for claim in findings.claims if claim.text.startswith("Affine")]
    assert claim.holding == (2 if choice == AFFINE else 1)
    assert "llama: helps (-50.0 % [" in claim.evidence


def tiny_subject(seed: int = 0) -> Subject:
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, 90, (12,), generator=generator) for _ in range(8)]
    loaded = find_loading(SharedConfig(testbed=True, device="cpu"), "llama").load()
    return Subject(loaded, prompts[:2], dict.fromkeys(PHASES, prompts[2:]), [2], [])


def test_a_study_continues_and_never_mixes(tmp_path, monkeypatch, capsys):
    path, bar = tmp_path / RESULTS_FILE, tqdm(disable=True)
    measure_subject(path, "llama", tiny_subject(), bar)
    whole = json.loads(path.read_text())
    assert [cell["phase"] for cell in whole["llama"]["cells"]] == ["prefill", "decode"]
    path.write_text(json.dumps({"llama": {**whole["llama"], "cells": whole["llama"]["cells"][:1]}}))
    measure_subject(path, "llama", tiny_subject(), bar)
    assert json.loads(path.read_text()) == whole
    with pytest.raises(ValueError, match="measured with other prompts_fingerprint"):
        measure_subject(path, "llama", tiny_subject(seed=1), bar)

    monkeypatch.setattr(compensation, "stream_moments", None)
    measure_subject(path, "llama", tiny_subject(), bar)  # nothing is missing
    monkeypatch.setattr(sys, "argv", ["compensation.py", "--draw-only", "--output-dir", str(tmp_path)])
    assert main("What it does.") == 0
    assert "Kept as the default" in capsys.readouterr().out
    assert {p.suffix for p in tmp_path.glob("compensation.*")} == {".md", ".csv", ".json"}


def test_drawing_what_was_not_measured_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["compensation.py", "--draw-only", "--output-dir", str(tmp_path / "none")])
    assert main("What it does.") == 2
    assert "does not exist; leave out --draw-only" in capsys.readouterr().err


def test_one_prompt_is_refused():
    with pytest.raises(ValueError, match="at least 2, not 1"):
        CompensationConfig(testbed=True, held_out=1)
