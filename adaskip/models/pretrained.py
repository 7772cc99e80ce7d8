"""Loads what `adaskip export --to hf` and `adaskip plan` wrote, as models that skip for good.

Of an export without whole layers that is a stock model, of other exports one without the skipped parts, and of a plan
the whole base model: that of the plan's own folder, or else the one that the plan names.
"""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedModel

from adaskip.common.named_files import download_folder
from adaskip.core.plan import PLAN_FILE, SkipPlan
from adaskip.engines.errors import ExportError
from adaskip.engines.export import REPORT
from adaskip.engines.loading import MARK, config_record, load_without, read_config, skipping_for_good
from adaskip.models.checkpoints import has_weights
from adaskip.models.errors import ModelError
from adaskip.models.loading import load_weights
from adaskip.models.rope import fix_dynamic_rope
from adaskip.models.source import ModelSource, find_source, named_source


def from_pretrained(name: str | Path, *, allow_other_weights: bool = False, **options: Any) -> PreTrainedModel:
    """The model of a folder, or repository of the Hub, that `adaskip export --to hf` or `adaskip plan` wrote.

    It skips what the plan skips, in every call and for good: use `skipping(model, plan)` on the stock model where that
    should end. Of an export the skipped sublayers are absent; of a plan the base model is loaded whole. A plan beside
    the weights of a model is a plan for these.

    options: further arguments of transformers' `from_pretrained`, as dtype and device_map. allow_other_weights: of a
    plan, the base model may have other weights than the one it was made for.

    Raises ValueError for what is neither of these, as a plain checkpoint, or damaged.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = download_folder(str(name))
    if (model := _exported(folder, options)) is not None:
        fix_dynamic_rope(model)  # as the model had when it was compared with the export
        return model
    if not (folder / PLAN_FILE).is_file():
        raise ExportError(
            f"{folder} has no {PLAN_FILE} and no {REPORT}: it is neither a plan nor an export of adaskip; a plain "
            "checkpoint is loaded with AutoModelForCausalLM"
        )
    plan = SkipPlan.from_pretrained(folder)
    source = _source(folder, plan)
    try:
        model = load_weights(source.path, deepcopy(source.own_config), options)
    except ModelError as error:
        raise ExportError(f"the model of the plan in {folder} cannot be loaded: {error}") from None
    return skipping_for_good(model, plan, allow_other_weights)


def _exported(folder: Path, options: dict[str, Any]) -> PreTrainedModel | None:
    """The model of an export; None if the folder has none."""
    if not (folder / "config.json").is_file():
        return None
    if MARK in config_record(folder):
        return load_without(folder, *read_config(folder), **options)
    if not (folder / REPORT).is_file():
        return None
    return AutoModelForCausalLM.from_pretrained(folder, **{"trust_remote_code": False, **options}).eval()


def _source(folder: Path, plan: SkipPlan) -> ModelSource:
    """The model that a plan beside weights, or a plan alone, is for."""
    if has_weights(folder):
        return find_source(checkpoint=folder)
    if plan.origin is None:
        raise ExportError(f"{folder} holds a plan that names no model; load that and use skipping(model, plan)")
    return named_source(plan.origin.model)
