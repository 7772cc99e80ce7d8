"""Shared code of the profile classes: field checks, reading a file, and comparison with a model."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from torch import nn

from adaskip.core.adapters import active_adapters
from adaskip.core.wrappers import unwrapped
from adaskip.profiles.fingerprint import config_fingerprint, weights_fingerprint

logger = logging.getLogger(__name__)


class ProfileError(ValueError):
    """A profile has invalid values, cannot be read, or was measured on another model."""


def number(what: str, value: Any, least: float = -math.inf, most: float = math.inf) -> float:
    """`value` as a float; ProfileError unless it is a number (not a bool) from `least` to `most` and not NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        limits = f" from {least:g} to {most:g}" if (least, most) != (-math.inf, math.inf) else ""
        raise ProfileError(f"{what} must be a number{limits}; got {str(value)[:40]!r}")
    try:
        return float(value)
    except OverflowError:
        raise ProfileError(f"{what} is larger than any float") from None


def finite(what: str, value: Any, least: float = -math.inf) -> float:
    """`value` as a float; ProfileError unless it is a finite number of at least `least`."""
    checked = number(what, value, least)
    if math.isinf(checked):
        raise ProfileError(f"{what} must be finite; got {value!r}")
    return checked


def whole(what: str, value: Any, least: int) -> int:
    """`value` itself; ProfileError unless it is a whole number of at least `least`."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ProfileError(f"{what} must be a whole number of at least {least}; got {value!r}")
    return value


def check_record(profile: Any) -> None:
    """Raise ProfileError unless the fields that record the model and the data have the right types.

    Converts `data_ids` to a tuple of strings.
    """
    for name in ("model", "weights_fingerprint", "dtype", "attn_implementation", "dataset"):
        if not isinstance(getattr(profile, name), str):
            raise ProfileError(f"{name} must be a string; got {getattr(profile, name)!r}")
    if isinstance(profile.data_ids, (str, Mapping)) or not isinstance(profile.data_ids, Iterable):
        raise ProfileError(f"data_ids must be a list of strings; got {profile.data_ids!r}")
    ids = tuple(profile.data_ids)
    if wrong := [i for i in ids if isinstance(i, bool) or not isinstance(i, (str, int))]:
        raise ProfileError(f"data_ids must be strings; got {wrong[0]!r}")
    object.__setattr__(profile, "data_ids", tuple(map(str, ids)))
    if not isinstance(profile.versions, Mapping) or not all(isinstance(v, str) for v in profile.versions.values()):
        raise ProfileError(f"versions must map names to strings; got {profile.versions!r}")
    if profile.hidden_size is not None:
        whole("hidden_size", profile.hidden_size, 1)
    texts = dict.fromkeys(("adapter", "config_fingerprint", "tokenizer_files"), str)
    for name, kind in {**texts, "prompts_begin_with_bos": bool}.items():
        if not isinstance(value := getattr(profile, name), kind | None):
            raise ProfileError(
                f"{name} must be {'a string' if kind is str else 'true or false'}, or null; got {value!r}"
            )


def read_record(path: str | Path, expected_format: str, what: str) -> dict[str, Any]:
    """The fields of a profile file, without the field `format`.

    Raises FileNotFoundError if there is no file, and ProfileError if its format is not `expected_format`. what: the
    name of that format in the error.
    """
    try:
        record = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # including numbers with more digits than Python parses
        raise ProfileError(f"{path} is not JSON: {error}") from error
    found = record.pop("format", None) if isinstance(record, dict) else type(record).__name__
    if found != expected_format:
        raise ProfileError(f"{path} is not {what}: format is {found!r}, expected {expected_format!r}")
    return record


def built(kind: type, what: str, record: Any) -> Any:
    """`kind(**record)` for a dataclass `kind`; ProfileError if a field is missing or unknown. what: for the error."""
    if not isinstance(record, dict):
        raise ProfileError(f"{what} must be an object with fields; got {record!r}")
    known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(kind)}
    missing = [name for name, needed in known.items() if needed and name not in record]
    unknown = [name for name in record if name not in known]
    if missing or unknown:
        wrong = [f"lacks {', '.join(missing)}"] if missing else []
        wrong += [f"has unknown fields {', '.join(unknown)}"] if unknown else []
        raise ProfileError(f"{what} {' and '.join(wrong)}")
    return kind(**record)


def check_model(
    profile: Any, model: nn.Module, *, allow_other_weights: bool, again: str, fingerprint: str | None = None
) -> None:
    """Raise ProfileError unless `profile` was measured on `model`.

    The number of layers and, if recorded, the hidden size must be equal. So must the fingerprint of the weights and, if
    recorded, the active adapter and the fingerprint of the configuration; with allow_other_weights, differences in
    these are only warned about. again: what to do instead, for the message. fingerprint: of the model's weights; None
    to compute it.
    """
    model = unwrapped(model)
    config: Any = model.config
    shape = config.get_text_config(decoder=True)
    profile.check_num_layers(shape.num_hidden_layers)
    if profile.hidden_size not in (None, shape.hidden_size):
        raise ProfileError(
            f"profile of {profile.model} has hidden size {profile.hidden_size}, but the model has {shape.hidden_size}"
        )
    differences = [
        *_other_weights(profile, fingerprint or weights_fingerprint(model)),
        *_other_adapter(profile, model),
        *_other_config(profile, model),
    ]
    if not differences:
        return
    told = f"profile was measured on {profile.model}{', and '.join(differences)}"
    if not allow_other_weights:
        raise ProfileError(
            f"{told}; {again}, or accept the difference with allow_other_weights=True (command line: "
            "--allow-other-weights)"
        )
    name = getattr(model.config, "name_or_path", "") or type(model).__name__
    logger.warning("%s (%s); it is used anyway, because other weights are allowed", told, name)


def _other_weights(profile: Any, fingerprint: str) -> list[str]:
    if fingerprint == profile.weights_fingerprint:
        return []
    return [f" with weights {profile.weights_fingerprint}, but this model's weights are {fingerprint}"]


def _other_adapter(profile: Any, model: nn.Module) -> list[str]:
    adapter = active_adapters(model)
    if profile.adapter in (None, adapter):  # None: not recorded
        return []
    return [f" with active adapter {profile.adapter or 'none'!r}, but this model has {adapter or 'none'!r}"]


def _other_config(profile: Any, model: Any) -> list[str]:
    config = config_fingerprint(model.config)
    if profile.config_fingerprint in (None, config):  # None: not recorded
        return []
    return [
        f" with another configuration (such as rope, windows or norms: its fingerprint is "
        f"{profile.config_fingerprint}, this model's is {config})"
    ]
