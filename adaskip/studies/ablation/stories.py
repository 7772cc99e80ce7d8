"""The ablation on stories260K, a Llama of 5 layers trained on children's stories: loss on stories that it tells itself.

The full model tells the stories by sampling, so that their loss under it is its own entropy, and what skipping adds to
it estimates the divergence of the skipped model from the full one. A story is then fed token by token, as in decoding,
so that the learning window sees what it would see there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from adaskip.calibration.measure import calibrate
from adaskip.core.context import skipping
from adaskip.core.plan import Budget
from adaskip.models.loading import LoadedModel
from adaskip.models.stories import CALIBRATION_STORIES, STORIES, load_stories, tell
from adaskip.profiles.importance import ImportanceProfile
from adaskip.runs.folder import RunFolder
from adaskip.runs.manifest import describe_model
from adaskip.strategies import AdaSkip
from adaskip.studies.ablation.saved import SampleResult, Subject, mean_skipped
from adaskip.studies.ablation.settings import AblationConfig, Variant

TOKENS = 128
"""Length of a story, its beginning included."""
PROMPT_TOKENS = 16
"""Of each story, read as its prompt."""
TASK = "stories"


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
    loaded = load_stories()
    told = tell(loaded, CALIBRATION_STORIES + count, TOKENS, seed)
    return loaded, calibrate(loaded.model, told[:CALIBRATION_STORIES]), told[CALIBRATION_STORIES:]


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
