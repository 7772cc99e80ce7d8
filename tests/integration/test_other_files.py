"""A run belongs to the configuration, end tokens and tokenizer in the checkpoint's folder, as to the weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from adaskip import cli
from adaskip.models.companion_files import FIELDS
from adaskip.runs import loading
from adaskip.runs.config import RunConfig
from adaskip.runs.job import resolve
from adaskip.runs.manifest import DONE, run_state
from tests.tiny_runs import cell, error_of


@pytest.fixture
def own(checkpoint, tmp_path, monkeypatch) -> Path:
    """A checkpoint folder that may be changed; no model stays loaded from before."""
    monkeypatch.setattr(loading, "_held", {})
    return Path(shutil.copytree(checkpoint, tmp_path / "own"))


@pytest.fixture
def command(options, own) -> list[str]:
    given = [*options, "--limit", "1", "--tasks", "trec"]
    given[given.index("--checkpoint") + 1] = str(own)
    return ["run", *given]


def change_json(path: Path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def other_rope(folder: Path) -> None:
    rope = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0, "original_max_position_embeddings": 8192}
    change_json(folder / "config.json", rope_parameters=rope)


def other_ends(folder: Path) -> None:
    change_json(folder / "generation_config.json", eos_token_id=[2, 5])


def other_tokenizer(folder: Path) -> None:
    text = (folder / "tokenizer.json").read_text()
    (folder / "tokenizer.json").write_text(text.replace('"w7"', '"w?"').replace('"w8"', '"w7"').replace('"w?"', '"w8"'))


def manifest_of(tmp_path: Path) -> Path:
    (path,) = tmp_path.glob("runs/*/*-sublayers/manifest.json")
    return path


CHANGES = {
    "config_fingerprint": other_rope,
    "config_stop_token_ids": other_ends,
    "tokenizer_files": other_tokenizer,
}


@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("field", CHANGES)
def test_a_run_of_other_files_is_neither_done_nor_continued(
    command, own, tmp_path, capsys, monkeypatch, field, finished
):
    assert cli.main([*command, *cell()]) == 0
    if not finished:
        change_json(manifest_of(tmp_path), finished=None)
    CHANGES[field](own)
    monkeypatch.setattr(loading, "load_source", None)  # it is told from files alone
    capsys.readouterr()
    assert cli.main([*command, *cell()]) == 2
    assert f"holds a run with another configuration ({field} was " in error_of(capsys)


@pytest.mark.parametrize("field", CHANGES)
def test_the_state_of_a_run_says_what_is_other(command, own, data_dir, tmp_path, field):
    assert cli.main([*command, *cell()]) == 0
    places = {"checkpoint": str(own), "data_dir": str(data_dir), "output_dir": str(tmp_path / "runs")}
    cell_of = {"model": "llama", "phase": "decode", "strategy": "early_exit", "budget": 2, "max_new_tokens": 8}
    config = RunConfig(**places, **cell_of, device="cpu", dtype="float32", limit=1, tasks=("trec",))
    assert run_state(resolve(config)) == DONE
    CHANGES[field](own)
    assert run_state(resolve(config)).startswith(f"other {field.replace('_', ' ')}: ")


@pytest.mark.parametrize("field", CHANGES)
def test_a_manifest_of_before_these_fields_counts_as_the_same(command, own, tmp_path, capsys, field):
    assert cli.main([*command, *cell()]) == 0
    path = manifest_of(tmp_path)
    held = json.loads(path.read_text())
    path.write_text(json.dumps({name: value for name, value in held.items() if name not in FIELDS}))
    CHANGES[field](own)
    capsys.readouterr()
    assert cli.main([*command, *cell()]) == 0
    assert "1 of them before" in capsys.readouterr().out


@pytest.mark.parametrize("field", ["config_fingerprint", "tokenizer_files"])
def test_a_kept_profile_of_other_files_is_left_and_one_is_made_beside_it(
    command, own, tmp_path, monkeypatch, caplog, field
):
    assert cli.main([*command, *cell("adaskip")]) == 0
    (first,) = (tmp_path / "profiles").glob("*.json")
    before = first.read_bytes()
    CHANGES[field](own)
    monkeypatch.setattr(loading, "_held", {})
    for _ in range(2):  # found the second time
        assert cli.main([*command, *cell("adaskip", budget="3")]) == 0
    assert f"made with other {field.replace('_', ' ')}" in caplog.text
    assert first.read_bytes() == before
    (second,) = set((tmp_path / "profiles").glob("*.json")) - {first}
    assert json.loads(second.read_text())[field] != json.loads(before)[field]
    assert json.loads(second.read_text())["attention"] != json.loads(before)["attention"]


def test_a_kept_profile_of_before_these_fields_is_found(command, own, tmp_path):
    assert cli.main([*command, *cell("adaskip")]) == 0
    (first,) = (tmp_path / "profiles").glob("*.json")
    held = json.loads(first.read_text())
    del held["config_fingerprint"], held["tokenizer_files"]
    first.write_text(json.dumps(held))
    assert cli.main([*command, *cell("adaskip", budget="3")]) == 0
    assert list((tmp_path / "profiles").glob("*.json")) == [first]
    assert json.loads(first.read_text()) == held
