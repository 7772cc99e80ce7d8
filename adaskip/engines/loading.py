"""Loads what `adaskip export --to hf` and `adaskip plan` wrote, as models that skip for good.

Where whole layers were left out that is a stock model. Else the stock model is built, put inside `skipping`, which it
never leaves, and gives up the parts that its checkpoint does not have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NoReturn

from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils.logging import get_verbosity, set_verbosity, set_verbosity_error

from adaskip.common.named_files import REPOSITORY, download_folder
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


def from_pretrained(name: str | Path, *, allow_other_weights: bool = False, **options: Any) -> PreTrainedModel:
    """The model of a folder, or repository of the Hub, that `adaskip export --to hf` or `adaskip plan` wrote.

    It skips what the plan skips, in every call and for good: use `skipping(model, plan)` on the stock model where that
    should end. Of an export the skipped sublayers are absent; of a plan the base model is loaded whole.

    options: further arguments of transformers' `from_pretrained`, as dtype and device_map. allow_other_weights: of a
    plan, the base model may have other weights than the one it was made for.

    Raises ValueError for what is neither of these, or damaged.
    """
    folder = Path(name).expanduser()
    if not folder.is_dir():
        folder = download_folder(str(name))
    if not (folder / "config.json").is_file():
        plan = SkipPlan.from_pretrained(folder)
        if plan.origin is None:
            raise ExportError(f"{folder} holds a plan that names no model; load that and use skipping(model, plan)")
        named = _base_model(plan.origin.model)
        model = AutoModelForCausalLM.from_pretrained(**named, **{"trust_remote_code": False, **options})
        return _skipping_for_good(model.eval(), plan, allow_other_weights)
    if MARK in _config_record(folder):
        return load_without(folder, *read_config(folder), **options)
    return AutoModelForCausalLM.from_pretrained(folder, **{"trust_remote_code": False, **options}).eval()


def _base_model(name: str) -> dict[str, Any]:
    """The arguments of transformers' `from_pretrained` for a folder, a GGUF file, or `org/name[@revision]`.

    Raises ExportError for anything else, as a folder that was moved.
    """
    path = Path(name).expanduser()
    if path.is_file():
        return {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    if path.exists():
        return {"pretrained_model_name_or_path": path}
    repo, _, revision = name.partition("@")
    if not REPOSITORY.fullmatch(repo):
        raise ExportError(
            f"{name}, the model of the plan, is neither a folder nor a file here nor org/name on the Hub; load the "
            "model from where it is now and use skipping(model, plan)"
        )
    return {"pretrained_model_name_or_path": repo, "revision": revision or "main"}


def _skipping_for_good(model: PreTrainedModel, plan: SkipPlan, allow_other_weights: bool = False) -> PreTrainedModel:
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
        record = _config_record(folder)
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


def _config_record(folder: Path) -> dict[str, Any]:
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
    _skipping_for_good(model, plan)
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
