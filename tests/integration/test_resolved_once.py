"""What a run reads of its files and weights is read once, however many samples it has."""

from __future__ import annotations

from collections import Counter

import pytest

from adaskip import cli
from adaskip.benchmarks import longbench
from adaskip.core import fingerprint, same_model
from adaskip.models import checkpoints, loading, source
from adaskip.runs import loading as held
from adaskip.runs import records
from tests.tiny_runs import cell

WATCHED = {
    "folder": [(checkpoints, "find_folder"), (source, "find_folder")],
    "architecture": [(source, "read_architecture")],
    "weights": [(module, "weights_fingerprint") for module in (fingerprint, same_model, loading)],
    "weight files": [(module, "weight_files_fingerprint") for module in (source, loading)],
    "calibration": [(longbench.LongBench, "calibration_records")],
}


@pytest.fixture
def counted(monkeypatch) -> Counter:
    """How often each thing was worked out."""
    calls: Counter = Counter()
    monkeypatch.setattr(held, "_held", {})
    records._read.cache_clear()

    def watch(what, place, name):
        original = getattr(place, name)

        def call(*arguments, **options):
            calls[what] += 1
            return original(*arguments, **options)

        monkeypatch.setattr(place, name, call)

    for what, places in WATCHED.items():
        for place, name in places:
            watch(what, place, name)
    return calls


@pytest.mark.parametrize("strategy", ["adaskip", "early_exit", "calibrated"])
def test_a_run_of_three_samples_resolves_everything_once(options, counted, strategy):
    assert cli.main(["run", *cell(strategy), *options, "--limit", "3"]) == 0
    calibration = {} if strategy == "early_exit" else {"calibration": 1}
    assert counted == {"folder": 1, "architecture": 1, "weights": 1, "weight files": 1, **calibration}
