"""Bootstrap intervals, against a plain loop and in the corners."""

from __future__ import annotations

import random
from dataclasses import astuple

import numpy as np
import pytest

from adaskip.common.intervals import RESAMPLES, mean, mean_estimate, mean_if_whole, ratio_estimate


@pytest.fixture
def samples() -> list[float]:
    draw = random.Random(3)
    return [draw.random() for _ in range(40)]


def test_interval_agrees_with_a_plain_loop(samples):
    draw = np.random.default_rng(1)
    means = [np.mean(draw.choice(samples, len(samples))) for _ in range(RESAMPLES)]
    estimate = mean_estimate(samples)
    assert estimate is not None
    assert [estimate.low, estimate.high] == pytest.approx(np.percentile(means, [2.5, 97.5]), abs=0.01)


def test_paired_ratio_agrees_with_a_plain_loop(samples):
    draw, full = np.random.default_rng(1), [0.2 + 0.7 * value for value in samples]
    picks = [draw.integers(0, len(samples), len(samples)) for _ in range(RESAMPLES)]
    ratios = [np.mean(np.take(samples, pick)) / np.mean(np.take(full, pick)) for pick in picks]
    estimate = ratio_estimate(samples, full)
    assert estimate is not None
    assert estimate.value == pytest.approx(np.mean(samples) / np.mean(full))
    assert [estimate.low, estimate.high] == pytest.approx(np.percentile(ratios, [2.5, 97.5]), abs=0.01)


def test_a_ratio_of_equal_samples_is_one_without_doubt(samples):
    estimate = ratio_estimate(samples, samples)
    assert estimate is not None
    assert astuple(estimate) == (1, 1, 1)


def test_the_same_samples_give_the_same_interval(samples):
    assert mean_estimate(samples) == mean_estimate(samples)


def test_no_samples_have_no_estimate():
    assert mean_estimate([]) is None
    assert ratio_estimate([], []) is None


def test_one_sample_has_a_mean_and_no_interval():
    estimate = mean_estimate([0.25])
    assert estimate is not None
    assert astuple(estimate) == (0.25, None, None)


def test_equal_samples_have_an_interval_of_no_width():
    estimate = mean_estimate([0.5] * 10)
    assert estimate is not None
    assert astuple(estimate) == (0.5, 0.5, 0.5)


def test_nothing_is_kept_of_nothing():
    assert ratio_estimate([0.5, 0.5], [0.0, 0.0]) is None


@pytest.mark.filterwarnings("error")
def test_a_ratio_whose_resamples_may_divide_by_zero_has_no_interval():
    estimate = ratio_estimate([0.5] * 5, [1.0, 0.0, 0.0, 0.0, 0.0])
    assert estimate is not None
    assert astuple(estimate) == (2.5, None, None)


def test_the_mean_does_not_depend_on_the_order(samples):
    assert mean(samples) == mean(samples[::-1]) == mean(sorted(samples))


def test_there_is_no_mean_over_what_happens_to_be_there():
    assert mean_if_whole([0.5, 1.0]) == 0.75
    assert mean_if_whole([0.5, None]) is None
    assert mean_if_whole([]) is None
