"""Loads what `adaskip export --to hf` wrote with a plan beside the weights, as a model that skips for good.

The stock model is built, put inside `skipping`, which it never leaves, and gives up the parts that its checkpoint does
not have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from adaskip.core.blocks import decoder_layers
from adaskip.core.context import skipping
from adaskip.core.plan import KINDS, SkipPlan
from adaskip.engines.errors import ExportError
from adaskip.engines.families import family_of
from adaskip.engines.shards import tensor_files

MARK = "adaskip"
"""The field of `config.json` that holds the plan, without scales, and the stock model type."""


class Absent(nn.Module):
    """In the place of a part of a skipped sublayer: no weights, and nothing that could run."""

    def forward(self, *args, **kwargs) -> NoReturn:
        raise ExportError("a sublayer that this model was exported without was called outside of adaskip's forward")


def skipping_for_good(model: PreTrainedModel, plan: SkipPlan, allow_other_weights: bool = False) -> PreTrainedModel:
    """The model itself, put inside a context that it never leaves."""
    context = skipping(model, plan, allow_other_weights=allow_other_weights)
    context.__enter__().stay()
    model.__dict__["adaskip_context"] = context  # kept, and never left
    return model


def marked_config(model_type: str, plan: SkipPlan) -> dict[str, Any]:
    """The fields of `config.json` by which `read_config` knows the plan, and stock classes refuse the folder: they
    would load it and fill in random weights."""
    mark = {"model_type": model_type, **plan.to_dict()}
    return {"model_type": f"{MARK}-{model_type}", MARK: mark}


def read_config(folder: Path) -> tuple[PreTrainedConfig, SkipPlan]:
    """The stock configuration of an exported folder, and which sublayers it lacks.

    Raises:
        ExportError: the folder is none that `adaskip export --to hf` wrote with a plan beside the weights.
    """
    try:
        record = config_record(folder)
        mark = record.pop(MARK)
        plan = SkipPlan(frozenset(mark["attention"]), frozenset(mark["ffn"]))
        config = AutoConfig.for_model(**{**record, "model_type": mark["model_type"]})
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        told = " ".join(str(error).split())[:300]
        raise ExportError(
            f"{folder} is no folder of `adaskip export --to hf` with skipped sublayers ({type(error).__name__}: "
            f"{told}); a plain checkpoint is loaded with AutoModelForCausalLM"
        ) from None
    return config, plan


def config_record(folder: Path) -> dict[str, Any]:
    """The fields of `config.json`. Raises ExportError where that is no JSON object."""
    file = folder / "config.json"
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ExportError(f"{file} is not JSON: {error}") from None
    if not isinstance(record, dict):
        raise ExportError(f"{file} holds no JSON object")
    return record


def load_without(folder: Path, config: PreTrainedConfig, plan: SkipPlan, **options: Any) -> PreTrainedModel:
    """The stock model of `config` with the weights of `folder`, without the sublayers that `plan` skips.

    options: further arguments of `from_pretrained`, as dtype and device_map.

    Raises:
        ExportError: the weights that are missing are not those of the skipped sublayers.
    """
    block = family_of(config.model_type).block
    absent = [
        (layer, part)
        for kind in KINDS
        for layer in sorted(getattr(plan, kind))
        for part in sorted(getattr(block, kind).names())
    ]
    model = _load(folder, config, {f"model.layers.{layer}.{part}." for layer, part in absent}, options)
    layers = decoder_layers(model)
    skipping_for_good(model, plan)
    model.__dict__["save_pretrained"] = _refuse_saving
    for layer, part in absent:
        setattr(layers[layer], part, Absent())
    return model


def _load(folder: Path, config: PreTrainedConfig, absent: set[str], options: dict[str, Any]) -> PreTrainedModel:
    """The stock model; weights whose names begin with one of `absent` are missing in the folder, and random here."""
    tensor_files(folder)  # raises ExportError where a file is missing or damaged
    before = get_verbosity()
    set_verbosity_error()  # else a table of the missing weights is printed
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are refused below, in one line
            **{"local_files_only": True, "trust_remote_code": False, "use_safetensors": True, **options},
        )
    finally:
        set_verbosity(before)
    model, info = loaded
    found = {
        "lacks": {name for name in info["missing_keys"] if not name.startswith(tuple(absent))},
        "has unknown": info["unexpected_keys"],
        "has other sizes of": {name for name, *_ in info["mismatched_keys"]},
    }
    for what, names in found.items():
        if names:
            raise ExportError(f"{folder} {what} {len(names)} weights of {type(model).__name__}, first {min(names)}")
    return model.eval()


def _refuse_saving(*args, **kwargs) -> NoReturn:
    raise ExportError(
        "a model without its skipped sublayers is no checkpoint that stock classes can load; copy the folder that "
        "`adaskip export` wrote"
    )
