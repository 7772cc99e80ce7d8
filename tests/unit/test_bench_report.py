"""Tables and plots of saved benchmarks: every number where it belongs, and a page for what lacked memory."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from adaskip.studies.bench.report import COLUMNS, result_markdown, write_bench_report
from adaskip.studies.bench.results import load_result
from adaskip.studies.bench.settings import COMPILED, EAGER, Cell, Workload
from tests.saved_benchmarks import GPU, LLAMA_8B, add_failure, add_overhead, add_strategies, result_of, save

SHORT, LONG = Workload(512, 25), Workload(8000, 25)


def lines_of(markdown: str) -> list[dict[str, str]]:
    """The lines of all tables, by column; a second column of a name has a 2 behind it."""
    names = [f"{name}{2 if name in COLUMNS[:i] else ''}" for i, name in enumerate(COLUMNS)]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in markdown.splitlines() if line.startswith("| ")]
    return [dict(zip(names, row, strict=True)) for row in rows if row[0] != "strategy"]


@pytest.fixture
def saving(tmp_path):
    result = result_of(tmp_path, "saving", "strategies")
    add_strategies(result, SHORT, ("prefill",), budgets=(6,))
    return save(result)


def test_a_table_has_times_speedups_and_references(saving):
    full, ours = lines_of(result_markdown(saving))
    assert (full["strategy"], full["phase"], full["sublayers"]) == ("Full model", "-", "0")
    assert (ours["strategy"], ours["phase"], ours["sublayers"], ours["mode"]) == ("AdaSkip", "prefill", "6", "eager")
    assert (full["TTFT, ms"], ours["TTFT, ms"], full["TPOT, ms"], ours["TPOT, ms"]) == ("1000", "800", "100", "80")
    assert (ours["prefill, tokens/s"], ours["decode, tokens/s"]) == ("640", "12.5")
    assert ours["prefill speedup"] == ours["decode speedup"] == "1.250 [1.250, 1.250]"
    assert (full["of ideal saving"], ours["of ideal saving"], ours["of ideal saving2"]) == ("-", "1.00", "1.00")
    assert (ours["TTFT / limit"], ours["TPOT / limit"]) == ("2", "2")
    assert (ours["KV, MB"], ours["peak, MB"]) == ("1", "-")


def test_a_page_says_what_was_measured_on_what(saving):
    page = result_markdown(saving)
    assert page.startswith("# saving\n\nllama-100m, 102M parameters, float32, attention by sdpa, on cpu (A processor")
    assert "the process's own clock" in page
    assert "## 1 x 512 + 25 tokens, 3 rounds" in page
    assert "in prefill: attention 33.33 ms, FFN 33.33 ms; in decode: attention 3.333 ms, FFN 3.333 ms." in page
    assert "Ceilings" not in page
    saving.manifest["ceilings"] = {"matmul_flops": 2e12, "bandwidth_bytes_per_s": 3e9}
    assert "2 TFLOP/s of matrix multiplication, 3 GB/s of copying." in result_markdown(saving)


def test_a_gpu_is_timed_by_its_own_events(tmp_path):
    result = result_of(tmp_path, "gpu_saving", "strategies", LLAMA_8B, device=GPU)
    add_strategies(result, LONG, ("prefill",), budgets=(8,))
    assert "on nvidia-l20 (NVIDIA L20, 1 threads, CUDA events)" in result_markdown(save(result))


def test_the_report_is_a_summary_and_a_page_and_plots_per_study_of_strategies(tmp_path, saving):
    """No plot of `saving`, which has one length and one budget."""
    compiled = result_of(tmp_path, "compiled", "strategies")
    for workload in (SHORT, LONG, Workload(512, 25, 4)):
        add_strategies(compiled, workload, ("prefill", "e2e"), (3, 6), (EAGER, COMPILED))
    save(compiled)
    overhead = result_of(tmp_path, "overhead", "overhead")
    add_overhead(overhead, SHORT, prefill=1.0, decode=1.0)
    save(overhead)
    (tmp_path / "cpu" / "lossless.json").write_text('{"manifest": {}}')
    written = [str(path.relative_to(tmp_path)) for path in write_bench_report(tmp_path)]
    stems = ["", "_prefill", "_compiled", "_prefill_compiled"]
    stems += [f"{stem}_batch4" for stem in stems]
    drawn = {f"cpu/plots/compiled{stem}.{kind}" for stem in stems for kind in ("png", "svg")}
    assert set(written) == {"summary.md", "cpu/compiled.md", "cpu/saving.md", *drawn}
    assert len(written) == len(set(written))
    for name in written:
        if name.endswith("png"):
            assert np.asarray(Image.open(tmp_path / name).convert("L")).std() > 5
    by_length = (tmp_path / "cpu/plots/compiled_prefill.svg").read_text()
    assert all(by_length.count(f"<!-- {budget} sublayers skipped -->") == 1 for budget in (3, 6))
    assert (tmp_path / "cpu/saving.md").read_text() == result_markdown(load_result(saving.path))
    summary = (tmp_path / "summary.md").read_text()
    assert summary.startswith("# What the benchmark shows\n")
    assert "nothing skipped, patched / stock: prefill" in summary


def test_a_folder_without_results_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no benchmark results in .*; `adaskip bench` makes them"):
        write_bench_report(tmp_path)


@pytest.mark.parametrize("study", ["strategies", "overhead", "kv"])
def test_a_result_for_which_the_memory_was_never_enough_has_a_page_that_says_so(tmp_path, study):
    result = result_of(tmp_path, "gpu_lengths", study, LLAMA_8B, device=GPU)
    add_failure(result, LONG, Cell("full"))
    add_failure(result, Workload(65536, 25), Cell("adaskip", "e2e", 8))
    save(result)
    page = tmp_path / GPU / "gpu_lengths.md"
    assert write_bench_report(tmp_path) == [tmp_path / "summary.md", page]
    told = page.read_text()
    assert "## 1 x 8000 + 25 tokens, 0 rounds\n\nNot enough memory for full eager in the warm-up.\n" in told
    assert "Not enough memory for adaskip e2e 8 eager in the warm-up." in told
    assert not lines_of(told)


def test_rounds_before_memory_ran_out_are_shown_beside_that(tmp_path, saving):
    add_failure(saving, SHORT, Cell("adaskip", "prefill", 6), 4)
    add_failure(saving, LONG, Cell("full"))
    page = result_markdown(save(saving))
    assert "3 rounds\n\nNot enough memory for adaskip prefill 6 eager in round 4.\n\n| strategy" in page
    assert "## 1 x 8000 + 25 tokens, 0 rounds\n\nNot enough memory for full eager in the warm-up.\n" in page
    assert len(lines_of(page)) == 2
    assert len(write_bench_report(tmp_path)) == 2
