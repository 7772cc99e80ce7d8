"""The selection profile: the set of sublayers for each budget, the method that chose them, and what that cost."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from adaskip.core.plan import KINDS, PHASES, Phase, SkipPlan, Sublayer
from adaskip.profiles.fields import Profile, ProfileError, built, check_record, finite, whole

ROUNDING = 1e-6  # nats; rounding may make a divergence negative by this much
SEARCH = "search"
"""The method of strategy `calibrated`."""


@dataclass(frozen=True)
class Method:
    """A way to choose sets.

    by_phase: whether they depend on the phase. step: a set has a multiple of this many sublayers. criterion: how to
    write the value that the method minimises, which is the `divergence` of its sets. one_by_one: whether each set takes
    a search of its own, so that only those of the budgets are made.
    """

    by_phase: bool
    step: int
    criterion: str
    one_by_one: bool = False

    def counts(self, up_to: int) -> list[int]:
        """The numbers of sublayers up to `up_to` for which the method makes sets."""
        return list(range(self.step, up_to + 1, self.step))


METHODS: Mapping[str, Method] = {
    SEARCH: Method(by_phase=True, step=1, criterion="KL {:.4f} nats"),
    "cosine_window": Method(by_phase=False, step=2, criterion="angle {:.4f} pi"),
    "blockpruner": Method(by_phase=False, step=1, criterion="loss {:.4f} nats"),
    "evopress": Method(by_phase=True, step=2, criterion="KL {:.4f} nats", one_by_one=True),
}
"""The methods that make selections; all but the first are those of other papers (see `calibration.peers`)."""


@dataclass(frozen=True)
class Selected:
    """The set chosen for one number of sublayers.

    attention, ffn: scale (Eq. 3, above 0) of each skipped sublayer, by layer; 1 with a method that uses none.
    divergence: mean KL divergence from the full model on the calibration prompts, in nats, or what else the method
    minimises; finite. found_by: "search", or the name of the strategy whose set it is. Raises ProfileError for other
    values.
    """

    attention: Mapping[int, float]
    ffn: Mapping[int, float]
    divergence: float
    found_by: str

    def __post_init__(self) -> None:
        for kind in KINDS:
            if not isinstance(given := getattr(self, kind), Mapping):
                raise ProfileError(f"{kind} must map layers to scales; got {given!r}")
            scales = {whole_key("a layer", layer, 0): _scale(kind, layer, scale) for layer, scale in given.items()}
            object.__setattr__(self, kind, dict(sorted(scales.items())))
        object.__setattr__(self, "divergence", finite("a divergence", self.divergence, -ROUNDING))
        if not isinstance(self.found_by, str):
            raise ProfileError(f"found_by must be a string; got {self.found_by!r}")

    @property
    def plan(self) -> SkipPlan:
        return SkipPlan.of_sublayers({Sublayer(k, i): s for k in KINDS for i, s in getattr(self, k).items()})


def whole_key(what: str, key: int | str, least: int) -> int:
    """A key of a mapping (in JSON a string) as an int; ProfileError unless it is a whole number of at least `least`."""
    is_text = isinstance(key, str) and key.isascii() and key.isdigit() and str(int(key)) == key
    return whole(what, int(key) if is_text else key, least)


def _scale(kind: str, layer: int | str, scale: float) -> float:
    what = f"the scale of {kind} {layer}"
    if not finite(what, scale) > 0:
        raise ProfileError(f"{what} must be above 0; got {scale!r}")
    return float(scale)


@dataclass(frozen=True)
class SearchCost:
    """The cost of a search, and of AdaSkip's calibration on the same prompts and machine, for comparison.

    A forward that runs only the upper layers counts as one forward with all its tokens, as do both parts of a prompt
    and its answer where the K/V are kept; `seconds` is the time it took.
    """

    num_forwards: int
    num_tokens: int
    seconds: float
    adaskip_forwards: int
    adaskip_tokens: int
    adaskip_seconds: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            finite(name, value, 0) if name.endswith("seconds") else whole(name, value, 0)

    @property
    def multiple(self) -> float:
        """Time of the search divided by the time of AdaSkip's calibration."""
        return self.seconds / self.adaskip_seconds


@dataclass(frozen=True)
class SelectionProfile(Profile):
    """The sets chosen for one model in one phase, by number of sublayers; there may be numbers without a set.

    method: what chose the sets, one of `METHODS`. settings: the numbers that the method was given. keep_kv: whether the
    sets were searched for strategies with keep_kv=True, which skip only while the prompt is read. The other fields
    record the model and the data, as in an `ImportanceProfile`.
    """

    FORMAT = "adaskip-selection-profile/1"
    FILE = "adaskip_selection.json"
    KIND = "selection profile"
    AGAIN = "select for this model"

    selected: Mapping[int, Selected]
    phase: Phase
    num_layers: int
    cost: SearchCost
    model: str
    weights_fingerprint: str
    dtype: str
    attn_implementation: str
    dataset: str
    data_ids: tuple[str, ...]
    versions: Mapping[str, str] = field(default_factory=dict)
    hidden_size: int | None = None
    adapter: str | None = None
    prompts_begin_with_bos: bool | None = None
    config_fingerprint: str | None = None
    tokenizer_files: str | None = None
    method: str = SEARCH
    settings: Mapping[str, float] = field(default_factory=dict)
    keep_kv: bool = False

    def __post_init__(self) -> None:
        check_record(self)
        whole("num_layers", self.num_layers, 1)
        if self.phase not in PHASES:
            raise ProfileError(f"phase of a selection must be one of {', '.join(PHASES)}; got {self.phase!r}")
        selected = {whole_key("a number of sublayers", count, 1): chosen for count, chosen in self.selected.items()}
        object.__setattr__(self, "selected", dict(sorted(selected.items())))
        if not selected:
            raise ProfileError("a selection must have at least one set; got none")
        if self.method not in METHODS:
            raise ProfileError(f"method of a selection must be one of {', '.join(METHODS)}; got {self.method!r}")
        if not isinstance(self.settings, Mapping):
            raise ProfileError(f"settings must map names to numbers; got {self.settings!r}")
        for name, value in self.settings.items():
            finite(f"setting {name}", value)
        if not isinstance(self.keep_kv, bool):
            raise ProfileError(f"keep_kv of a selection must be true or false; got {self.keep_kv!r}")
        if self.keep_kv:
            check_keeps_kv(self.phase, self.method)
        for count, chosen in selected.items():
            if len(chosen.plan) != count:
                raise ProfileError(f"the set for {count} sublayers has {len(chosen.plan)} sublayers")
            _check_plan(chosen.plan, self.num_layers)

    @property
    def largest(self) -> int:
        """The largest number of sublayers that has a set."""
        return max(self.selected)

    @property
    def nested(self) -> bool:
        """Whether each set contains the one before."""
        plans = [chosen.plan for chosen in self.selected.values()]
        return all(a.attention <= b.attention and a.ffn <= b.ffn for a, b in pairwise(plans))

    @classmethod
    def _parts(cls, record: dict[str, Any]) -> dict[str, Any]:
        parts: dict[str, Any] = {}
        if "selected" in record:
            if not isinstance(record["selected"], dict):
                raise ProfileError(f"selected must map numbers of sublayers to sets; got {record['selected']!r}")
            sets = record["selected"].items()
            parts["selected"] = {count: built(Selected, f"the set for {count}", chosen) for count, chosen in sets}
        if "cost" in record:
            parts["cost"] = built(SearchCost, "cost", record["cost"])
        return parts


def check_keeps_kv(phase: str, method: str) -> None:
    """Raise ProfileError unless `method` can search sets for `phase` that are skipped only while the prompt is read."""
    if phase != "prefill" or method != SEARCH:
        raise ProfileError(
            f"sets that keep the K/V are searched in phase prefill with method {SEARCH}; got phase {phase!r} and "
            f"method {method!r}"
        )


def _check_plan(plan: SkipPlan, num_layers: int) -> None:
    try:
        plan.check_fits(num_layers)
    except ValueError as error:
        raise ProfileError(str(error)) from error
