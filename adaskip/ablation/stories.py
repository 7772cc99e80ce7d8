"""The ablation on stories260K, a Llama of 5 layers trained on children's stories: loss on stories that it tells itself.

The full model tells the stories by sampling, so that their loss under it is its own entropy, and what skipping adds to
it estimates the divergence of the skipped model from the full one. A story is then fed token by token, as in decoding,
so that the learning window sees what it would see there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from adaskip.ablation.saved import SampleResult, Subject, mean_skipped
from adaskip.ablation.settings import STORIES, AblationConfig, Variant
from adaskip.calibration import calibrate
from adaskip.context import skipping
from adaskip.importance import ImportanceProfile
from adaskip.models import LoadedModel, load_model
from adaskip.plan import Budget
from adaskip.runs.folder import RunFolder
from adaskip.runs.manifest import describe_model
from adaskip.strategies import AdaSkip

BEGINNINGS = (
    "Once upon a time, there was a little girl named",
    "One day, a big dog",
    "Tom and his mom went to the park. They",
    "Lily liked to play with her",
)
TOKENS = 128
"""Length of a story, its beginning included; shorter ones are not kept."""
PROMPT_TOKENS = 16
"""Of each story, read as its prompt."""
CALIBRATION_STORIES = 20
TOLD_TOGETHER = 16
TASK = "stories"


def stories_dir() -> Path | None:
    """Where the model is; None if ADASKIP_REAL names no folder that holds it."""
    folder = os.environ.get("ADASKIP_REAL")
    found = Path(folder) / STORIES if folder else None
    return found if found is not None and found.is_dir() else None


def ensure_stories(config: AblationConfig, variant: Variant) -> None:
    """Measure what is missing of one variant, story by story."""
    folder = _folder(config, variant)
    torch.set_num_threads(config.threads or 1)
    loaded, profile, told = _prepared(config.stories, config.seed)
    description = {
        "measured": "loss",
        "variant": variant.label,
        "seed": config.seed,
        "stories_fingerprint": _fingerprint(told),
        "tokens": TOKENS,
        **describe_model(loaded),
    }
    ids = [f"story-{number}" for number in range(len(told))]
    with folder.lock():
        folder.start(description)
        for number in folder.merge(TASK, ids, batch_size=1):
            record = _measure(loaded, _strategy(loaded, profile, variant), told[number])
            folder.append(TASK, [{"id": ids[number], "index": number, **record}])
        folder.merge(TASK, ids, batch_size=1)
        folder.finish()


def read_stories(config: AblationConfig) -> Subject:
    """The finished measurements."""
    samples, sources = {}, {}
    for variant in config.stories_variants:
        folder = _folder(config, variant)
        records = [json.loads(line) for line in folder.records_path(TASK).read_text(encoding="utf-8").splitlines()]
        samples[variant] = [
            SampleResult(
                record["id"],
                -record["loss"],
                mean_skipped(variant.sublayers, variant.window, len(record["online_ffns"]), record["steps"]),
                len(record["online_ffns"]),
                None,
            )
            for record in records
        ]
        sources = folder.read_manifest() or {}
    left_out = ("variant", "checkpoint", "started", "finished", "resumed", "measured")
    return Subject(STORIES, "loss", {name: x for name, x in sources.items() if name not in left_out}, samples)


def _folder(config: AblationConfig, variant: Variant) -> RunFolder:
    return RunFolder(config.out_dir / "runs" / STORIES / variant.label)


@lru_cache(maxsize=1)
def _prepared(count: int, seed: int) -> tuple[LoadedModel, ImportanceProfile, list[Tensor]]:
    """The model, its profile on stories of its own, and `count` others to measure on."""
    folder = stories_dir()
    assert folder is not None, "asked for only where it is"
    loaded = load_model(None, checkpoint=str(folder), device="cpu", dtype="float32")
    told = tell(loaded, CALIBRATION_STORIES + count, seed)
    return loaded, calibrate(loaded.model, told[:CALIBRATION_STORIES]), told[CALIBRATION_STORIES:]


@torch.no_grad()
def tell(loaded: LoadedModel, count: int, seed: int) -> list[Tensor]:
    """So many stories of `TOKENS` tokens, sampled from the model, [S] each."""
    model: Any = loaded.model
    tokenizer: Any = loaded.tokenizer
    ends = model.generation_config.eos_token_id
    ends = torch.tensor(ends if isinstance(ends, list) else [] if ends is None else [ends])
    kept: list[Tensor] = []
    torch.manual_seed(seed)
    while len(kept) < count:
        for beginning in BEGINNINGS:
            prompt = torch.tensor(tokenizer(beginning).input_ids)[None].expand(TOLD_TOGETHER, -1)
            told = model.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=True, max_length=TOKENS, pad_token_id=0
            )
            whole = ~torch.isin(told[:, prompt.shape[1] :], ends).any(dim=1)
            kept += list(told[whole]) if told.shape[1] == TOKENS else []
    order = torch.randperm(len(kept)).tolist()  # so that calibration and test stories begin alike
    return [kept[i] for i in order[:count]]


@torch.no_grad()
def _measure(loaded: LoadedModel, strategy: AdaSkip | None, story: Tensor) -> dict[str, Any]:
    """Mean loss over the tokens that decode steps predict, in nats."""
    model: Any = loaded.model
    ids, begin = story[None], PROMPT_TOKENS
    cache = DynamicCache(config=model.config)
    with nullcontext() if strategy is None else skipping(model, strategy) as session:
        model(input_ids=ids[:, :begin], past_key_values=cache)
        steps = range(begin, ids.shape[1] - 1)
        logits = [model(input_ids=ids[:, at : at + 1], past_key_values=cache).logits[0, -1] for at in steps]
        online = [] if session is None else list(session.last_request.online_ffns)
    loss = torch.nn.functional.cross_entropy(torch.stack(logits), story[begin + 1 :])
    return {"loss": float(loss), "steps": len(logits), "online_ffns": online}


def _strategy(loaded: LoadedModel, profile: ImportanceProfile, variant: Variant) -> AdaSkip | None:
    if not variant.sublayers:
        return None
    return AdaSkip(
        num_layers=profile.num_layers,
        budget=Budget(sublayers=variant.sublayers),
        phase="decode",
        profile=profile,
        learning_window=variant.window,
        beta_quantile=variant.quantile,
    )


def _fingerprint(told: Sequence[Tensor]) -> str:
    return hashlib.sha256(str([story.tolist() for story in told]).encode()).hexdigest()
