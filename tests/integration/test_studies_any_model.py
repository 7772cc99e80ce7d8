"""Every study on models that no list knows, folders of different depth, with LongBench's records."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from adaskip.calibration import divergence
from adaskip.runs import config
from tests.integration.test_real_road import script
from tests.tiny_runs import WORDS

NAMES = ("Tiny-Five", "Tiny-Three")


@pytest.fixture(scope="module")
def folders(checkpoint, tmp_path_factory) -> tuple[str, str]:
    """A random Llama of three layers, and one of five."""
    root = tmp_path_factory.mktemp("models")
    five, three = (shutil.copytree(checkpoint, root / name) for name in NAMES)
    torch.manual_seed(1)
    config = LlamaConfig.from_pretrained(five, num_hidden_layers=5)
    LlamaForCausalLM(config).save_pretrained(five)
    return str(five), str(three)


@pytest.fixture
def study(folders, data_dir, tmp_path, monkeypatch, capsys):
    """Runs the script of a study on both models: what it printed, and the folder of what it wrote."""

    def run(path: str, *options: str):
        given = ["--models", *folders, "--data-dir", str(data_dir), "--device", "cpu", "--threads", "1"]
        out = tmp_path / path.replace("/", "-")
        assert script(monkeypatch, path, *given, "--output-dir", out, *options) == 0
        # what is saved is enough, and names no folder and no text of the records
        assert script(monkeypatch, path, "--draw-only", "--output-dir", out, *options) == 0
        kept = "".join(f.read_text() for f in out.rglob("*.json") if "runs" not in f.relative_to(out).parts)
        assert not any(f" {word} " in kept for word in WORDS)
        return capsys.readouterr().out, out

    run.folders = folders
    return run


@pytest.mark.parametrize("name", ["ob1", "ob2", "ob3"])
def test_observations_have_a_column_for_each_model(study, name):
    _, out = study(f"observations/{name}.py", "--tasks", "trec", "gov_report", "--limit", "2", "--max-new-tokens", "6")
    rows = (out / f"{name}.csv").read_text().splitlines()
    assert {row.split(",")[0] for row in rows[1:]} == set(NAMES)
    assert set(json.loads((out / f"{name}.json").read_text())["sources"]) == set(NAMES)
    assert (out / f"{name}.png").is_file()
    manifest = json.loads((out / "measurements/Tiny-Five/trec-prefill/manifest.json").read_text())
    assert (manifest["model"], manifest["num_layers"], manifest["benchmark"]) == ("Tiny-Five", 5, "longbench")


@pytest.mark.slow
def test_hit_rates_are_told_for_each_depth(study):
    _, out = study(
        "observations/tables12.py", "--tasks", "trec", "gov_report", "--limit", "2", "--max-new-tokens", "24"
    )
    assert "M = 5 and 3 layers" in (out / "table1.md").read_text()
    rows = json.loads((out / "table2.json").read_text())["numbers"]
    assert {row["row"][0] for row in rows} == set(NAMES)


@pytest.mark.slow
def test_the_importance_check_shows_the_floor_of_each_task(study):
    told, out = study("observations/importance_check.py", "--tasks", "trec", "--limit", "3", "--max-new-tokens", "4")
    assert "The full model scores beyond chance more than trivial answers (empty answer, majority class" in told
    rows = [row.split(",")[:3] for row in (out / "importance_check.csv").read_text().splitlines()]
    assert [row[2] for row in rows if row[0] == "Tiny-Three"][:3] == ["0", "1", "2"]
    assert [row[2] for row in rows if row[0] == "Tiny-Five"][:5] == ["0", "1", "2", "3", "4"]


@pytest.mark.slow
def test_models_of_different_depth_are_groups_of_their_own_in_the_online_ablation(study):
    few = ("--tasks", "gov_report", "--limit", "2", "--max-new-tokens", "12", "--stories", "0")
    told, out = study("eval/online_ablation.py", *few, "--windows", "3", "--quantiles", "0.5")
    for name in NAMES:
        assert f"- {name}: the window adds FFNs: " in told
    assert len(json.loads((out / "online_ablation_samples.json").read_text())) == 2


def test_compensation_is_judged_on_each_model(study):
    told, out = study("eval/compensation.py", "--held-out", "2", "--tasks", "trec", "gov_report", "multi_news")
    assert "Kept as the default: " in told
    cells = json.loads((out / "compensation_divergences.json").read_text())
    assert {name: len(each["cells"]) for name, each in cells.items() if name in NAMES} == dict.fromkeys(NAMES, 2)


FEW = ("--tasks", "trec", "gov_report", "multi_news", "--limit", "3", "--phases", "decode")


def test_divergences_of_other_papers_sets_continue_with_another_selection(study, tmp_path, monkeypatch):
    """The sets of two models; then those of one more strategy and of a named file, on the same records."""
    setup = config.find_setup
    few = {"calibration_samples": 4, "search_samples": 4}
    monkeypatch.setattr(config, "find_setup", lambda *given: replace(setup(*given), **few))
    monkeypatch.setattr(divergence, "ANSWER_TOKENS", 8)
    runs = ("--runs", str(tmp_path / "runs"), *FEW)
    told, out = study("eval/peer_divergence.py", *runs, "--strategies", "calibrated", "cosine_window", "adaskip")
    assert "Cosine Window diverges more than Calibrated beyond chance: " in told
    first = json.loads((out / "peer_divergences.json").read_text())
    for name in NAMES:
        assert [cell["row"] for cell in first[name]["cells"]] == ["calibrated", "cosine_window", "adaskip"]
    (kept,) = (tmp_path / "profiles").glob("Tiny-Three-selection-decode-*.json")
    given = ("--strategies", "calibrated", "block_influence", "--models", str(study.folders[1]))
    study("eval/peer_divergence.py", *runs, *given, "--selections", f"older={kept}")
    cells = json.loads((out / "peer_divergences.json").read_text())["Tiny-Three"]["cells"]
    assert cells[:3] == first["Tiny-Three"]["cells"]
    by_row = {cell["row"]: cell["divergences"] for cell in cells}
    assert list(by_row) == ["calibrated", "cosine_window", "adaskip", "block_influence", "older"]
    assert by_row["older"] == pytest.approx(by_row["calibrated"])
    assert "older" in (out / "peer_divergence.md").read_text()


def test_sets_that_keep_the_kv_are_compared_where_their_answers_are_chosen(study, tmp_path, monkeypatch, capsys):
    setup = config.find_setup
    few = {"calibration_samples": 4, "search_samples": 4}
    monkeypatch.setattr(config, "find_setup", lambda *given: replace(setup(*given), **few))
    monkeypatch.setattr(divergence, "ANSWER_TOKENS", 8)
    given = ("--runs", str(tmp_path / "runs"), "--tasks", "trec", "--limit", "3", "--phases", "prefill")
    given += ("--strategies", "calibrated", "pop", "--budgets", "2", "3")
    with pytest.raises(AssertionError):
        study("eval/peer_divergence.py", *given, "--keep-kv")
    assert "an even number of sublayers; got 3" in capsys.readouterr().err
    _, out = study("eval/peer_divergence.py", *given[:-1], "--keep-kv")
    saved = json.loads((out / "peer_divergences.json").read_text())
    for name in NAMES:
        assert saved[name]["sources"]["keep_kv"]
        assert [cell["divergences"] for cell in saved[name]["cells"]] == [[0.0] * 3] * 2  # the last layer is free
    assert {path.name.split("-selection-")[1][:15] for path in (tmp_path / "profiles").glob("*-selection-*")} == {
        "prefill-keep-kv"
    }
    page = (out / "peer_divergence.md").read_text()
    assert "Every strategy skips only while the prompt is read, up to its last token" in page
    assert "half of its divergence" not in page
    with pytest.raises(AssertionError):
        study("eval/peer_divergence.py", *given[:-1])
    assert "was measured without --keep-kv" not in (told := capsys.readouterr().err)
    assert "peer_divergences.json was measured with --keep-kv; give another --output-dir" in told


def test_a_divergence_without_a_set_is_refused_before_anything_is_searched(
    study, folders, data_dir, monkeypatch, capsys
):
    given = ["--models", folders[1], "--data-dir", str(data_dir), "--device", "cpu", *FEW]
    monkeypatch.setattr("adaskip.studies.ablation.peers.profile_for", None)
    assert script(monkeypatch, "eval/peer_divergence.py", *given, "--budgets", "3") == 2
    assert "an even number of sublayers; got 3" in capsys.readouterr().err


@pytest.mark.slow
def test_lossless_answers_equal_the_full_models(study):
    few = ("--prompts", "2", "--new-tokens", "6", "--strategies", "adaskip", "unified", "--tasks", "trec", "gov_report")
    told, out = study("speed/lossless.py", *few)
    assert f"{2 * 2 * 4} answers compared with stock `generate`, 0 differing." in told
    assert {path.name for path in (out / "cpu").glob("lossless-*.json")} == {f"lossless-{name}.json" for name in NAMES}
