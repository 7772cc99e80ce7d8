"""The origin of a saved plan: the model and phase it was made for, and how it was chosen."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields
from typing import Any, Literal, get_args

Phase = Literal["prefill", "decode", "e2e"]
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")
PHASES: tuple[Phase, ...] = get_args(Phase)


def check_phase(phase: str) -> Phase:
    """`phase` itself if it is one of the three phases, else a ValueError that lists them."""
    if phase not in PHASES:
        raise ValueError(f"unknown phase {phase!r}; allowed: {', '.join(PHASES)}")
    return phase


@dataclass(frozen=True)
class PlanOrigin:
    """The model that a plan was made for, by the fields of `same_model.identity`, and how the plan was chosen.

    model: Hub id of the base model, file in a package, or absolute path of a folder or GGUF file. weights_fingerprint:
    its `portable_fingerprint`. phase: in phase decode the full model reads the prompt. strategy, budget, options: the
    strategy that chose the set, its budget by unit, and its options. profile: the provenance of the strategy's profile,
    without the measurements; None for a strategy without a profile. versions: of packages.
    """

    model: str
    num_layers: int
    hidden_size: int
    phase: Phase
    weights_fingerprint: str
    config_fingerprint: str
    adapter: str
    strategy: str
    budget: Mapping[str, int | float]
    options: Mapping[str, bool | int | float | str | None] = field(default_factory=dict)
    profile: Mapping[str, Any] | None = None
    versions: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_phase(self.phase)
        for name in ("model", "weights_fingerprint", "config_fingerprint", "adapter", "strategy"):
            if not isinstance(value := getattr(self, name), str):
                raise ValueError(f"{name} of a plan must be a string; got {value!r}")
        for name in ("num_layers", "hidden_size"):
            if isinstance(value := getattr(self, name), bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} of a plan must be a whole number of at least 1; got {value!r}")
        for name in ("budget", "options", "versions", "profile"):
            value = getattr(self, name)
            if not isinstance(value, Mapping) and not (name == "profile" and value is None):
                raise ValueError(f"{name} of a plan must be an object; got {value!r}")

    @property
    def on_hub(self) -> bool:
        """Whether the model is `org/name[@revision]`; what was on a disk is recorded by an absolute path."""
        return HUB_ID.fullmatch(self.model) is not None

    def to_dict(self) -> dict[str, Any]:
        """Its fields, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: Any) -> PlanOrigin:
        """The inverse of `to_dict`. Raises ValueError for an invalid record."""
        if not isinstance(record, Mapping):
            raise ValueError(f"the origin of a plan must be an object; got {record!r}"[:200])
        known = {f.name: f.default is MISSING and f.default_factory is MISSING for f in fields(cls)}
        missing = [name for name, needed in known.items() if needed and name not in record]
        unknown = [name for name in record if name not in known]
        if missing or unknown:
            wrong = [f"lacks {', '.join(missing)}"] if missing else []
            wrong += [f"has unknown fields {', '.join(unknown)}"] if unknown else []
            raise ValueError(f"the origin of a plan {' and '.join(wrong)}")
        return cls(**record)
