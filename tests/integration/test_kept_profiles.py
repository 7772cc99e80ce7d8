"""One place for profiles: what `adaskip calibrate` makes a run finds, and the other way round; what differs is told."""

from __future__ import annotations

import json
import logging
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaForCausalLM

from adaskip import cli
from adaskip.calibration.measure import calibrate
from adaskip.calibration.select import select
from adaskip.runs import config, profiles
from tests.tiny_runs import cell, error_of

pytestmark = pytest.mark.usefixtures("short_answers")


@pytest.fixture
def given(options) -> list[str]:
    """What `calibrate` and `run` are both given."""
    return options[: options.index("--max-new-tokens")]


@pytest.fixture
def measured(monkeypatch) -> list[str]:
    """What was measured, in order."""
    calls: list[str] = []

    def noted(name, original):
        def call(*arguments, **options):
            calls.append(name)
            return original(*arguments, **options)

        return call

    monkeypatch.setattr(profiles, "select", noted("selection", select))
    monkeypatch.setattr(profiles, "calibrate", noted("importance", calibrate))
    return calls


@pytest.fixture(autouse=True)
def few_samples(monkeypatch):
    """A search takes as long as it has samples; three show what the setup's twenty would."""
    setup = config.find_setup
    monkeypatch.setattr(
        config, "find_setup", lambda *given: replace(setup(*given), calibration_samples=3, search_samples=3)
    )


METHODS = ("cosine_window", "blockpruner", "evopress")
CALIBRATE = {"adaskip": [], "calibrated": ["--select", "decode"]}
CALIBRATE |= {method: ["--select", "decode", "--method", method] for method in METHODS}
MEASURED = {
    "adaskip": ["importance"],
    "calibrated": ["importance", "selection"],
    **{method: ["selection"] for method in METHODS},
}


@pytest.mark.parametrize("strategy", CALIBRATE)
@pytest.mark.parametrize("first", ["calibrate", "run"])
def test_what_one_command_measures_the_other_finds(given, measured, tmp_path, strategy, first):
    commands = {
        "calibrate": ["calibrate", "--model", "llama", *CALIBRATE[strategy], *given],
        "run": ["run", *cell(strategy), *given, "--limit", "1", "--max-new-tokens", "4"],
    }
    for name in (first, *(commands.keys() - {first})):
        assert cli.main(commands[name]) == 0
        assert sorted(measured) == sorted(MEASURED[strategy])
    assert len(list((tmp_path / "profiles").iterdir())) == len(MEASURED[strategy])


@pytest.mark.parametrize(("method", "searches"), [("cosine_window", 1), ("blockpruner", 1), ("evopress", 2)])
def test_sets_that_are_the_same_in_all_phases_are_made_once(given, measured, tmp_path, method, searches):
    for phase in ("decode", "e2e"):  # of the same tasks
        argv = ["run", *cell(method, phase), *given, "--limit", "1", "--max-new-tokens", "4"]
        assert cli.main(argv) == 0
    assert measured == ["selection"] * searches
    names = {path.name[: -len("-12345678.json")] for path in (tmp_path / "profiles").iterdir()}
    assert names == ({f"llama-{method}"} if searches == 1 else {"llama-evopress-decode", "llama-evopress-e2e"})


def test_evopress_searches_for_an_unusual_budget_alone_and_a_run_finds_it(given, measured, tmp_path, capsys):
    assert cli.main(["calibrate", "--model", "llama", *CALIBRATE["evopress"], *given, "--budgets", "4"]) == 0
    assert "  4 sublayers  KL " in capsys.readouterr().out
    for budget, searches in (("4", 1), ("2", 2)):
        argv = ["run", *cell("evopress", budget=budget), *given, "--limit", "1", "--max-new-tokens", "4"]
        assert cli.main(argv) == 0
        assert measured == ["selection"] * searches
    sets = [json.loads(path.read_text())["selected"].keys() for path in (tmp_path / "profiles").iterdir()]
    assert sorted(map(list, sets)) == [["2"], ["4"]]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--method", "evopress"], "--method evopress needs --select"),
        (["--select", "decode", "--method", "greedy"], "unknown --method 'greedy'"),
        (["--select", "decode", "--effort", "1"], "--effort for evopress, not for search"),
        (
            [*CALIBRATE["blockpruner"], "--budgets", "2"],
            "--budgets are for --method evopress and --refine, --effort for evopress, not for blockpruner",
        ),
        ([*CALIBRATE["evopress"], "--up-to", "2"], "give --budgets instead of --up-to"),
        ([*CALIBRATE["evopress"], "--budgets", "3"], "makes sets of multiples of 2 sublayers"),
        ([*CALIBRATE["evopress"], "--effort", "-1"], "effort must be above 0 and at most 10; got -1"),
        ([*CALIBRATE["cosine_window"], "--up-to", "1"], "makes sets of multiples of 2 sublayers"),
    ],
)
def test_options_that_do_not_fit_the_method_are_refused(given, measured, tmp_path, capsys, more, message):
    assert cli.main(["calibrate", "--model", "llama", *given, *more]) == 2
    assert message in error_of(capsys)
    assert not measured
    assert not (tmp_path / "profiles").exists()


def test_a_search_leaves_the_importance_that_strategy_adaskip_uses(given, measured):
    assert cli.main(["calibrate", "--model", "llama", "--select", "decode", *given]) == 0
    measured.clear()
    assert cli.main(["run", *cell("adaskip"), *given, "--limit", "1", "--max-new-tokens", "4"]) == 0
    assert not measured


@pytest.mark.parametrize(
    ("strategy", "other", "what"),
    [
        ("adaskip", ["--samples", "2"], "data ids"),
        ("adaskip", ["--attn-implementation", "eager"], "attn implementation"),
        ("calibrated", ["--up-to", "1"], "up to"),
        ("calibrated", ["--tasks", "trec", "triviaqa"], "dataset, data ids"),
    ],
)
def test_a_profile_of_other_settings_is_not_taken_and_the_run_says_what_differs(
    given, measured, caplog, tmp_path, strategy, other, what
):
    assert cli.main(["calibrate", "--model", "llama", *CALIBRATE[strategy], *given, *other]) == 0
    measured.clear()
    caplog.clear()
    assert cli.main(["run", *cell(strategy), *given, "--limit", "1", "--max-new-tokens", "4"]) == 0
    assert MEASURED[strategy][-1] in measured
    told = [record for record in caplog.records if "is made now" in record.getMessage()]
    assert told[0].levelno == logging.WARNING
    assert f"beside it was made with other {what}; --profile takes it as it is" in told[0].getMessage()


def test_selections_by_time_have_files_of_their_own_which_runs_take_only_if_told_to(
    given, measured, caplog, tmp_path, capsys
):
    plain = ["calibrate", "--model", "llama", *CALIBRATE["calibrated"], "--up-to", "2", *given]
    by_time = [*plain, "--faster-at", "4096", "--speedup-on"]
    for argv in ([*by_time, "L20"], plain, [*by_time, "A100"], [*by_time, "L20"]):
        assert cli.main(argv) == 0
    assert measured == ["importance", *["selection"] * 3]  # the last one was found
    found = sorted((tmp_path / "profiles").glob("llama-selection-*.json"))
    names = sorted(path.name[: -len("-12345678.json")] for path in found)
    assert names == ["llama-selection-decode", *["llama-selection-decode-faster-at-4096"] * 2]
    settings = [json.loads(path.read_text())["settings"] for path in found]
    recorded = {"faster_at": 4096, "new_tokens": 512}
    expected = [{**recorded, "tflops": 119.5, "gb_s": 864.0}, {**recorded, "tflops": 312.0, "gb_s": 2039.0}]
    assert sorted(settings, key=str) == sorted([{}, *expected], key=str)
    (told,) = [record.getMessage() for record in caplog.records if "is made now" in record.getMessage()]
    assert "faster-at-4096" in told.split(": ")[1]  # the other device's is named, the plain one is something else
    kept = next(path for path, of in zip(found, settings, strict=True) if of == expected[0])
    capsys.readouterr()
    assert cli.main(["show", str(kept)]) == 0
    assert "faster_at   4096\n" in capsys.readouterr().out
    manifest = tmp_path / "runs/llama-CAL-DECODE/2-sublayers/manifest.json"
    run = ["run", *cell("calibrated"), *given, "--limit", "1", "--max-new-tokens", "4"]
    for more, faster_at in (([], None), (["--profile", str(kept)], 4096)):
        assert cli.main([*run, *more]) == 0
        used = json.loads(manifest.read_text())["profile"]
        shutil.rmtree(manifest.parent)
        assert json.loads(Path(used).read_text())["settings"].get("faster_at") == faster_at
    assert measured == ["importance", *["selection"] * 3]


def test_a_refined_selection_is_written_to_its_file_alone_and_taken_by_runs(given, tmp_path, capsys):
    made, refined = tmp_path / "made.json", tmp_path / "refined.json"
    plain = ["calibrate", "--model", "llama", *given]
    assert cli.main([*plain, *CALIBRATE["calibrated"], "--up-to", "2", "--output", str(made)]) == 0
    kept = sorted((tmp_path / "profiles").iterdir())
    at = plain.index("--output-dir")
    refine = [*plain[:at], *plain[at + 2 :], "--refine", str(made), "--output", str(refined), "--budgets"]
    capsys.readouterr()
    assert cli.main([*refine, "3"]) == 2
    assert "the selection has no set of 3 sublayers; it has 1, 2" in error_of(capsys)
    assert cli.main([*refine, "2"]) == 0
    assert sorted((tmp_path / "profiles").iterdir()) == kept
    before, after = (json.loads(path.read_text()) for path in (made, refined))
    assert before["settings"] == {}
    assert after["settings"].keys() == {"refined_2", "refined_from"}
    assert after["selected"]["1"] == before["selected"]["1"]
    assert after["data_ids"] == before["data_ids"]  # of the same search
    run = ["run", *cell("calibrated"), *given, "--limit", "1", "--max-new-tokens", "4", "--profile", str(refined)]
    assert cli.main(run) == 0


def test_a_profile_of_other_weights_is_not_offered(given, caplog, checkpoint, tmp_path):
    changed = Path(shutil.copytree(checkpoint, tmp_path / "changed"))
    model = LlamaForCausalLM.from_pretrained(changed)
    model.model.layers[0].mlp.down_proj.weight.data.mul_(2)
    model.save_pretrained(changed)
    assert cli.main(["calibrate", "--model", "llama", *given]) == 0
    caplog.clear()
    assert cli.main(["calibrate", "--model", "llama", *given, "--checkpoint", str(changed)]) == 0
    (line,) = [record.getMessage() for record in caplog.records if "is made now" in record.getMessage()]
    assert line.endswith("was made with other weights fingerprint")
    found = [json.loads(path.read_text())["weights_fingerprint"] for path in (tmp_path / "profiles").iterdir()]
    assert len(set(found)) == 2


def test_a_damaged_profile_of_other_settings_is_in_nobodys_way(given, tmp_path):
    (tmp_path / "profiles").mkdir()
    (tmp_path / "profiles/llama-01234567.json").write_text("{")
    assert cli.main(["calibrate", "--model", "llama", *given]) == 0


def test_the_file_that_is_named_holds_the_same_as_the_kept_one(given, tmp_path, capsys):
    argv = ["calibrate", "--model", "llama", *given, "--output", str(tmp_path / "mine.json")]
    assert cli.main(argv) == 0
    (kept,) = (tmp_path / "profiles").iterdir()
    assert kept.read_text() == (tmp_path / "mine.json").read_text()
    assert f"{kept} and {tmp_path / 'mine.json'}" in capsys.readouterr().out


def test_tasks_without_a_search_are_refused(given, capsys):
    assert cli.main(["calibrate", "--model", "llama", *given, "--tasks", "trec"]) == 2
    assert "--tasks are the tasks for --select; importance is measured on qasper" in error_of(capsys)


def test_a_full_disk_while_the_profile_is_saved_loses_no_measurement(given, monkeypatch, tmp_path, capsys):
    argv = ["calibrate", "--model", "llama", "--select", "decode", "--up-to", "1", *given]
    held = []

    def full(self, path):
        held.append(path.with_suffix(".partial.jsonl").read_text())
        raise OSError(28, "No space left on device", str(path))

    with monkeypatch.context() as patched:
        patched.setattr(profiles.SelectionProfile, "save", full)
        for _ in range(2):
            assert cli.main(argv) == 1
            assert "No space left on device" in error_of(capsys)
    assert len(held[0].splitlines()) > 10
    assert held[1] == held[0]  # nothing was measured again
    assert cli.main(argv) == 0
    assert not list((tmp_path / "profiles").glob("*.partial*"))
