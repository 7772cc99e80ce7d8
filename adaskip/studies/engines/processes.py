"""Exports a model for the engines that a benchmark times, and runs each in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaskip import testbed
from adaskip.common.errors import RunError
from adaskip.common.paths import PACKAGE, checkout
from adaskip.core.plan import EMPTY_PLAN, SkipPlan
from adaskip.core.strategy import FixedPlan
from adaskip.engines.checkpoint import Checkpoint, save_in_memory
from adaskip.engines.export import export_to
from adaskip.engines.registry import Export
from adaskip.studies.engines.engines import ENGINE_MODES

ENVIRONMENT = ".venv-engines"
"""The environment of `make .venv-engines/.complete`, in the checkout."""
VLLM = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
"""The engine in the worker's own process, so that the process's clock counts it; 1 GiB of K/V."""
TEXT_TASK = "gov_report"


class EngineError(RunError):
    """A worker ended early; the message holds the last lines of what it printed."""


@dataclass
class EngineProcesses:
    """A model in several engines: a process for each engine and set of skipped sublayers, started when it is needed.

    Args:
        model, tokenizer: what is exported. gguf_file: the file that the model was read from, if it was; llama.cpp gets
            that one's blocks.
        most: the largest batch_size, prompt_tokens and new_tokens of a generation. threads: of each process.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase | None
    gguf_file: Path | None
    most: Mapping[str, int]
    threads: int
    workers: dict[tuple[str, SkipPlan], _Worker] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.temporary = TemporaryDirectory(prefix="adaskip-engines-")
        self.folder = Path(self.temporary.name)

    def run(
        self, mode: str, plan: SkipPlan, ids: Sequence[Sequence[int]], new_tokens: int, clock: str
    ) -> dict[str, Any]:
        """What an engine measures of one generation, as `worker.Times.run` says, and `engine`: what it says of itself.

        Raises EngineError if it fails, ValueError for a model that it does not have.
        """
        if (mode, plan) not in self.workers:
            self.workers[mode, plan] = self._started(mode, plan)
        worker = self.workers[mode, plan]
        if ENGINE_MODES[mode].drafts:
            ids = self._text(len(ids), len(ids[0]))
        measured = worker.ask({"ids": [list(row) for row in ids], "new_tokens": new_tokens, "clock": clock})
        return {**measured, "engine": worker.about}

    def __enter__(self) -> EngineProcesses:
        return self

    def __exit__(self, *error: object) -> None:
        """End the processes and remove what was exported."""
        for worker in self.workers.values():
            worker.close()
        self.temporary.cleanup()

    def _started(self, mode: str, plan: SkipPlan) -> _Worker:
        engine = ENGINE_MODES[mode]
        exported, full = self._exported(engine.export_to, plan), self._exported(engine.export_to, EMPTY_PLAN)
        settings = {
            "model": str(full if engine.drafts else exported),
            "draft": str(exported) if engine.drafts and plan != EMPTY_PLAN else None,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "threads": self.threads,
            **self.most,
        }
        log = self.folder / f"{mode}-{len(self.workers)}.log"
        return _Worker(python_with(engine.package), engine.worker, settings, self.threads, log)

    def _exported(self, name: str, plan: SkipPlan) -> Path:
        """Where the model of a plan is; the empty plan's is the stock checkpoint, or the file it was read from."""
        source = self._checkpoint()
        if plan == EMPTY_PLAN and name == "vllm":
            return source.folder
        if plan == EMPTY_PLAN and name == "gguf" and self.gguf_file is not None:
            return self.gguf_file
        path = self.folder / f"{name}-{len(plan)}-{abs(hash(plan))}{'.gguf' if name == 'gguf' else ''}"
        if not path.exists():
            strategy = FixedPlan(num_layers=source.config.num_hidden_layers, plan=plan)
            export = Export(strategy, source, gguf_file=self.gguf_file, tokenizer=self.tokenizer)
            export_to(name, export, path, verify=False)
        return path

    def _checkpoint(self) -> Checkpoint:
        folder = self.folder / "full"
        if not folder.exists():
            return save_in_memory(self.model, self.tokenizer, folder)
        return Checkpoint(folder, self.model.config)

    def _text(self, batch_size: int, prompt_tokens: int) -> list[list[int]]:
        """Sentences of the testbed, as token ids [B, S]."""
        assert self.tokenizer is not None, "a model without a tokenizer reads no text"
        rows: list[list[int]] = []
        ids: list[int] = []
        for record in testbed.records(TEXT_TASK):
            ids += self.tokenizer(record["context"]).input_ids
            while len(ids) >= prompt_tokens and len(rows) < batch_size:
                rows, ids = [*rows, ids[:prompt_tokens]], ids[prompt_tokens:]
        assert len(rows) == batch_size, f"the testbed has no {batch_size} texts of {prompt_tokens} tokens"
        return rows


class _Worker:
    """One process of `worker`. about: what the engine says of itself."""

    def __init__(self, python: str, module: str, settings: Mapping[str, Any], threads: int, log: Path):
        self.module, self.log = module, log
        environment = {**os.environ, **VLLM, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(PACKAGE.parent)}
        command = [python, "-m", "adaskip.studies.engines.worker", module, json.dumps(settings)]
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
        self.about = self._answer()

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to one request."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):  # the process has ended, which its answer tells
            print(json.dumps(request), file=self.process.stdin, flush=True)
        return self._answer()

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        code = self.process.wait()
        raise EngineError(f"the worker of {self.module} ended with code {code}:\n{self.log.read_text()[-2000:]}")


def python_with(package: str) -> str:
    """The Python of an environment that has `package`: this one's, else that of .venv-engines.

    Raises ValueError if neither has it.
    """
    if find_spec(package) is not None:
        return sys.executable
    python = str((checkout() or Path.cwd()) / ENVIRONMENT / "bin" / "python")
    code = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({package!r}) is None)"
    if not Path(python).exists() or subprocess.run([python, "-c", code], check=False).returncode:
        raise ValueError(
            f"{package} is neither in this environment nor in {ENVIRONMENT}: make {ENVIRONMENT}/.complete brings vLLM, "
            "make setup-llama-cpp llama.cpp into it"
        )
    return python
