"""SmolLM2, the real model that `make setup` brings, and small records in LongBench's format to ask it."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from torch import Tensor

from adaskip.models.loading import LoadedModel
from adaskip.runs.config import RunConfig
from adaskip.runs.loading import find_loading
from tests.tiny_runs import write_samples

ONE_PROCESS = pytest.mark.xdist_group("smollm2")
"""Of tests that read the GGUF file, which takes seconds and is kept."""
MAX_PROMPT_TOKENS = 300
OPTIONS = ["--device", "cpu", "--dtype", "float32", "--threads", "1", "--max-prompt-tokens", str(MAX_PROMPT_TOKENS)]
SHORT, LONG = 2, 1
"""Records of each task whose prompts have at most so many tokens, and more."""
SENTENCES = (
    "The harbour of {town} was rebuilt in {year} after a storm had broken its two piers.",
    "Since then a ferry has crossed the bay every hour, and a market is held on the quay each Friday.",
    "The mayor of {town} said that the old lighthouse would become a museum of the sea.",
)
TOWNS = ("Lindby", "Aldmouth", "Westerholm")


@cache
def load_smollm2() -> LoadedModel:
    """In float32 on the CPU, loaded as the command line does with `OPTIONS`, which thereby finds it loaded.

    Where the package is missing, the error names the command that brings it.
    """
    config = RunConfig(model="smollm2", strategy="full", phase="e2e", device="cpu", dtype="float32")
    return find_loading(config, "smollm2", MAX_PROMPT_TOKENS).load()


def prompt(text: str) -> Tensor:
    """Token ids of one turn of a chat, 1-D."""
    loaded = load_smollm2()
    assert loaded.spec.chat_template is not None
    return torch.tensor(loaded.tokenizer(loaded.spec.chat_template.replace("{prompt}", text)).input_ids)


def write_data(folder: Path) -> Path:
    """`SHORT` and `LONG` records of every task of the protocol, the long ones ahead; `length` is below 4000 words."""
    folder.mkdir(parents=True)
    for task in ("trec", "triviaqa", "multifieldqa_en", "gov_report", "multi_news", "qasper"):
        samples = [_sample(task, number, repeats=1 if number >= LONG else 6) for number in range(LONG + SHORT)]
        write_samples(folder / f"{task}_e.jsonl", samples)
    return folder


def passage(number: int, repeats: int) -> str:
    """About 65 tokens for each repeat."""
    return "\n".join(sentence.format(town=TOWNS[number], year=1900 + number) for sentence in SENTENCES * repeats)


def _sample(task: str, number: int, repeats: int) -> dict:
    context = passage(number, repeats)
    return {
        "input": "" if task in ("gov_report", "multi_news") else f"Which town has a harbour of {1900 + number}?",
        "context": context,
        "answers": [TOWNS[number]],
        "length": len(context.split()),
        "dataset": f"{task}_e",
        "language": "en",
        "all_classes": list(TOWNS) if task == "trec" else None,
        "_id": f"{task}-{number}",
    }
