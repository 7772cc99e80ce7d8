"""What a strategy is: measurements in, skip plans out.

A strategy is an immutable value without model, tokenizer or I/O. Everything that changes while a request runs (its
decode step, its learning window) belongs to the request, so that one strategy serves any number of requests.

Its class also declares what the command line, the tables and the plots show of it; `register_strategy` checks that.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

from adaskip.core.look import Look
from adaskip.core.plan import EMPTY_PLAN, Budget, Phase, SkipPlan, check_phase


def strategy_option(help: str, default: Any) -> Any:
    """A field of a strategy that users may set on the command line, `--strategy-option NAME=VALUE`.

    Its type is bool, int, float or str, or one of them and None.
    """
    return field(default=default, metadata={"help": help})


@dataclass(frozen=True)
class FFNSimilarity:
    """IO similarity (Eq. 5) and scale of one FFN over a learning window."""

    similarity: float
    scale: float


@dataclass(frozen=True, kw_only=True)
class Strategy(ABC):
    """Decides what is skipped in a model of `num_layers` layers, given a budget.

    phase "prefill": the prompt and the few answer tokens after it, with one set. "decode": generated tokens only, the
    prompt is dense. "e2e": both.

    Class attributes that a registered strategy declares:

    name: as in `--strategy early_exit`. short_name: in the names of runs, as EE in `llama-EE-PREFILL`. label: in tables
    and legends. look: in plots.
    profile_type: the class of its field `profile` (`ImportanceProfile` or `SelectionProfile`), which is then measured,
    or searched, before a run; None for a strategy without that field.
    whole_layers: whether it can skip whole layers only, so that a budget is rounded to them.
    in_paper: whether it is one of those in the paper's Tables 3 and 4. in_grid: whether `adaskip grid` and `adaskip
    bench` run it by default, and tables and plots show it also where it was not run.
    """

    name: ClassVar[str]
    short_name: ClassVar[str]
    label: ClassVar[str]
    look: ClassVar[Look]
    profile_type: ClassVar[type | None] = None
    whole_layers: ClassVar[bool] = False
    in_paper: ClassVar[bool] = False
    in_grid: ClassVar[bool] = False

    num_layers: int
    budget: Budget
    phase: Phase = "e2e"

    def __post_init__(self) -> None:
        check_phase(self.phase)
        self.skipped.check_fits(self.num_layers)  # an impossible budget is refused here, not in the first request

    @property
    @abstractmethod
    def skipped(self) -> SkipPlan:
        """The full set the budget buys."""

    @property
    def prefill_plan(self) -> SkipPlan:
        """What is skipped for the tokens of a prompt; the same object each time."""
        return EMPTY_PLAN if self.phase == "decode" else self.skipped

    def decode_plan(self, step: int) -> SkipPlan:
        """What is skipped in decode step `step` (the first generated token is the input of step 1).

        Return the same plan object as long as nothing changes: a step compares plans by identity, and another object
        makes it set up every layer anew.
        """
        return self.skipped

    @property
    def is_steady(self) -> bool:
        """Whether every step of an answer runs under `skipped`, known beforehand."""
        return type(self).decode_plan is Strategy.decode_plan and not self.window_tokens

    @property
    def one_plan(self) -> bool:
        """Whether every forward of a request, prompt and answer, runs under the same plan, known beforehand."""
        return self.is_steady and self.prefill_plan == self.skipped

    @property
    def window_tokens(self) -> int:
        """Decoded tokens at the start of a request during which FFN similarity is measured; 0 for none."""
        return 0

    def learn(self, window: Mapping[int, FFNSimilarity]) -> SkipPlan:
        """FFNs that join the set for the rest of the request, from one request's window (layer -> similarity)."""
        return EMPTY_PLAN


@dataclass(frozen=True, kw_only=True)
class FixedPlan(Strategy):
    """A set chosen elsewhere: by hand, by a search, or read from a file."""

    name = "fixed"

    plan: SkipPlan
    budget: Budget = Budget(sublayers=0)  # noqa: RUF009 - frozen

    def __post_init__(self) -> None:
        object.__setattr__(self, "budget", Budget(sublayers=len(self.plan)))
        super().__post_init__()

    @property
    def skipped(self) -> SkipPlan:
        return self.plan
