"""`adaskip bench --keep-kv`: every strategy is timed with the K/V of the prompt kept, and the result says so."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from adaskip.common.configs import load_yaml
from adaskip.common.options import resolve
from adaskip.profiles.assumed import assumed_profile
from adaskip.roofline import Ceilings
from adaskip.studies.bench import measuring
from adaskip.studies.bench.bars import rows_of
from adaskip.studies.bench.measuring import run_bench
from adaskip.studies.bench.report import result_markdown
from adaskip.studies.bench.results import full_of
from adaskip.studies.bench.settings import BenchConfig, Cell, figure_settings
from adaskip.studies.bench.subject import Subject
from adaskip.studies.bench.trials import Trials
from tests.families import random_model
from tests.profiles import selection_of

LAYERS = 4
STRATEGIES = ("adaskip", "calibrated", "pop")
KEPT = {"keep_kv": True, "phases": ("prefill",), "strategies": STRATEGIES}


@pytest.fixture(scope="module")
def selection():
    return replace(selection_of(LAYERS, "prefill"), keep_kv=True)


@pytest.fixture
def config(monkeypatch, tmp_path, selection):
    """Makes configurations that are measured on a tiny model and saved in a temporary folder."""
    model = random_model("llama", LAYERS)
    subject = Subject(model, assumed_profile(LAYERS), "random", {("calibrated", "prefill"): selection})
    monkeypatch.setattr(measuring, "load_subject", lambda config: subject)
    monkeypatch.setattr(measuring, "measure_ceilings", lambda device, dtype: Ceilings("CPU", 1e10, 1e9, "of a test"))

    def make(**options) -> BenchConfig:
        small = {"device": "cpu", "random_weights": True, "prompt_tokens": (8,), "new_tokens": 4, "budgets": (2,)}
        return BenchConfig(**{**small, "rounds": 2, "output_dir": str(tmp_path), "name": "tiny", **options})

    return make


def test_every_strategy_fills_the_cache_of_all_layers_and_its_answers_are_the_full_models_work(config):
    outcome = run_bench(config(**KEPT))
    result, (workload,) = outcome.result, outcome.result.workloads
    skipping = [cell for cell in result.cells(workload) if cell.phase]
    assert {cell.name for cell in skipping} == {*STRATEGIES}
    full = result.of(workload, full_of(skipping[0]))[0]["kv_bytes"]
    for cell in skipping:
        for record in result.of(workload, cell):
            assert record["kv_bytes"] == full
            assert sum(sum(layers) for layers in record["prefill_shares"].values()) == 2
            assert not any(share for layers in record["decode_shares"].values() for share in layers)
        assert result.limit(workload, cell)["tpot_s"] == result.limit(workload, full_of(cell))["tpot_s"]
    page = result_markdown(result)
    assert "Calibrated's: prefill, none (2 prompts), for kept K/V." in page
    assert "Every strategy skips only while the prompt is read, up to its last token (`--keep-kv`)" in page
    assert all(not row.measured for row in rows_of([result]))  # the bars are for strategies without


def test_a_result_with_kept_kv_is_continued_by_no_other_and_identities_without_are_as_they_were(config, monkeypatch):
    assert "keep_kv" not in config().identity
    run_bench(config(**KEPT, rounds=1))
    monkeypatch.setattr(Trials, "strategy", lambda *args: None)
    with pytest.raises(ValueError, match=r"another keep_kv \(there True, now None\)"):
        run_bench(config(**{**KEPT, "keep_kv": False}))


def test_a_selection_for_kept_kv_is_refused_where_it_is_not_kept(config, monkeypatch):
    monkeypatch.setattr(Trials, "run", lambda *args: pytest.fail("ran"))
    with pytest.raises(ValueError, match="searched for sets that are skipped only while the prompt is read"):
        run_bench(config(phases=("prefill",), strategies=("calibrated",)))


@pytest.mark.parametrize("other", [{"phases": ("prefill", "e2e")}, {"phases": ("decode",)}, {"study": "window"}])
def test_kept_kv_is_timed_in_phase_prefill_alone(other):
    with pytest.raises(ValueError, match="--keep-kv needs --study strategies and --phases prefill; given: --study"):
        BenchConfig(**{"keep_kv": True, "phases": ("prefill",), **other})


def test_the_figure_of_smollm2_does_the_work_of_plain_prefill_with_kept_kv_and_its_own_selection():
    assert "smollm2_keep_kv" in load_yaml("bench")["real"]
    kept, plain = (
        resolve(BenchConfig, {"figure": n}, preset=figure_settings) for n in ("smollm2_keep_kv", "smollm2_prefill")
    )
    assert kept.selection == ("smollm2-selection-prefill-keep-kv",)
    differ = {"keep_kv": False, "selection": None, "strategies": ("pop",), "figure": plain.figure}
    assert replace(kept, **differ) == plain


@torch.no_grad()
def test_without_a_selection_calibrated_is_adaskip_with_kept_kv():
    subject = Subject(random_model("llama", LAYERS), assumed_profile(LAYERS), "random")
    strategy = Trials(subject, "wall", keep_kv=True).strategy(
        Cell("calibrated", "prefill", 2), measuring.Workload(8, 4)
    )
    assert strategy is not None
    assert strategy.name == "adaskip"
    assert strategy.is_prompt_only
