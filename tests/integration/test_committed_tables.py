"""The committed tables and plots of the testbed come out of the committed records, to the byte."""

from __future__ import annotations

import os
import tarfile

import pytest

from adaskip.studies.tables.report import write_plots, write_tables, write_tradeoffs
from adaskip.studies.tables.results import load_results
from adaskip.studies.tables.tradeoff import find_tradeoffs
from tests.tiny_runs import ROOT

COMMITTED = ROOT / "results/testbed"


@pytest.mark.slow
def test_the_committed_tables_and_plots_come_out_of_the_committed_records_to_the_byte(tmp_path):
    with tarfile.open(COMMITTED / "runs.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    results = load_results(tmp_path / "runs", jobs=os.cpu_count() or 1)
    written = [*write_tables(results, tmp_path / "tables"), *write_plots(results, tmp_path / "plots")]
    written += write_tradeoffs(
        find_tradeoffs(results, [str(ROOT / "speed/results/cpu/testbed_{model}.json")]), tmp_path
    )
    names = {str(path.relative_to(tmp_path)) for path in written}
    assert names == {f"{name}/{path.name}" for name in ("tables", "plots") for path in (COMMITTED / name).iterdir()}
    assert [name for name in sorted(names) if (tmp_path / name).read_bytes() != (COMMITTED / name).read_bytes()] == []
