"""Where a run's model and samples come from: one model in memory at a time, and a word where data is short."""

from __future__ import annotations

import json
import logging
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest

from adaskip.benchmarks import longbench
from adaskip.runs import loading, records
from adaskip.runs.calibrate_config import CalibrateConfig
from adaskip.runs.calibration import find_calibration
from adaskip.runs.config import RunConfig, SharedConfig
from adaskip.runs.loading import find_loading
from tests.tiny_runs import NUM_CALIBRATION, make_data


class Model:
    """Holds itself in a circle, as a model with hooks does."""

    def __init__(self):
        self.itself = self


@pytest.fixture
def loads(monkeypatch):
    """The models that were asked for; loading one checks that the one before is gone."""
    asked, alive = [], []

    def load_source(source, **options):
        assert not [ref for ref in alive if ref() is not None], "the model before is still in memory"
        asked.append((source.name, options))
        loaded = SimpleNamespace(model=Model())
        alive.append(weakref.ref(loaded.model))
        return loaded

    monkeypatch.setattr(loading, "load_source", load_source)
    monkeypatch.setattr(loading, "_held", {})
    return asked


def test_a_model_is_let_go_of_before_the_next_is_loaded(loads):
    config = SharedConfig()
    for name in ("llama", "vicuna", "llama"):
        find_loading(config, name).load()
    find_loading(SharedConfig(dtype="bfloat16"), "llama").load()
    assert [name for name, _ in loads] == ["llama", "vicuna", "llama", "llama"]


def test_cells_of_one_model_share_it(loads):
    first = find_loading(SharedConfig(seed=1), "llama").load()
    assert find_loading(SharedConfig(seed=2, data_dir="x"), "llama").load() is first
    assert len(loads) == 1


def test_a_model_that_cannot_be_loaded_leaves_none_behind(monkeypatch, loads):
    find_loading(SharedConfig(), "llama").load()
    monkeypatch.setattr(loading, "load_source", lambda source, **options: (_ for _ in ()).throw(ValueError("no")))
    for _ in range(2):
        with pytest.raises(ValueError, match="no"):
            find_loading(SharedConfig(), "vicuna").load()


def test_the_testbeds_models_have_their_own_limit_and_are_not_warned_of(loads):
    for testbed in (True, False):
        find_loading(SharedConfig(testbed=testbed), "llama").load()
    assert [options["max_prompt_tokens"] for _, options in loads] == [1280 - 512, None]


@pytest.fixture
def few(tmp_path):
    """Data with five samples to calibrate on."""
    lines = (make_data(tmp_path) / "qasper_e.jsonl").read_text().splitlines()
    (tmp_path / "qasper_e.jsonl").write_text("\n".join(lines[:5]))
    records._warn_of_few.cache_clear()
    return SharedConfig(data_dir=str(tmp_path))


def test_fewer_calibration_samples_than_asked_for_are_told_once(few, caplog):
    for _ in range(2):
        assert len(find_calibration(few, num_samples=NUM_CALIBRATION).samples) == 5
    line = "calibration on 5 samples of qasper instead of 20: the data has no more"
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [(logging.WARNING, line)]


def test_enough_calibration_samples_are_nothing_to_tell(few, caplog):
    assert len(find_calibration(few, num_samples=3).samples) == 3
    assert not caplog.records


@pytest.fixture
def kinds(tmp_path):
    """A folder of sets, by name: qasper's records of each have ids that tell them apart."""

    def make(*names: str) -> str:
        lines = (make_data(tmp_path / "made") / "qasper_e.jsonl").read_text().splitlines()
        (tmp_path / "data").mkdir()
        for name in names:
            renamed = [json.dumps({**json.loads(line), "_id": f"{name}-{n}"}) for n, line in enumerate(lines)]
            (tmp_path / "data" / f"{name}.jsonl").write_text("\n".join(renamed))
        longbench._kind_at_hand.cache_clear()
        return str(tmp_path / "data")

    (tmp_path / "made").mkdir()
    return make


@pytest.mark.parametrize(
    ("chosen", "there", "taken", "warned"),
    [
        ("plain", ("qasper", "qasper_e"), "qasper", False),
        ("extended", ("qasper", "qasper_e"), "qasper_e", False),
        ("auto", ("qasper", "qasper_e"), "qasper_e", False),
        ("plain", ("qasper_e",), "qasper_e", True),
        ("extended", ("qasper",), "qasper", True),
        ("auto", ("qasper",), "qasper", True),
    ],
)
def test_calibration_takes_the_kind_of_set_that_the_tasks_have(kinds, caplog, chosen, there, taken, warned):
    config = RunConfig(
        model="llama",
        phase="prefill",
        strategy="adaskip",
        data_dir=kinds(*there),
        longbench_set=chosen,
    )
    samples = find_calibration(config).samples
    assert {sample["_id"].split("-")[0] for sample in samples} == {taken}
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warned


@pytest.mark.parametrize("chosen", ["plain", "extended", "auto"])
def test_calibration_data_that_is_not_there_is_named_with_what_is(kinds, chosen):
    data = kinds("trec", "trec_e")
    config = CalibrateConfig(model="llama", data_dir=data, longbench_set=chosen)
    wanted = {"plain": "qasper", "extended": "qasper_e", "auto": "qasper_e or qasper"}[chosen]
    says = rf"to calibrate on qasper: {data} has no {wanted} \(\.jsonl\); it has: trec, trec_e; --profile takes"
    with pytest.raises(ValueError, match=says):
        _ = find_calibration(config).samples


def test_a_plain_set_without_long_records_is_refused_by_its_file_though_the_other_has_some(kinds):
    data = kinds("qasper", "qasper_e")
    lines = (Path(data) / "qasper.jsonl").read_text().splitlines()
    short = [json.dumps({**json.loads(line), "length": 3000}) for line in lines]
    (Path(data) / "qasper.jsonl").write_text("\n".join(short))
    config = CalibrateConfig(model="llama", data_dir=data, longbench_set="plain")
    with pytest.raises(ValueError, match=r"qasper\.jsonl holds no record of more than 4000 words"):
        _ = find_calibration(config).samples
