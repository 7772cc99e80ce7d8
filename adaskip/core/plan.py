"""Sublayers, budgets, and skip plans: which sublayers are skipped, and how each is compensated.

A model of M decoder layers has 2M sublayers: M attention and M FFN. A `SkipPlan` lists the sublayers that are not
computed and the scale that replaces each (`h <- scale * h`, Eq. 4). A `Budget` is the number of skipped sublayers.
"""

from __future__ import annotations

import json
import math
import operator
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple, get_args

from adaskip.common.files import write_text_atomic
from adaskip.common.named_files import find_file, push_files, pushed_file, read_record, write_files
from adaskip.core.plan_card import CARD_FILE, check_card, model_card
from adaskip.core.plan_origin import PHASES, Phase, PlanOrigin, check_phase

__all__ = [
    "EMPTY_PLAN",
    "KINDS",
    "PHASES",
    "PLAN_FILE",
    "PLAN_FORMAT",
    "Affine",
    "Budget",
    "Compensation",
    "Phase",
    "PlanOrigin",
    "SkipPlan",
    "Sublayer",
    "SublayerKind",
    "check_phase",
    "every_sublayer",
]

SublayerKind = Literal["attention", "ffn"]
KINDS: tuple[SublayerKind, ...] = get_args(SublayerKind)
PLAN_FORMAT = "adaskip-skip-plan/1"
PLAN_FILE = "adaskip_plan.json"
"""The file name of the plan in a folder written by `save_pretrained`."""


class Sublayer(NamedTuple):
    """One attention or FFN sublayer of a decoder layer (0-based)."""

    kind: SublayerKind
    layer: int


def every_sublayer(num_layers: int) -> Iterator[Sublayer]:
    """All 2M sublayers in the order of computation."""
    return (Sublayer(kind, layer) for layer in range(num_layers) for kind in KINDS)


@dataclass(frozen=True)
class Affine:
    """Per-channel replacement of a sublayer: h <- scale * h + shift, with one scale and shift per channel."""

    scale: tuple[float, ...]
    shift: tuple[float, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "scale", tuple(_finite(x) for x in self.scale))
        object.__setattr__(self, "shift", tuple(_finite(x) for x in self.shift))
        if len(self.scale) != len(self.shift):
            raise ValueError(f"scale has {len(self.scale)} channels, shift has {len(self.shift)}; they must be equal")


Compensation = float | Affine


@dataclass(frozen=True)
class SkipPlan:
    """The sublayers that are not computed, and their scales.

    attention, ffn: 0-based layer indices. scales: the compensation of a skipped sublayer, a factor or an `Affine`;
    1.0 where none is given (the whole-layer baselines have none). The empty plan is the full model. Raises ValueError
    for layers that are not whole numbers from 0 on, and scales that are not finite or not of a skipped sublayer.

    keeps_kv: whether a skipped attention still writes the K/V of its input, so that it can run in later steps. Such a
    plan skips while a prompt is read; the prompt's last token and the answer run through the full model.
    origin: the model and phase that the plan was made for and how it was chosen (see `make_plan`); None of a plan that
    fits any model of its depth. It does not count when plans are compared.
    """

    attention: frozenset[int] = frozenset()
    ffn: frozenset[int] = frozenset()
    scales: Mapping[Sublayer, Compensation] = field(default_factory=dict)
    origin: PlanOrigin | None = field(default=None, compare=False)
    keeps_kv: bool = False

    def __post_init__(self) -> None:
        for kind in KINDS:
            if isinstance(given := getattr(self, kind), (str, Mapping)) or not isinstance(given, Iterable):
                raise ValueError(f"{kind} of a plan must be the indices of layers, such as {{3, 5}}; got {given!r}")
            object.__setattr__(self, kind, frozenset(map(_layer, given)))
        if not isinstance(self.scales, Mapping):
            raise ValueError(f"scales of a plan must map sublayers to factors; got {self.scales!r}")
        if unknown := [key for key in self.scales if key[0] not in KINDS]:
            raise ValueError(f"scale given for {unknown[0]!r}; kinds of sublayers are {', '.join(KINDS)}")
        scales = {Sublayer(kind, _layer(layer)): _checked(value) for (kind, layer), value in self.scales.items()}
        object.__setattr__(self, "scales", MappingProxyType(scales))
        if min(self.attention | self.ffn, default=0) < 0:
            raise ValueError(f"layer indices start at 0, got {min(self.attention | self.ffn)}")
        if stray := [sublayer for sublayer in scales if sublayer not in self]:
            raise ValueError(f"scale given for sublayers that are not skipped: {stray}")
        if not isinstance(self.keeps_kv, bool):
            raise ValueError(f"keeps_kv of a plan must be True or False; got {self.keeps_kv!r}")
        object.__setattr__(self, "keeps_kv", self.keeps_kv and len(self) > 0)  # the empty plan is the full model

    @classmethod
    def of_layers(cls, layers: Iterable[int], *, keeps_kv: bool = False) -> SkipPlan:
        """Whole layers, attention and FFN alike, without scales."""
        layers = frozenset(layers)
        return cls(attention=layers, ffn=layers, keeps_kv=keeps_kv)

    @classmethod
    def of_sublayers(cls, scales: Mapping[Sublayer, Compensation]) -> SkipPlan:
        """The sublayers that are keys of `scales`, compensated by its values."""
        return cls(
            attention=frozenset(s.layer for s in scales if s.kind == "attention"),
            ffn=frozenset(s.layer for s in scales if s.kind == "ffn"),
            scales=scales,
        )

    @property
    def sublayers(self) -> list[Sublayer]:
        """The skipped sublayers: attentions before FFNs, each in the order of layers."""
        return [Sublayer(kind, layer) for kind in KINDS for layer in sorted(getattr(self, kind))]

    def __contains__(self, sublayer: Sublayer) -> bool:
        return sublayer.layer in (self.attention if sublayer.kind == "attention" else self.ffn)

    def __len__(self) -> int:
        """Number of skipped sublayers."""
        return len(self.attention) + len(self.ffn)

    def __hash__(self) -> int:
        return hash((self.attention, self.ffn, frozenset(self.scales.items())))

    def __reduce__(self):  # a mapping proxy cannot be pickled or deep-copied by itself
        return type(self), (self.attention, self.ffn, dict(self.scales), self.origin, self.keeps_kv)

    def scale(self, kind: SublayerKind, layer: int) -> Compensation:
        """The compensation of a skipped sublayer, 1.0 if the plan gives none."""
        return self.scales.get(Sublayer(kind, layer), 1.0)

    def union(self, other: SkipPlan) -> SkipPlan:
        """Everything either plan skips; a sublayer that both skip has the compensation of this plan, which is 1.0 where
        it gives none. Keeps K/V if either does."""
        return SkipPlan(
            self.attention | other.attention,
            self.ffn | other.ffn,
            {**{sublayer: scale for sublayer, scale in other.scales.items() if sublayer not in self}, **self.scales},
            keeps_kv=self.keeps_kv or other.keeps_kv,
        )

    def attention_only(self) -> SkipPlan:
        """The part of the plan that decides which layers hold K/V: the attentions that write none."""
        if self.keeps_kv:
            return EMPTY_PLAN
        return SkipPlan(self.attention, scales={s: v for s, v in self.scales.items() if s.kind == "attention"})

    def check_fits(self, num_layers: int) -> None:
        """Raise ValueError unless all layers exist and at least one attention stays live."""
        if beyond := sorted(layer for layer in self.attention | self.ffn if layer >= num_layers):
            raise ValueError(f"plan skips layers {beyond}, but the model has layers 0..{num_layers - 1}")
        if len(self.attention) == num_layers:
            raise ValueError(f"plan skips the attention of all {num_layers} layers; at least one must stay live")

    def to_dict(self, *, scales: bool = False) -> dict[str, Any]:
        """The two sets as sorted lists, as they stand in a run's records; with `scales` all of it, for `from_dict`.

        scales: by kind and layer a number, or for an `Affine` its scale and shift. `keeps_kv` is left out if False.
        """
        sets: dict[str, Any] = {"attention": sorted(self.attention), "ffn": sorted(self.ffn)}
        if not scales:
            return sets
        given = sorted(self.scales.items(), key=lambda item: item[0])
        by_kind = {kind: {str(s.layer): _as_json(value) for s, value in given if s.kind == kind} for kind in KINDS}
        return {**sets, "scales": by_kind, **({"keeps_kv": True} if self.keeps_kv else {})}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> SkipPlan:
        """The plan that `to_dict(scales=True)` was made of, exactly.

        Raises ValueError for anything else; a run's records leave the scales out and cannot be read back.
        """
        if not isinstance(record, Mapping) or set(record) - {"keeps_kv"} != {*KINDS, "scales"}:
            found = list(record) if isinstance(record, Mapping) else record
            raise ValueError(
                f"a plan has fields attention, ffn and scales, as to_dict(scales=True) makes; got {found!r}"
            )
        for kind in KINDS:
            if not isinstance(record[kind], list):
                raise ValueError(f"{kind} of a plan must be a list of layers; got {record[kind]!r}")
        by_kind = _objects("scales of a plan", record["scales"], KINDS)
        scales = {
            Sublayer(kind, _layer(layer, of_text=True)): _from_json(value)
            for kind in KINDS
            for layer, value in _objects(f"scales of {kind}", by_kind[kind]).items()
        }
        return cls(record["attention"], record["ffn"], scales, keeps_kv=record.get("keeps_kv", False))

    def save(self, path: str | Path) -> Path:
        """Write the plan with its scales and origin as JSON, whole or not at all; `load` gives back an equal plan."""
        return write_text_atomic(path, self._json())

    def _json(self) -> str:
        if self.keeps_kv and self.origin is not None:
            raise ValueError("a plan with an origin is saved without keeps_kv; allowed: give the strategy keep_kv=True")
        origin = {} if self.origin is None else {"origin": self.origin.to_dict()}
        record = {"format": PLAN_FORMAT, **origin, **self.to_dict(scales=True)}
        return json.dumps(record, indent=None if self.origin is None else 2, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: str | Path) -> SkipPlan:
        """Read a saved plan. Raises FileNotFoundError if there is no file, ValueError if it is not a whole plan."""
        record = read_record(path, PLAN_FORMAT, "a skip plan")
        try:
            origin = PlanOrigin.from_dict(record.pop("origin")) if "origin" in record else None
            plan = replace(cls.from_dict(record), origin=origin)
            if origin is not None:
                plan.check_fits(origin.num_layers)
            return plan
        except ValueError as error:
            raise ValueError(f"{path} is not a whole skip plan: {error}") from error

    def save_pretrained(self, folder: str | Path) -> Path:
        """Write the plan and a model card into a folder, as `from_pretrained` takes it. Returns the folder.

        Raises ValueError for a plan without an origin, which `make_plan(model, strategy)` gives it, or with keeps_kv,
        and for a folder with a README.md that adaskip did not write.
        """
        files = self._files()
        check_card(Path(folder) / CARD_FILE)
        return write_files(folder, files)

    @classmethod
    def from_pretrained(cls, name: str | Path, *, revision: str | None = None) -> SkipPlan:
        """The plan of a folder or file, `org/name` on the Hub, or a name published with this package.

        revision: commit, branch or tag on the Hub. Raises FileNotFoundError if there is none of that name, ValueError
        if it is not a whole plan or cannot be downloaded.
        """
        return cls.load(find_file(name, PLAN_FILE, revision=revision))

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload what `save_pretrained` writes to a model repository of the Hub, made if need be; returns the URL.

        options: those of `push_files`: private, token, revision, commit_message. Raises ValueError like
        `save_pretrained`.
        """
        files = self._files()
        if card := pushed_file(repo_id, CARD_FILE, token=options.get("token"), revision=options.get("revision")):
            check_card(card, f"README.md of {repo_id}")
        return push_files(repo_id, files, **options)

    def _files(self) -> dict[str, str]:
        if self.origin is None:
            raise ValueError(
                "the plan does not say which model it is for; make_plan(model, strategy) makes one that does, of a "
                "plan chosen by hand with strategy=FixedPlan(num_layers=..., plan=plan)"
            )
        return {PLAN_FILE: self._json(), CARD_FILE: model_card(self, self.origin)}


def _layer(layer: Any, *, of_text: bool = False) -> int:
    """A layer's index as an int; keys of JSON objects are texts."""
    if of_text and isinstance(layer, str) and layer.isascii() and layer.isdigit() and str(int(layer)) == layer:
        return int(layer)
    if isinstance(layer, (bool, str)) or not hasattr(layer, "__index__"):
        raise ValueError(f"a layer's index must be a whole number; got {layer!r}")
    return operator.index(layer)


def _finite(value: Any) -> float:
    try:
        if isinstance(value, (bool, str)) or not hasattr(value, "__float__") or not math.isfinite(value):
            raise ValueError(f"a scale or shift must be a finite number; got {value!r}")
        return float(value)
    except OverflowError:
        raise ValueError("a scale or shift must be a finite number; got an integer beyond every float") from None


def _checked(scale: Compensation) -> Compensation:
    return scale if isinstance(scale, Affine) else _finite(scale)


def _as_json(scale: Compensation) -> Any:
    return {"scale": list(scale.scale), "shift": list(scale.shift)} if isinstance(scale, Affine) else scale


def _from_json(value: Any) -> Compensation:
    if not isinstance(value, dict):
        return _finite(value)
    parts = _objects("an affine compensation", value, ("scale", "shift"))
    if not all(isinstance(part, list) for part in parts.values()):
        raise ValueError(f"scale and shift of an affine compensation must be lists of numbers; got {parts!r}"[:200])
    return Affine(**{name: tuple(part) for name, part in parts.items()})


def _objects(what: str, value: Any, names: Iterable[str] | None = None) -> dict[str, Any]:
    """`value` if it is a JSON object, of exactly these names if they are given; else a ValueError."""
    if not isinstance(value, dict) or (names is not None and set(value) != set(names)):
        of = "" if names is None else f" of {' and '.join(names)}"
        raise ValueError(f"{what} must be an object{of}; got {value!r}"[:200])
    return value


EMPTY_PLAN = SkipPlan()


@dataclass(frozen=True)
class Budget:
    """How much is skipped, in exactly one unit.

    sublayers: number of sublayers. layers: whole layers (one layer = 2 sublayers). alpha: the paper's acceleration
    ratio, of which follow m = M - M / alpha layers (rounded to the nearest unit the strategy can skip).
    """

    sublayers: int | None = None
    layers: int | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give exactly one of sublayers, layers, alpha; got {given or 'none'}")
        (unit, value) = next(iter(given.items()))
        number = hasattr(value, "__float__") and not isinstance(value, bool)
        if unit != "alpha" and not (number and 0 <= value < math.inf and int(value) == value):
            raise ValueError(f"budget must be a whole number of {unit}, at least 0; got {value!r}")
        if unit == "alpha" and not (number and 1.0 <= value < math.inf):
            raise ValueError(f"acceleration ratio alpha must be at least 1.0 and finite; got {value!r}")

    def num_sublayers(self, num_layers: int) -> int:
        """Number of sublayers of a model of `num_layers` layers; at most 2 * num_layers - 1 (one attention stays)."""
        if self.alpha is not None:
            count = round(2 * (num_layers - num_layers / self.alpha))
        else:
            count = int(self.sublayers) if self.sublayers is not None else 2 * int(self.layers or 0)
        most = 2 * num_layers - 1
        if count > most:
            raise ValueError(
                f"budget of {count} sublayers ({self}) is too large; allowed for {num_layers} layers: 0..{most}"
            )
        return count

    def num_whole_layers(self, num_layers: int, most: int) -> int:
        """Number of whole layers; ValueError if that is not whole or more than `most`."""
        if self.alpha is not None:
            count = round(num_layers - num_layers / self.alpha)
        elif self.layers is not None:
            count = int(self.layers)
        elif int(self.sublayers or 0) % 2:
            raise ValueError(f"a whole-layer strategy needs an even number of sublayers; got {self.sublayers}")
        else:
            count = int(self.sublayers or 0) // 2
        if count > most:
            raise ValueError(
                f"budget of {count} layers = {2 * count} sublayers ({self}) is too large; "
                f"allowed for {num_layers} layers: 0..{most} layers = 0..{2 * most} sublayers"
            )
        return count

    def __str__(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in vars(self).items() if value is not None)
