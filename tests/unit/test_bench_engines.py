"""The benchmark of engines: exports, a process for each, and what is saved and drawn of their answers."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, PreTrainedTokenizerFast

from adaskip.common.errors import RunError
from adaskip.core.plan import EMPTY_PLAN, SkipPlan
from adaskip.profiles.assumed import assumed_profile
from adaskip.studies.bench import measuring
from adaskip.studies.bench.measuring import run_bench
from adaskip.studies.bench.report import result_markdown, write_bench_report
from adaskip.studies.bench.results import load_result
from adaskip.studies.bench.settings import BenchConfig
from adaskip.studies.bench.subject import Subject, random_model
from adaskip.studies.engines import processes
from adaskip.studies.engines.engines import ENGINE_MODES, EngineMode
from adaskip.studies.engines.processes import EngineError, EngineProcesses, python_with

SHAPE = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
LAYERS = 4
MOST = {"batch_size": 2, "prompt_tokens": 8, "new_tokens": 4}


@pytest.fixture
def fake(monkeypatch):
    """The test's own engine under the names of vLLM's modes."""
    for name, drafts in (("vllm", False), ("vllm-draft", True)):
        monkeypatch.setitem(ENGINE_MODES, name, EngineMode("of a test", "vllm", "json", "tests.fake_engine", drafts))


@pytest.fixture(scope="module")
def subject():
    config = LlamaConfig(**SHAPE, num_hidden_layers=LAYERS)
    return Subject(random_model(config, torch.device("cpu"), torch.float32, "sdpa"), assumed_profile(LAYERS), "random")


@pytest.fixture
def engines(fake, subject):
    with EngineProcesses(subject.model, None, None, MOST, 1) as running:
        yield running


def config(tmp_path, **options) -> BenchConfig:
    fixed = {"random_weights": True, "device": "cpu", "output_dir": str(tmp_path), "name": "tiny", "rounds": 3}
    work = {"strategies": ("adaskip",), "phases": ("prefill",), "prompt_tokens": (8,), "new_tokens": 4}
    return BenchConfig(
        **{**fixed, **work, "study": "engines", "budgets": (2, 4), "modes": ("eager", "vllm"), **options}
    )


def test_engines_are_compared_with_their_own_full_model(fake, subject, monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "load_subject", lambda config: subject)
    outcome = run_bench(config(tmp_path))
    assert outcome.complete
    entries = {(entry["mode"], entry["budget"]): entry for entry in load_result(outcome.result.path).entries}
    assert set(entries) == {(mode, budget) for mode in ("eager", "vllm") for budget in (0, 2, 4)}
    assert entries["vllm", 2]["speedup_decode"] == pytest.approx(4 / 2)
    assert entries["vllm", 4]["speedup_decode"] == pytest.approx(4 / 1)
    assert entries["vllm", 0]["kv_bytes"] == 4 * entries["vllm", 4]["kv_bytes"]
    page = result_markdown(outcome.result)
    assert "Engines: vLLM 1.0." in page
    assert "| 4         | 1,200  | 4.00  |" in page
    names = {path.name for path in write_bench_report(tmp_path)}
    assert {"summary.md", "tiny.md", "tiny.png", "tiny.svg"} <= names


def test_a_model_has_one_process_that_ends_with_the_benchmark(engines):
    first = engines.run("vllm", EMPTY_PLAN, [[1] * 8], 4, "wall")
    assert first["engine"]["settings"] == {**MOST, "dtype": "float32", "threads": 1}
    engines.run("vllm", EMPTY_PLAN, [[1] * 8], 4, "process")
    engines.run("vllm", SkipPlan(attention=frozenset({1})), [[1] * 8], 4, "wall")
    assert len(engines.workers) == 2
    running = [worker.process for worker in engines.workers.values()]
    engines.__exit__()
    assert [process.returncode for process in running] == [0, 0]
    assert not engines.folder.exists()


def test_a_worker_that_ends_early_says_why(engines):
    with pytest.raises(EngineError, match=r"(?s)tests\.fake_engine ended with code 1.*no place for 99 tokens"):
        engines.run("vllm", EMPTY_PLAN, [[1] * 8], 99, "wall")


def test_a_worker_that_died_between_two_requests_says_so_and_the_others_end(engines):
    engines.run("vllm", EMPTY_PLAN, [[1] * 8], 4, "wall")
    engines.run("vllm", SkipPlan(attention=frozenset({1})), [[1] * 8], 4, "wall")
    dead, living = (worker.process for worker in engines.workers.values())
    dead.kill()
    dead.wait()
    with pytest.raises(RunError, match=r"tests\.fake_engine ended with code -9"):
        engines.run("vllm", EMPTY_PLAN, [[1] * 8], 4, "wall")
    engines.__exit__()
    assert living.returncode == 0
    assert not engines.folder.exists()


def test_a_draft_reads_text_of_the_testbed(fake, subject, monkeypatch):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(processes.testbed.checkpoint_dir("llama"))
    asked = []
    monkeypatch.setattr(processes._Worker, "ask", lambda self, request: asked.append(request) or {})
    with EngineProcesses(subject.model, tokenizer, None, MOST, 1) as running:
        running.run("vllm-draft", SkipPlan(attention=frozenset({1})), [[1] * 8] * 2, 4, "wall")
    (request,) = asked
    assert [len(row) for row in request["ids"]] == [8, 8]
    assert request["ids"][0] != request["ids"][1]


def test_the_report_has_the_share_of_drafted_tokens_that_were_accepted(fake, subject, monkeypatch, tmp_path):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(processes.testbed.checkpoint_dir("llama"))
    monkeypatch.setattr(measuring, "load_subject", lambda config: replace(subject, tokenizer=tokenizer))
    page = result_markdown(run_bench(config(tmp_path, modes=("vllm-draft",), rounds=1)).result)
    assert (
        "Accepted of the tokens drafted in vLLM: 0.75 with 2 sublayers skipped, 0.75 with 4 sublayers skipped." in page
    )


def test_what_an_engine_cannot_do_is_refused_before_anything_runs(fake, subject, monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "load_subject", lambda config: subject)
    with pytest.raises(ValueError, match="changes its plan between prompt and answer"):
        run_bench(config(tmp_path, phases=("decode",)))
    with pytest.raises(ValueError, match="--modes vllm needs --study engines and --device cpu"):
        config(tmp_path, study="strategies")
    with pytest.raises(ValueError, match=r"no_such_package is neither in this environment nor in \.venv-engines"):
        python_with("no_such_package")
    assert not list(tmp_path.iterdir())


def test_workers_need_no_torch():
    """The environment of llama.cpp may have none."""
    code = "import sys; import adaskip.studies.engines.worker; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
