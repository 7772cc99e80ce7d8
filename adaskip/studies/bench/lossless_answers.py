"""Greedy answers of a batch of prompts in one way, timed, and where they differ from stock `generate`'s."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from adaskip.core.blocks import execution_device, find_decoder
from adaskip.core.decoding import plain_generate
from adaskip.core.hf import CACHE
from adaskip.core.token_ids import left_padded
from adaskip.studies.bench.timing import Stopwatch, undisturbed


@torch.no_grad()
def read_prompt(model: Any, prompt: Tensor) -> DynamicCache:
    """The full model's KV cache of all tokens of `prompt` [S] but the last one."""
    cache = DynamicCache(config=model.config)
    if len(prompt) > 1:
        ids = prompt[None, :-1].to(execution_device(model))
        find_decoder(model)(input_ids=ids, **{CACHE: cache}, use_cache=True)
    return cache


@torch.no_grad()
def answer(
    model: Any,
    prompts: Sequence[Tensor],
    new_tokens: int,
    way: dict[str, Any],
    cache: DynamicCache | None = None,
    clock: Any = "wall",
) -> dict[str, Any]:
    """One greedy answer to each of `prompts` [S], together: tokens by row, and what drafting took.

    decode_s: seconds from the end of the first forward, which gives each row its first token, to the end.
    way: options of `generate`, those of the end and pad tokens among them. cache: of a single prompt without its last
    token, which stays as it is.
    """
    ids, mask = left_padded(prompts, way["pad_token_id"], execution_device(model))
    given = {} if cache is None else {CACHE: copy.deepcopy(cache)}
    stopwatch = Stopwatch(ids.device, clock)

    def after_forward(*_: Any) -> None:
        if not stopwatch.moments:
            stopwatch.mark()

    hook = model.register_forward_hook(after_forward)
    try:
        with undisturbed(ids.device):
            sequences = plain_generate(
                model, input_ids=ids, attention_mask=mask, max_new_tokens=new_tokens, **given, **way
            )
            stopwatch.mark()
    finally:
        hook.remove()
    rows = [_to_end(row, way["eos_token_id"]) for row in sequences[:, ids.shape[1] :].tolist()]
    record = {"tokens": rows, "decode_s": sum(stopwatch.laps())}
    decoder = way.get("custom_generate")
    return record if decoder is None else {**record, **asdict(decoder.last_request)}


def _to_end(tokens: list[int], ends: list[int] | None) -> list[int]:
    """The tokens up to the first end token, without the padding behind it."""
    length = next((i for i, token in enumerate(tokens, start=1) if token in (ends or ())), len(tokens))
    return tokens[:length]


@torch.no_grad()
def differences(
    model: Any, prompts: Sequence[Tensor], stock: Sequence[list[int]], other: Sequence[list[int]]
) -> list[dict[str, Any]]:
    """Where the answers of a row differ first (`at`), and the full model's two highest logits there.

    spacing: of numbers of the model's dtype at the highest logit.
    """
    found = []
    for row, (prompt, a, b) in enumerate(zip(prompts, stock, other, strict=True)):
        if a == b:
            continue
        at = next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
        ids = torch.cat([prompt, prompt.new_tensor(a[:at])])[None].to(execution_device(model))
        first, second = model(ids, logits_to_keep=1).logits[0, -1].float().topk(2).values.tolist()
        spacing = torch.finfo(model.dtype).eps * 2.0 ** math.floor(math.log2(abs(first)))
        found.append({"row": row, "at": at, "logits": [first, second], "spacing": spacing})
    return found
