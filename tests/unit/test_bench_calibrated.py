"""Strategy calibrated in the benchmark: where its selections come from, and what it costs without one."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from adaskip.cli import main
from adaskip.common import named_files
from adaskip.core.fingerprint import weights_fingerprint
from adaskip.models.loading import load_model
from adaskip.runs import profiles
from adaskip.runs.config import RunConfig
from adaskip.runs.job import resolve
from adaskip.strategies import AdaSkip, CalibratedSkip
from adaskip.studies.bench import subject as subject_module
from adaskip.studies.bench.settings import WINDOWLESS, BenchConfig, Cell, Workload
from adaskip.studies.bench.subject import Subject, load_subject
from adaskip.studies.bench.trials import Trials
from adaskip.testbed import checkpoint_dir
from tests.profiles import profile_of, selection_of

LAYERS = 16
WORKLOAD = Workload(8, 4)


@pytest.fixture(scope="module")
def llama():
    return load_model("llama", checkpoint_dir("llama"), device="cpu", chat="none")


@pytest.fixture
def here(monkeypatch, tmp_path, away, llama):
    """A folder of its own, where nothing is searched or calibrated."""
    measured = replace(profile_of([0.9] * LAYERS, [0.9] * LAYERS), weights_fingerprint=weights_fingerprint(llama.model))
    monkeypatch.setattr(profiles, "search_selection", lambda *args, **options: pytest.fail("searched"))
    monkeypatch.setattr(profiles, "measure_importance", lambda *args: measured)
    return tmp_path


def config_of(**options) -> BenchConfig:
    return BenchConfig(**{"testbed": True, "phases": ("prefill",), "device": "cpu", **options})


def strategy_of(subject: Subject, name: str, phase: str = "prefill"):
    return Trials(subject, "wall").strategy(Cell(name, phase, 4), WORKLOAD)


def selection_for(llama, phase):
    return replace(selection_of(LAYERS, phase), weights_fingerprint=weights_fingerprint(llama.model))


def test_the_testbed_skips_by_the_selection_that_the_grid_keeps(here, llama):
    kept = {}
    for phase in ("prefill", "decode"):
        cell = RunConfig(testbed=True, model="llama", phase=phase, strategy="calibrated")
        kept["calibrated", phase] = selection_for(llama, phase)
        path = kept["calibrated", phase].save(profiles.kept_path(resolve(cell), llama))
        assert path.parent.as_posix().endswith("results/testbed/profiles")
    subject = load_subject(config_of(phases=("prefill", "decode")))
    assert subject.selections == kept
    assert strategy_of(subject, "calibrated").skipped == kept["calibrated", "prefill"].selected[4].plan


def test_a_missing_selection_is_searched_once_and_kept(here, llama, monkeypatch):
    searched = []

    def search(loaded, phase, *args, **options):
        searched.append(phase)
        return selection_for(llama, phase)

    monkeypatch.setattr(profiles, "search_selection", search)
    assert load_subject(config_of()).selections == load_subject(config_of()).selections
    assert searched == ["prefill"]
    assert len(list((here / "results/testbed/profiles").glob("llama-selection-prefill-*.json"))) == 1


def test_a_named_selection_takes_the_place_of_the_kept_one(here, llama, monkeypatch):
    named = selection_for(llama, "prefill")
    monkeypatch.setattr(named_files, "PUBLISHED", here)
    path = named.save(here / "my-selection.json")
    for name in (str(path), "my-selection"):
        subject = load_subject(config_of(selection=(name,)))
        assert subject.selections == {("calibrated", "prefill"): named}
        assert subject.describe()["selections"] == {"prefill": "none (2 prompts)"}


@pytest.mark.parametrize(
    "options", [{"study": "overhead"}, {"strategies": ("adaskip",)}], ids=["another study", "not asked for"]
)
def test_nothing_is_searched_where_calibrated_is_not_timed(here, options):
    assert load_subject(config_of(**options)).selections == {}


def test_without_a_selection_calibrated_is_adaskip_without_its_window_and_the_result_says_so(monkeypatch):
    small = {**subject_module.SMALL_SHAPE, "hidden_size": 40, "intermediate_size": 64, "vocab_size": 64}
    monkeypatch.setattr(subject_module, "SMALL_SHAPE", small)
    subject = load_subject(BenchConfig(model="llama-100m", random_weights=True, device="cpu"))
    calibrated = strategy_of(subject, "calibrated", "e2e")
    assert isinstance(calibrated, AdaSkip)
    assert calibrated == strategy_of(subject, WINDOWLESS, "e2e")
    assert calibrated.window_tokens == 0
    assert subject.describe()["selections"] == {"e2e": "AdaSkip's sets"}


def test_a_selection_of_another_depth_is_refused(here, monkeypatch):
    small = {**subject_module.SMALL_SHAPE, "hidden_size": 40, "intermediate_size": 64, "vocab_size": 64}
    monkeypatch.setattr(subject_module, "SMALL_SHAPE", small)
    path = str(selection_of(LAYERS, "e2e").save(here / "e2e.json"))
    subject = load_subject(BenchConfig(model="llama-100m", random_weights=True, device="cpu", selection=(path,)))
    with pytest.raises(ValueError, match="has 16 layers, but the model has 12"):
        strategy_of(subject, "calibrated", "e2e")


def test_a_budget_beyond_the_selection_is_refused(here, llama):
    whole = selection_for(llama, "prefill")
    path = replace(whole, selected={n: whole.selected[n] for n in range(1, 5)}).save(here / "named.json")
    subject = load_subject(config_of(selection=(str(path),)))
    assert isinstance(strategy_of(subject, "calibrated"), CalibratedSkip)
    with pytest.raises(ValueError, match=r"of up to 4 sublayers, budget .* needs 6"):
        Trials(subject, "wall").strategy(Cell("calibrated", "prefill", 6), WORKLOAD)


def test_a_selection_of_a_phase_that_is_not_timed_or_given_twice_is_one_line(here, llama, capsys):
    paths = [str(selection_for(llama, "prefill").save(here / name)) for name in ("a.json", "b.json")]
    common = ["bench", "--testbed", "--device", "cpu", "--strategies", "calibrated"]
    for phases, given in ((["decode"], paths[:1]), (["prefill"], paths)):
        assert main([*common, "--phases", *phases, "--selection", *given]) == 2
        line = capsys.readouterr().err
        assert re.fullmatch(
            r"error: --selection \S+ is for phase prefill; give at most one for each of --phases .*\n", line
        )
    assert main([*common, "--selection", "missing.json"]) == 2
    assert "--selection missing.json does not exist" in capsys.readouterr().err
    assert main(["bench", "--testbed", "--strategies", "adaskip", "--selection", paths[0]]) == 2
    assert "--selection needs --study strategies with strategy calibrated" in capsys.readouterr().err


def test_a_selection_of_another_method_is_for_its_strategy_in_every_phase_it_fits(here, llama):
    made = {name: selection_of(LAYERS, "decode", name) for name in ("blockpruner", "evopress")}
    paths = {
        name: str(replace(each, weights_fingerprint=weights_fingerprint(llama.model)).save(here / f"{name}.json"))
        for name, each in made.items()
    }
    options = {"testbed": False, "checkpoint": str(checkpoint_dir("llama")), "phases": ("prefill", "decode")}
    subject = load_subject(config_of(**options, strategies=("blockpruner",), selection=(paths["blockpruner"],)))
    for phase in options["phases"]:
        assert strategy_of(subject, "blockpruner", phase).skipped == made["blockpruner"].selected[4].plan
    assert subject.describe()["peer_selections"].keys() == {"blockpruner, prefill", "blockpruner, decode"}
    for given, message in (
        ({"strategies": ("evopress",), "selection": (paths["evopress"],)}, "needs a --selection for phase prefill"),
        ({"strategies": ("evopress",)}, "calibrate --select prefill --method evopress makes one"),
        ({"strategies": ("calibrated",), "selection": (paths["evopress"],)}, "made with method evopress, which no"),
    ):
        with pytest.raises(ValueError, match=message):
            load_subject(config_of(**{**options, **given}))
