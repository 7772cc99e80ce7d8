"""`make reproduce`: committed profiles, few samples, one progress for the whole, a folder of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from tqdm import tqdm

from adaskip.core.plan import PHASES
from adaskip.profiles.importance import ImportanceProfile
from adaskip.profiles.selection import SelectionProfile
from adaskip.runs.cells import MODELS
from adaskip.runs.job import resolve
from adaskip.runs.loading import find_loading
from adaskip.runs.profiles import kept_path
from adaskip.studies.observations.command import OBSERVATIONS, all_targets
from adaskip.studies.observations.settings import Target
from adaskip.studies.reproduce import command, progress
from adaskip.studies.reproduce.committed import ProfilesError, keep_profiles, profile_of, read_profiles
from adaskip.studies.reproduce.progress import Whole
from adaskip.studies.reproduce.settings import ReproduceConfig
from adaskip.studies.side_by_side import draw_no_bars
from tests.tiny_runs import ROOT


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    """The folder of a reproduction, with its profiles."""
    folder = tmp_path_factory.mktemp("reproduced")
    keep_profiles(read_profiles(), folder / "profiles")
    return folder


def test_every_cell_has_its_committed_profile(kept):
    kinds = {"adaskip": ImportanceProfile, "calibrated": SelectionProfile}
    cells = ReproduceConfig(output_dir=str(kept)).cells()
    assert len(cells) == 144
    for cell in cells:
        path = profile_of(cell, kept / "profiles")
        assert (path is None) == (cell.strategy not in kinds)
        if path is not None:
            kinds[cell.strategy].load(path)
            assert cell.model in path


@pytest.mark.parametrize("model", MODELS)
def test_the_committed_profiles_are_those_that_a_run_would_make(kept, model):
    """Their names hold a hash of all that they depend on, weights and data among it: no other is wanted."""
    cells = [cell for cell in ReproduceConfig(output_dir=str(kept)).cells() if cell.model == model]
    loaded = find_loading(cells[0], model).load()
    wanted = {(cell.phase, cell.strategy): cell for cell in cells if cell.strategy in ("adaskip", "calibrated")}
    assert len(wanted) == 2 * len(PHASES)
    for cell in wanted.values():
        assert str(kept_path(resolve(cell), loaded)) == profile_of(cell, kept / "profiles")


def test_fewer_samples_than_the_committed_results(kept):
    config = ReproduceConfig(output_dir=str(kept))
    for cell in config.cells():
        assert 0 < (cell.limit or 0) < (cell.setup.phases[cell.phase].limit or 0)
    assert 0 < (config.observe().limit or 0) < config.observe().defaults["limit"]
    assert {cell.limit for cell in replace(config, limit=2).cells()} == {2}
    assert {(cell.limit, cell.subset) for cell in replace(config, subset=2).cells()} == {(None, 2)}


def test_what_is_measured_is_what_the_observations_draw(monkeypatch, kept):
    asked: set[Target] = set()

    def note(config, wanted):
        asked.update(wanted)
        raise StopIteration

    monkeypatch.setattr("adaskip.studies.observations.command.measure_targets", note)
    for name in ("ob1", "ob2", "ob3", "tables12"):
        with pytest.raises(StopIteration):
            OBSERVATIONS[name].run(ReproduceConfig(output_dir=str(kept)).observe())
    assert set(all_targets(ReproduceConfig(output_dir=str(kept)).observe())) == asked


def test_the_committed_results_are_refused_as_a_place():
    with pytest.raises(ValueError, match="contains the committed results; make reproduce FULL=1 makes them again"):
        ReproduceConfig(output_dir=str(ROOT / "results/testbed"))


@pytest.mark.parametrize("content", [None, b"not an archive"])
def test_a_missing_or_damaged_archive_is_one_line(tmp_path, content):
    if content is not None:
        (tmp_path / "runs.tar.xz").write_bytes(content)
    with pytest.raises(ProfilesError, match=r"runs\.tar\.xz (is missing|cannot be read).*; FULL=1 calibrates and"):
        read_profiles(tmp_path / "runs.tar.xz")


def test_a_profile_too_few_or_too_many_is_refused(tmp_path):
    (cell,) = [
        cell
        for cell in ReproduceConfig(output_dir=str(tmp_path)).cells()
        if (cell.model, cell.phase, cell.strategy, cell.budget) == ("llama", "decode", "calibrated", 4)
    ]
    with pytest.raises(ProfilesError, match="one profile of llama for calibrated; it has: none"):
        profile_of(cell, tmp_path)
    for digits in ("00000000", "11111111"):
        (tmp_path / f"llama-selection-decode-{digits}.json").touch()
    with pytest.raises(ProfilesError, match=r"it has: llama-selection-decode-00000000\.json, llama-sel"):
        profile_of(cell, tmp_path)


def test_the_time_left_is_that_of_the_whole(monkeypatch, capsys):
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with Whole(200.0) as whole:
        now[0] += 20
        whole.update(10)
        assert capsys.readouterr().err == ""  # too soon for a line of a log
        now[0] += 40
        whole.update(40)
    assert capsys.readouterr().err == "reproduce: 25 %, 1:00 so far, about 3:00 left\n"


def reproduce(*argv: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "eval/reproduce.py", *argv], cwd=ROOT, capture_output=True, text=True, check=False
    )


def test_a_dry_run_says_how_long_and_makes_nothing(tmp_path, monkeypatch, capsys):
    argv = ["eval/reproduce.py", "--dry-run", "--jobs", "2", "--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr(sys, "argv", argv)
    assert command.main("Tables, plots and observations.") == 0
    first, *cells = capsys.readouterr().out.splitlines()
    assert re.match(r"144 cells and 30 measurements on 3 models into .*: about \d+ minutes on 2 quiet cores", first)
    assert len(cells) == 144
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_tables_plots_and_observations_of_all_three_models(tmp_path):
    out = tmp_path / "out"
    argv = ["--limit", "2", "--strategies", "full", "adaskip", "--output-dir", str(out), "--jobs", "2"]
    ended = reproduce(*argv)
    assert ended.returncode == 0, ended.stderr
    for name in ("tables/table3_prefill.md", "tables/tradeoff.md", "plots/retention.png", "observations/ob1.md"):
        assert (out / name).is_file(), name
    for name in ("tables", "plots", "observations"):
        assert f"{name}: {out / name} (" in ended.stdout
    assert {path.name for path in (out / "profiles").iterdir()} == set(read_profiles())  # none was made
    assert {path.name for path in (out / "observations/profiles").iterdir()} == set(read_profiles())
    manifests = [json.loads(path.read_text()) for path in (out / "runs").glob("*/*/manifest.json")]
    assert {(each["model"], each["limit"]) for each in manifests} == {(model, 2) for model in MODELS}
    again = reproduce(*argv)
    assert again.returncode == 0
    assert again.stdout == ended.stdout


def test_a_measuring_process_draws_no_bar_of_its_own_on_a_terminal(monkeypatch):
    """And still says what has to be said."""
    ours, theirs = os.openpty()
    with os.fdopen(theirs, "w") as terminal:
        monkeypatch.setattr(sys, "stderr", terminal)
        assert terminal.isatty()
        draw_no_bars()
        with tqdm(total=2, disable=None) as bar:
            bar.update()
        print("a warning", file=sys.stderr)
        assert os.read(ours, 1000).split() == [b"a", b"warning"]
        sys.stderr.detach()  # pyright: ignore[reportAttributeAccessIssue]
    os.close(ours)
