"""What stands in for a skipped sublayer: the closed-form fits, the study's verdict, and that it continues."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from adaskip.plan import Affine, Sublayer
from adaskip.selection.compensation import StreamMoments, stream_moments
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
    with pytest.raises(ValueError, match="no token was seen"):
        StreamMoments().affine()
