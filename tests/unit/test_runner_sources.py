"""Where a run's model and samples come from: one model in memory at a time, and a word where data is short."""

from __future__ import annotations

import logging
import weakref
from types import SimpleNamespace

import pytest

from adaskip.runs import sources
from adaskip.runs.config import SharedConfig
from tests.tiny_runs import NUM_CALIBRATION, make_data


class Model:
    """Holds itself in a circle, as a model with hooks does."""

    def __init__(self):
        self.itself = self


@pytest.fixture
def loads(monkeypatch):
    """The models that were asked for; loading one checks that the one before is gone."""
    asked, alive = [], []

    def load_model(name, **options):
        assert not [ref for ref in alive if ref() is not None], "the model before is still in memory"
        asked.append((name, options))
        loaded = SimpleNamespace(model=Model())
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(sources, "load_model", load_model)
    monkeypatch.setattr(sources, "_held", {})
    return asked


def test_a_model_is_let_go_of_before_the_next_is_loaded(loads):
    config = SharedConfig()
    for name in ("llama", "vicuna", "llama"):
        sources.load(config, name)
    sources.load(SharedConfig(dtype="bfloat16"), "llama")
    assert [name for name, _ in loads] == ["llama", "vicuna", "llama", "llama"]


def test_cells_of_one_model_share_it(loads):
    first = sources.load(SharedConfig(seed=1), "llama")
    assert sources.load(SharedConfig(seed=2, data_dir="x"), "llama") is first
    assert len(loads) == 1


def test_a_model_that_cannot_be_loaded_leaves_none_behind(monkeypatch, loads):
    sources.load(SharedConfig(), "llama")
    monkeypatch.setattr(sources, "load_model", lambda name, **options: (_ for _ in ()).throw(ValueError("no")))
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            sources.load(SharedConfig(), "vicuna")


def test_the_testbeds_models_have_their_own_limit_and_are_not_warned_of(loads):
    for testbed in (True, False):
        sources.load(SharedConfig(testbed=testbed), "llama")
    assert [options["max_prompt_tokens"] for _, options in loads] == [1280 - 512, None]


@pytest.fixture
def few(tmp_path):
    """Data with five samples to calibrate on."""
    lines = (make_data(tmp_path) / "qasper_e.jsonl").read_text().splitlines()
    (tmp_path / "qasper_e.jsonl").write_text("\n".join(lines[:5]))
    sources._warn_of_few.cache_clear()
    return SharedConfig(data_dir=str(tmp_path))


def test_fewer_calibration_samples_than_asked_for_are_told_once(few, caplog):
    for _ in range(2):
        assert len(sources.calibration_samples(few, NUM_CALIBRATION)) == 5
    line = "calibration on 5 samples of qasper instead of 20: the data has no more of over 4000 words"
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.WARNING, line)]


def test_enough_calibration_samples_are_nothing_to_tell(few, caplog):
    assert len(sources.calibration_samples(few, 3)) == 3
    assert not caplog.records
