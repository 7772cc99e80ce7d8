"""Shared code of the profile classes: field checks, reading a file, and comparison with a model."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, fields
from typing import Any

from torch import nn

from adaskip.core.same_model import check_same_model, identity
from adaskip.core.wrappers import unwrapped


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
    config: Any = unwrapped(model).config
    check_same_model(
        profile,
        identity(model, fingerprint=fingerprint),
        config.get_text_config(decoder=True).num_hidden_layers,
        what="profile",
        again=again,
        allow_other_weights=allow_other_weights,
        error=ProfileError,
    )
