"""Runs with --keep-kv: the selection that they make and find, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from adaskip import cli
from adaskip.profiles.selection import SelectionProfile
from adaskip.runs import config, loading, profiles
from tests.tiny_runs import cell, error_of, records

pytestmark = pytest.mark.usefixtures("short_answers")
CALIBRATE = ["calibrate", "--model", "llama", "--select", "prefill"]
RUN = ["run", *cell("calibrated", "prefill", "3"), "--limit", "2"]


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """A search takes as long as it has samples."""
    setup = config.find_setup
    monkeypatch.setattr(
        config, "find_setup", lambda *given: replace(setup(*given), calibration_samples=3, search_samples=3)
    )


@pytest.fixture
def given(options) -> list[str]:
    """What `calibrate` and `run` are both given."""
    return options[: options.index("--max-new-tokens")]


def kept(tmp_path: Path) -> dict[str, SelectionProfile]:
    """The selections beside the runs, by the name of their file without its digits."""
    found = (tmp_path / "profiles").glob("llama-selection-*.json")
    return {path.name[: -len("-12345678.json")]: SelectionProfile.load(path) for path in found}


def test_a_run_uses_the_selection_searched_for_kept_kv_and_makes_it_if_missing(given, tmp_path, monkeypatch, capsys):
    assert cli.main([*CALIBRATE, "--keep-kv", "--up-to", "3", *given]) == 0
    (name, selection), *others = kept(tmp_path).items()
    cost = selection.cost
    assert f"{cost.num_forwards} forwards over {cost.num_tokens} tokens in " in (out := capsys.readouterr().out)
    assert f" s: {cost.num_forwards / cost.adaskip_forwards:.0f}, " in out
    assert " times AdaSkip's calibration; in " in out
    assert (name, selection.keep_kv, others) == ("llama-selection-prefill-keep-kv", True, [])
    assert selection.selected[2].plan.attention == selection.selected[2].plan.ffn == {2}  # the last layer is free
    assert selection.selected[2].divergence == 0.0
    with monkeypatch.context() as patched:
        patched.setattr(profiles, "select", lambda *args, **options: pytest.fail("searched again"))
        assert cli.main([*RUN, "--keep-kv", *given]) == 0
    folder = tmp_path / "runs/llama-CAL-PREFILL/3-sublayers"
    manifest = json.loads((folder / "manifest.json").read_text())
    assert Path(manifest["profile"]).name.startswith(f"{name}-")
    assert (manifest["strategy_options"], manifest["selection"]) == ({"keep_kv": True}, "searched with keep_kv")
    first = records(folder)
    path = tmp_path / "other"
    assert cli.main([*RUN, "--keep-kv", *given, "--output-dir", str(path / "runs")]) == 0
    assert kept(path)[name].selected == selection.selected
    assert records(path / "runs/llama-CAL-PREFILL/3-sublayers") == first


def test_runs_with_and_without_kept_kv_have_selections_of_their_own(given, tmp_path):
    assert cli.main([*CALIBRATE, "--up-to", "3", *given]) == 0
    assert cli.main([*CALIBRATE, "--up-to", "3", "--keep-kv", *given]) == 0
    found = kept(tmp_path)
    assert {name: selection.keep_kv for name, selection in found.items()} == {
        "llama-selection-prefill": False,
        "llama-selection-prefill-keep-kv": True,
    }
    assert found["llama-selection-prefill"].selected != found["llama-selection-prefill-keep-kv"].selected


def test_a_finished_run_with_another_selection_is_not_taken_for_one_with_that_for_kept_kv(given, tmp_path, capsys):
    assert cli.main([*CALIBRATE, "--up-to", "3", *given, "--output", str(tmp_path / "without.json")]) == 0
    without = ["--keep-kv", "--profile", str(tmp_path / "without.json"), *given]
    assert cli.main([*RUN, *without]) == 0
    assert cli.main([*RUN, *without]) == 0  # it is finished
    capsys.readouterr()
    assert cli.main([*RUN, "--keep-kv", *given]) == 2
    changes = 'selection was null, is "searched with keep_kv"; profile_given was true, is false'
    assert f"another configuration ({changes})" in error_of(capsys)


@pytest.mark.parametrize("budget", [["--budget", "3"], ["--target-speedup", "1.1", "--speedup-on", "L20"]])
def test_a_selection_for_kept_kv_is_refused_in_a_run_without_before_the_model_is_loaded(
    given, tmp_path, monkeypatch, capsys, budget
):
    path = str(tmp_path / "with.json")
    assert cli.main([*CALIBRATE, "--keep-kv", "--up-to", "3", *given, "--output", path]) == 0
    monkeypatch.setattr(loading, "load_source", lambda *arguments, **options: pytest.fail("a model was loaded"))
    monkeypatch.setattr(loading, "_held", {})
    capsys.readouterr()
    command = ["run", *cell("calibrated", "prefill", None), *budget, "--limit", "2", "--profile", path, *given]
    assert cli.main(command) == 2
    assert "searched for sets that are skipped only while the prompt is read; use it with keep_kv=True" in error_of(
        capsys
    )
    assert not (tmp_path / "runs").exists()


def test_a_selection_for_kept_kv_makes_no_plan_to_be_saved(given, tmp_path, monkeypatch, capsys):
    path = str(tmp_path / "with.json")
    assert cli.main([*CALIBRATE, "--keep-kv", "--up-to", "3", *given, "--output", path]) == 0
    monkeypatch.setattr(loading, "load_source", lambda *arguments, **options: pytest.fail("a model was loaded"))
    monkeypatch.setattr(loading, "_held", {})
    capsys.readouterr()
    named = given[: given.index("--output-dir")] + given[given.index("--output-dir") + 2 :]
    plan = ["plan", *cell("calibrated", "prefill", "3"), *named, "--profile", path, "--output", str(tmp_path / "plan")]
    assert cli.main(plan) == 2
    assert "use it with keep_kv=True (--keep-kv)" in error_of(capsys)
    assert not (tmp_path / "plan").exists()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ([], "--select None, --method search"),
        (["--select", "e2e"], "--select e2e, --method search"),
        (["--select", "prefill", "--method", "evopress"], "--select prefill, --method evopress"),
        (["--select", "prefill", "--method", "blockpruner"], "--select prefill, --method blockpruner"),
    ],
)
def test_kept_kv_is_searched_for_prefill_and_by_our_search_alone(given, tmp_path, capsys, more, told):
    assert cli.main(["calibrate", "--model", "llama", "--keep-kv", *given, *more]) == 2
    assert f"--keep-kv needs --select prefill and --method search; given: {told}" in error_of(capsys)
    assert not (tmp_path / "profiles").exists()


def test_a_shown_selection_says_that_it_is_for_kept_kv(given, tmp_path, capsys):
    path = str(tmp_path / "with.json")
    assert cli.main([*CALIBRATE, "--keep-kv", "--up-to", "1", *given, "--output", path]) == 0
    capsys.readouterr()
    assert cli.main(["show", path]) == 0
    assert "keep_kv  True" in capsys.readouterr().out
