"""`--compensation` in runs and plans: what they compute and record, and what is refused."""

from __future__ import annotations

import json

import pytest

from adaskip import cli
from adaskip.core.plan import PLAN_FILE, Affine, SkipPlan
from adaskip.runs import loading
from tests.tiny_runs import cell, error_of, records

pytestmark = pytest.mark.usefixtures("short_answers")
ADASKIP = cell("adaskip", "e2e", "2")
RUN = ["run", *ADASKIP, "--limit", "2"]
FOLDER = "runs/llama-ADA-E2E/2-sublayers"


@pytest.fixture
def given(options) -> list[str]:
    return options[: options.index("--max-new-tokens")]


def losses(folder) -> list[float]:
    return [row["reference_loss"] for rows in records(folder).values() for row in rows]


def test_each_kind_of_run_has_its_own_outputs_and_says_which_it_is(given, tmp_path):
    seen = {}
    for kind in ("scale", "none", "affine"):
        out = tmp_path / kind
        assert cli.main([*RUN, "--compensation", kind, *given, "--output-dir", str(out / "runs")]) == 0
        manifest = json.loads((out / FOLDER / "manifest.json").read_text())
        assert manifest["strategy_options"] == (None if kind == "scale" else {"compensation": kind})
        assert ("compensation_samples" in manifest) == (kind != "scale")
        seen[kind] = losses(out / FOLDER)
    assert len({tuple(values) for values in seen.values()}) == 3


def test_the_default_is_the_scale_of_the_profile(given, tmp_path):
    assert cli.main([*RUN, *given]) == 0
    before = records(tmp_path / FOLDER)
    assert cli.main([*RUN, "--compensation", "scale", *given]) == 0  # it is the same run, which is finished
    assert records(tmp_path / FOLDER) == before


@pytest.mark.parametrize(("first", "second"), [("scale", "affine"), ("affine", "scale"), ("affine", "shift")])
def test_runs_with_different_compensations_do_not_mix(given, tmp_path, capsys, first, second):
    assert cli.main([*RUN, "--compensation", first, *given]) == 0
    capsys.readouterr()
    assert cli.main([*RUN, "--compensation", second, *given]) == 2
    assert "another configuration (strategy_options was " in error_of(capsys)


def test_a_stopped_run_continues_with_the_same_records(given, tmp_path):
    command = [*RUN, "--compensation", "affine", *given]
    assert cli.main(command) == 0
    whole = records(tmp_path / FOLDER)
    for path in (tmp_path / FOLDER).glob("*.jsonl"):
        path.write_text(path.read_text().splitlines(keepends=True)[0])
    assert records(tmp_path / FOLDER) != whole
    assert cli.main(command) == 0
    assert records(tmp_path / FOLDER) == whole


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--compensation", "afine"], "unknown compensation 'afine'. Did you mean 'affine'?"),
        (["--compensation", "affine", "--strategy", "early_exit"], "--compensation affine is for strategies with a"),
        (["--compensation", "affine", "--strategy", "full", "--budget", "0"], "given: strategy 'full'"),
        (
            ["--compensation", "affine", "--strategy", "calibrated", "--target-speedup", "1.1"],
            "without --target-speedup",
        ),
    ],
)
def test_what_has_no_compensation_is_refused_before_anything_is_loaded(given, monkeypatch, capsys, extra, message):
    monkeypatch.setattr(loading, "load_source", lambda *arguments, **keywords: pytest.fail("a model was loaded"))
    assert cli.main([*RUN, *extra, *given]) == 2
    assert message in error_of(capsys)


def test_a_saved_plan_has_the_fitted_maps_and_exports_only_where_they_fold(given, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    at = given.index("--output-dir")
    named = [*given[:at], *given[at + 2 :]]
    for kind in ("affine", "none"):
        assert cli.main(["plan", *ADASKIP, *named, "--compensation", kind, "--output", kind]) == 0
    plans = {kind: SkipPlan.load(tmp_path / kind / PLAN_FILE) for kind in ("affine", "none")}
    assert {kind: plan.origin.options["compensation"] for kind, plan in plans.items()} == {k: k for k in plans}
    assert {type(scale) for scale in plans["affine"].scales.values()} == {Affine}
    assert set(plans["none"].scales.values()) == {1.0}
    assert plans["affine"].attention == plans["none"].attention
    capsys.readouterr()
    assert cli.main(["export", "affine", "--to", "hf", "--output", "out"]) == 2
    assert "the affine compensation of" in error_of(capsys)
    assert not (tmp_path / "out").exists()
    assert cli.main(["export", "none", "--to", "hf", "--output", "out"]) == 0
