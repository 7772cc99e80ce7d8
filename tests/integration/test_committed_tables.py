"""The committed tables of the testbed come out of the committed records, to the byte."""

from __future__ import annotations

import os
import tarfile

import pytest

from adaskip.studies.tables.report import write_tables, write_tradeoffs
from adaskip.studies.tables.results import load_results
from adaskip.studies.tables.tradeoff import find_tradeoffs
from tests.tiny_runs import ROOT

COMMITTED = ROOT / "results/testbed"


@pytest.mark.slow
def test_the_committed_tables_come_out_of_the_committed_records_to_the_byte(tmp_path):
    with tarfile.open(COMMITTED / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    results = load_results(tmp_path / "runs", jobs=os.cpu_count() or 1)
    written = write_tables(results, tmp_path / "tables")
    tradeoffs = find_tradeoffs(results, str(ROOT / "speed/results/cpu/testbed_{model}.json"))
    written += [path for path in write_tradeoffs(tradeoffs, tmp_path) if path.parent.name == "tables"]
    assert {path.name for path in written} == {path.name for path in (COMMITTED / "tables").iterdir()}
    changed = [path.name for path in written if path.read_bytes() != (COMMITTED / "tables" / path.name).read_bytes()]
    assert changed == []
