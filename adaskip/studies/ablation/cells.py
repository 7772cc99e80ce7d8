"""The ablation on models that run tasks: each variant of each model is a run like any other, and continues like one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from adaskip.runs.config import RunConfig, SharedConfig
from adaskip.runs.job import resolve
from adaskip.runs.manifest import is_done
from adaskip.runs.runner import run
from adaskip.studies.ablation.saved import SampleResult, Subject, mean_skipped
from adaskip.studies.ablation.settings import AblationConfig, Variant
from adaskip.studies.tables.runs import Run, load_run
from adaskip.studies.tables.scores import score_run

SOURCES = (
    *("checkpoint", "weights_fingerprint", "num_layers", "dtype", "device", "tasks", "max_new_tokens", "batch_size"),
    *("data_fingerprint", "profile_fingerprint", "versions", "git_commit"),
)
"""Manifest fields that go with the numbers."""


def ensure_cell(config: AblationConfig, model: str, variant: Variant) -> None:
    """Bring one variant's run to its end; loads no model where it is already there."""
    cell = _run_config(config, model, variant)
    if not is_done(resolve(cell)):
        run(cell)


def read_subject(config: AblationConfig, model: str) -> Subject:
    """Score the finished runs of a model."""
    samples, sources = {}, {}
    for variant in config.variants:
        found = load_run(resolve(_run_config(config, model, variant)).folder.path)
        samples[variant] = _samples(found, variant)
        sources |= {name: found.manifest[name] for name in SOURCES if found.manifest.get(name) is not None}
    return Subject(model, "score", sources, samples)


def _run_config(config: AblationConfig, model: str, variant: Variant) -> RunConfig:
    shared: dict[str, Any] = {field.name: getattr(config, field.name) for field in fields(SharedConfig)}
    learning: dict[str, Any] = {
        "strategy": "adaskip",
        "budget": variant.sublayers,
        "learning_window": variant.window,
        "beta_quantile": variant.quantile,
    }
    options: dict[str, Any] = {**shared, "threads": config.threads or (1 if config.num_jobs > 1 else None)}
    options |= learning if variant.sublayers else {"strategy": "full"}
    return RunConfig(
        **options,
        model=model,
        phase="decode",
        tasks=config.tasks,
        limit=config.limit,
        batch_size=1,  # what is learnt is learnt of one request
        output_dir=str(config.out_dir / "runs" / variant.label),
    )


def _samples(found: Run, variant: Variant) -> list[SampleResult]:
    samples = []
    for task, scored in score_run(found).tasks.items():
        most = found.manifest["max_new_tokens"][task]
        for name, record in scored.records.by_id.items():
            # An answer that ends by itself has an end token, which is no part of the record but took a step.
            steps = min(record["new_tokens"], most - 1)
            added = len(record["online_ffns"])
            skipped = mean_skipped(variant.sublayers, variant.window, added, steps)
            quality = scored.main.by_id[name]
            samples.append(SampleResult(f"{task}/{name}", quality, skipped, added, record.get("tpot_ms")))
    return samples
