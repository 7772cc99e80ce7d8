"""Packed runs lack what belongs to the data set; unpacked beside the data they are whole again and continue."""

from __future__ import annotations

import json
import shutil
import tarfile

import pytest

from adaskip import cli
from adaskip.studies.tables.runs import load_run
from adaskip.studies.tables.scores import score_run
from dev.pack_runs import pack
from dev.unpack_runs import unpack
from tests.tiny_runs import cell, records

pytestmark = pytest.mark.usefixtures("short_answers")
RUN = ["run", *cell("early_exit", "prefill", "2")]
FOLDER = "runs/llama-EE-PREFILL/2-sublayers"


@pytest.fixture
def published(options, tmp_path):
    """The archive of a run of two samples a task, and the options without its output."""
    at = options.index("--output-dir")
    given = [*options[:at], *options[at + 2 :]]
    assert cli.main([*RUN, "--limit", "2", *given, "--output-dir", str(tmp_path / "published/runs")]) == 0
    score_run(load_run(tmp_path / "published" / FOLDER))
    return pack(tmp_path / "published"), given


def test_what_is_published_names_records_and_has_none_of_their_text(published):
    with tarfile.open(published[0]) as tar:
        held = tar.extractfile(f"{FOLDER}/trec.jsonl")
        assert held is not None
        lines = [json.loads(line) for line in held]
    assert [(line["references"], line["all_classes"]) for line in lines] == [(None, None)] * 2
    assert all(line["id"].startswith("trec-") for line in lines)


def test_an_unpacked_run_is_the_run_and_continues_with_more_samples(published, data_dir, tmp_path, capsys):
    archive, given = published
    assert unpack(archive, str(data_dir), tmp_path / "again") == 1
    run = tmp_path / "again" / FOLDER
    original = tmp_path / "published" / FOLDER
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == {
        path.name: path.read_bytes() for path in original.iterdir() if path.is_file() and path.name != ".lock"
    }
    for base in ("again", "published"):
        assert cli.main([*RUN, "--limit", "3", *given, "--output-dir", str(tmp_path / base / "runs")]) == 0
    assert records(run) == records(original)
    assert {task: len(rows) for task, rows in records(run).items()} == dict.fromkeys(records(run), 3)


def test_runs_with_scores_of_other_answers_are_not_packed_and_the_archive_stays(published, tmp_path):
    before = published[0].read_bytes()
    path = tmp_path / "published" / FOLDER / "trec.jsonl"
    first, *rest = path.read_text().splitlines(keepends=True)
    path.write_text("".join([json.dumps({**json.loads(first), "prediction": "another"}) + "\n", *rest]))
    with pytest.raises(ValueError, match=r"no scores of the answers in .*2-sublayers; eval/tables\.py writes them"):
        pack(tmp_path / "published")
    assert published[0].read_bytes() == before
    score_run(load_run(tmp_path / "published" / FOLDER))
    assert pack(tmp_path / "published").read_bytes() != before


def test_other_data_is_refused(published, data_dir, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(data_dir, other)
    path = other / "trec_e.jsonl"
    path.write_text(path.read_text().replace('"answers": ["w', '"answers": ["not w', 1))
    with pytest.raises(ValueError, match="has other records than llama-EE-PREFILL was scored on"):
        unpack(published[0], str(other), tmp_path / "again")
    assert not (tmp_path / "again").exists()
