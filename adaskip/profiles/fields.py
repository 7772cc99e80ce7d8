"""Shared code of the profile classes: field checks, reading a file, and comparison with a model."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import nn

from adaskip.common.files import write_text_atomic
from adaskip.common.named_files import find_file, read_record
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


class Profile:
    """The methods that importance and selection profiles share; a subclass is a dataclass with the checked fields.

    FORMAT: of its files. FILE: name of its file in a folder or a repository on the Hub. KIND, AGAIN: what it is and how
    to make another one, in errors.
    """

    FORMAT: ClassVar[str]
    FILE: ClassVar[str]
    KIND: ClassVar[str]
    AGAIN: ClassVar[str]

    def check_num_layers(self: Any, num_layers: int) -> None:
        """Raise ProfileError unless the profile has `num_layers` layers."""
        if num_layers != self.num_layers:
            raise ProfileError(
                f"{self.KIND} of {self.model} has {self.num_layers} layers, but the model has {num_layers}"
            )

    def check_fits(
        self, model: nn.Module, *, allow_other_weights: bool = False, weights_fingerprint: str | None = None
    ) -> None:
        """Raise ProfileError unless `model` has the weights, adapter and configuration that the profile was made for.

        allow_other_weights: only warn if a model of the same depth and width has other weights (a fine-tune, a
        quantised copy), another adapter or another configuration. weights_fingerprint: that of the model; None to
        compute it.
        """
        config: Any = unwrapped(model).config
        check_same_model(
            self,
            identity(model, fingerprint=weights_fingerprint),
            config.get_text_config(decoder=True).num_hidden_layers,
            what="profile",
            again=self.AGAIN,
            allow_other_weights=allow_other_weights,
            error=ProfileError,
        )

    def save(self: Any, path: str | Path) -> Path:
        """Write the profile as JSON, atomically."""
        return write_text_atomic(path, json.dumps({"format": self.FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None, *, allow_other_weights: bool = False) -> Self:
        """Read a saved profile, and check with `check_fits` that it was made for `model` if that is given.

        path: a file, a folder or a repository `org/name` of the Hub with `FILE`, or a name published with this package.

        Raises FileNotFoundError if there is no file and ProfileError if it is not a profile or does not fit.
        """
        path = find_file(path, cls.FILE)
        record = read_record(path, cls.FORMAT, f"a saved {cls.KIND}", ProfileError)
        try:
            profile: Self = built(cls, "it", {**record, **cls._parts(record)})
        except ProfileError as error:
            raise ProfileError(f"{path} is not a valid {cls.KIND}: {error}") from error
        if model is not None:
            profile.check_fits(model, allow_other_weights=allow_other_weights)
        return profile

    @classmethod
    def _parts(cls, record: dict[str, Any]) -> dict[str, Any]:
        """The fields of a record that are objects, if present, as such."""
        raise NotImplementedError
