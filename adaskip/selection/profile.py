"""The profile of a calibrated selection: which sublayers are skipped at each count, and what finding out has cost."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path

from torch import nn

from adaskip.files import write_text_atomic
from adaskip.fingerprint import weights_fingerprint
from adaskip.importance import ProfileError, read_fields
from adaskip.plan import Phase, SkipPlan, Sublayer, SublayerKind

FORMAT = "adaskip-selection-profile/1"


@dataclass(frozen=True)
class Selected:
    """The set chosen for one count.

    scales: attention and ffn, by layer, the compensation of each (Eq. 3). divergence: mean KL to the full model on the
    calibration prompts, nats. found_by: "search", or the strategy whose set it is.
    """

    attention: Mapping[int, float]
    ffn: Mapping[int, float]
    divergence: float
    found_by: str

    def __post_init__(self) -> None:
        for kind in ("attention", "ffn"):
            scales = {int(layer): float(scale) for layer, scale in getattr(self, kind).items()}
            object.__setattr__(self, kind, dict(sorted(scales.items())))

    @property
    def plan(self) -> SkipPlan:
        kinds: tuple[SublayerKind, ...] = ("attention", "ffn")
        return SkipPlan.of_sublayers({Sublayer(k, i): s for k in kinds for i, s in getattr(self, k).items()})


@dataclass(frozen=True)
class SearchCost:
    """What a selection took, and AdaSkip's calibration on the same prompts, run just before on the same machine."""

    num_forwards: int
    num_tokens: int
    seconds: float
    adaskip_forwards: int
    adaskip_tokens: int
    adaskip_seconds: float

    @property
    def multiple(self) -> float:
        """Measured time over that of AdaSkip's calibration."""
        return self.seconds / self.adaskip_seconds


@dataclass(frozen=True)
class SelectionProfile:
    """The sets chosen for one model in one phase, by their number of sublayers, 1 upwards without a gap.

    Other fields say what was measured on what.
    """

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

    def __post_init__(self) -> None:
        object.__setattr__(self, "data_ids", tuple(str(i) for i in self.data_ids))
        selected = {int(count): chosen for count, chosen in self.selected.items()}
        object.__setattr__(self, "selected", dict(sorted(selected.items())))
        if not selected or list(self.selected) != list(range(1, len(selected) + 1)):
            raise ProfileError(f"a selection has a set for each count from 1 on; got {list(self.selected)}")
        for count, chosen in selected.items():
            if len(chosen.plan) != count:
                raise ProfileError(f"the set for {count} sublayers has {len(chosen.plan)}")
            chosen.plan.check_fits(self.num_layers)

    @property
    def largest(self) -> int:
        """The largest number of sublayers a set was chosen for."""
        return len(self.selected)

    @property
    def nested(self) -> bool:
        """Whether each set contains the one before."""
        plans = [chosen.plan for chosen in self.selected.values()]
        return all(a.attention <= b.attention and a.ffn <= b.ffn for a, b in pairwise(plans))

    def check_fits(self, model: nn.Module) -> None:
        """Raise ProfileError unless `model` has the very weights the selection was made for."""
        fingerprint = weights_fingerprint(model)
        if fingerprint != self.weights_fingerprint:
            raise ProfileError(
                f"selection was made for {self.model} with weights {self.weights_fingerprint}, "
                f"this model's weights are {fingerprint}; select for this model"
            )

    def save(self, path: str | Path) -> Path:
        """Write the selection as JSON, whole or not at all."""
        return write_text_atomic(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=2) + "\n")

    @classmethod
    def load(cls, path: str | Path, model: nn.Module | None = None) -> SelectionProfile:
        """Read a saved selection; with `model`, refuse one that was made for another.

        Raises FileNotFoundError if there is no file and ProfileError if it is not a selection or does not fit.
        """
        fields = read_fields(path, FORMAT, "a selection profile")
        try:
            fields["selected"] = {count: Selected(**chosen) for count, chosen in fields["selected"].items()}
            fields["cost"] = SearchCost(**fields["cost"])
            selection = cls(**fields)
        except (KeyError, TypeError, AttributeError) as error:
            raise ProfileError(f"{path} is not a whole selection profile: {error}") from error
        if model is not None:
            selection.check_fits(model)
        return selection
