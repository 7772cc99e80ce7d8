"""The base class of strategies: they turn measurements into skip plans.

A strategy is an immutable value without model, tokenizer or I/O. Everything that changes during a request (its decode
step, its learning window) belongs to the request, so that one strategy serves any number of requests.

The class also declares its names for the command line, the tables and the plots; `register_strategy` checks them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, ClassVar

from adaskip.common.own_options import check_own_options, own_option
from adaskip.core.look import Look
from adaskip.core.plan import EMPTY_PLAN, PHASES, Budget, Phase, SkipPlan, check_phase


def strategy_option(help: str, default: Any) -> Any:
    """A field of a strategy that users may set on the command line with `--strategy-option NAME=VALUE`.

    Its type is bool, int, float or str, or the union of one of them with None.
    """
    return own_option(help, default)


@dataclass(frozen=True)
class FFNSimilarity:
    """Mean IO similarity (Eq. 5) and scale of one FFN over a learning window."""

    similarity: float
    scale: float


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """Decides which sublayers of a model with `num_layers` layers are skipped under a budget.

    phase: "prefill" skips in the prompt and, with the same set, in the few answer tokens after it; "decode" skips only
    in generated tokens, the full model reads the prompt; "e2e" skips in both.
    keep_kv: in phase prefill, skip only in the prompt, without its last token: skipped attentions write their K/V
    (`SkipPlan.keeps_kv`), and the full model answers. Not needed if `skipped` itself is a plan with keeps_kv=True.

    Class attributes that a registered strategy declares:

    name: e.g. `early_exit` in `--strategy early_exit`. short_name: its part of run names, e.g. EE in
    `llama-EE-PREFILL`. label: its name in tables and legends. look: its style in plots.
    profile_type: the class of its field `profile` (`ImportanceProfile` or `SelectionProfile`), which is measured or
    searched before a run; None for a strategy without that field.
    phases: those that the strategy is defined for.
    whole_layers: whether it can only skip whole layers, so that a budget is rounded to whole layers.
    in_paper: whether it is in the paper's Tables 3 and 4. in_grid: whether `adaskip grid` and `adaskip bench` run it by
    default; tables and plots then list it even without a run.
    """

    name: ClassVar[str]
    short_name: ClassVar[str]
    label: ClassVar[str]
    look: ClassVar[Look]
    profile_type: ClassVar[type | None] = None
    phases: ClassVar[tuple[Phase, ...]] = PHASES
    whole_layers: ClassVar[bool] = False
    in_paper: ClassVar[bool] = False
    in_grid: ClassVar[bool] = False

    num_layers: int
    budget: Budget
    phase: Phase = "e2e"
    keep_kv: bool = False

    def __post_init__(self) -> None:
        self._check_fields()
        if check_phase(self.phase) not in self.phases:
            raise ValueError(
                f"strategy {self.name} is defined for phase {' and '.join(self.phases)}; got phase {self.phase!r}"
            )
        if not isinstance(self.keep_kv, bool):
            raise ValueError(f"keep_kv of strategy {self.name} must be True or False; got {self.keep_kv!r}")
        if (self.keep_kv or self.skipped.keeps_kv) and self.phase != "prefill":
            raise ValueError(
                f"a set that keeps the K/V is skipped only while a prompt is read, in phase 'prefill'; strategy "
                f"{self.name} has one in phase {self.phase!r}"
            )
        self.skipped.check_fits(self.num_layers)  # refuse an impossible budget now rather than in the first request
        if self.keep_kv or self.skipped.keeps_kv:
            self._check_full_answer()

    def _check_fields(self) -> None:
        """Refuse values of other types than the fields have."""
        if isinstance(self.num_layers, bool) or not isinstance(self.num_layers, int) or self.num_layers < 1:
            raise ValueError(
                f"num_layers of strategy {self.name} must be a whole number above 0; got {self.num_layers!r}"
            )
        if not isinstance(self.budget, Budget):
            raise ValueError(
                f"budget of strategy {self.name} must be a Budget, e.g. Budget(sublayers=4); got {self.budget!r}"
            )
        kind, profile = self.profile_type, getattr(self, "profile", None)
        if kind is not None and not isinstance(profile, kind):
            raise ValueError(
                f"profile of strategy {self.name} must be of class {kind.__name__}; got {type(profile).__name__}"
            )
        check_own_options(f"strategy {self.name}", self)

    def _check_full_answer(self) -> None:
        """Refuse a class with its own `prefill_plan` or learning window that would skip in the full model's answer."""
        if len(self.prefill_plan) and not self.is_prompt_only:
            raise ValueError(
                f"strategy {self.name} is to keep the K/V of its set, but its own prefill_plan does not; allowed: a "
                "prefill_plan with keeps_kv=True"
            )
        if self.window_tokens:
            raise ValueError(
                f"strategy {self.name} keeps the K/V of the prompt, so the full model answers, but it has a learning "
                f"window of {self.window_tokens} tokens; allowed: 0"
            )

    @property
    @abstractmethod
    def skipped(self) -> SkipPlan:
        """The full set of skipped sublayers, as many as the budget says."""

    @cached_property
    def prefill_plan(self) -> SkipPlan:
        """The plan for the tokens of a prompt; always the same object."""
        if self.phase == "decode":
            return EMPTY_PLAN
        return replace(self.skipped, keeps_kv=True) if self.keep_kv else self.skipped

    @property
    def is_prompt_only(self) -> bool:
        """Whether the full model answers, over the K/V that skipped attentions have written."""
        return self.prefill_plan.keeps_kv

    def decode_plan(self, step: int) -> SkipPlan:
        """The plan for decode step `step` (the first generated token is the input of step 1).

        Return the same object while nothing changes: plans are compared by identity, and a new object makes the step
        set up every layer again.
        """
        return EMPTY_PLAN if self.is_prompt_only else self.skipped

    @property
    def is_steady(self) -> bool:
        """Whether every step of an answer runs under `skipped`, which is known in advance."""
        constant = type(self).decode_plan is Strategy.decode_plan and not self.window_tokens
        return constant and not self.is_prompt_only

    @property
    def one_plan(self) -> bool:
        """Whether every forward of a request, prompt and answer, runs under one plan that is known in advance."""
        return self.is_steady and self.prefill_plan == self.skipped

    @property
    def window_tokens(self) -> int:
        """Decoded tokens at the start of a request during which FFN similarity is measured; 0 for none."""
        return 0

    def learn(self, window: Mapping[int, FFNSimilarity]) -> SkipPlan:
        """The FFNs to skip from now on in one request, chosen from its learning window (layer -> similarity)."""
        return EMPTY_PLAN


@dataclass(frozen=True, kw_only=True)
class FixedPlan(Strategy):
    """Skip the sublayers of `plan`, which was chosen by hand or by a search, or read from a file."""

    name = "fixed"

    plan: SkipPlan
    budget: Budget = Budget(sublayers=0)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget(sublayers=len(self.plan)))
        super().__post_init__()

    @property
    def skipped(self) -> SkipPlan:
        return self.plan
