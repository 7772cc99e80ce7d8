"""The options of `adaskip calibrate`, validated on construction."""

from __future__ import annotations

from dataclasses import dataclass

from adaskip.calibration.peers import settings_of
from adaskip.common.choices import check_choice
from adaskip.common.options import option
from adaskip.core.plan import PHASES
from adaskip.profiles.selection import METHODS, SEARCH
from adaskip.roofline import known_ceilings, known_devices
from adaskip.runs.config import MODEL_HELP, DataConfig, check_model


@dataclass(frozen=True, kw_only=True)
class CalibrateConfig(DataConfig):
    """Options of one profile, of importance or of the sets for a phase; runs with the same settings use it."""

    model: str = option(MODEL_HELP, required=True)
    output: str | None = option(
        "JSON file to which the profile is also written, for --profile; runs look for it in another place"
    )
    samples: int | None = option("number of calibration prompts; default: that of the protocol", least=1)
    batch_size: int = option("prompts per forward", 1, least=1)
    select: str | None = option(
        f"choose the sets of sublayers for this phase ({', '.join(PHASES)}) instead of measuring importance"
    )
    method: str = option(
        f"with --select: how, one of {', '.join(METHODS)}: a search for strategy calibrated, or what the strategy of "
        "that name needs",
        SEARCH,
        choices=[*METHODS],
    )
    keep_kv: bool = option(
        "with --select prefill: search sets for runs with --keep-kv, which skip only while the prompt is read", False
    )
    up_to: int | None = option(
        "with --select: size of the largest set; default: the largest budget of the protocol", least=1
    )
    budgets: tuple[int, ...] | None = option(
        "with --method evopress, which searches for each set, and with --refine: sizes of the sets; default: the "
        "budgets of the protocol",
        least=2,
        distinct=True,
    )
    effort: float | None = option(
        "with --method evopress: share of the published number of generations; default: 0.1. --seed is its seed, too; "
        "runs look for sets of the default effort and seed 0"
    )

    refine: str | None = option(
        "name or file of a selection made with --method search: adjust the scales of its sets to one another, by the "
        "output's divergence, and write the selection to --output"
    )
    faster_at: int | None = option(
        "with --select and --method search: among sets whose divergences do not differ significantly, choose the one "
        "that the roofline model predicts to be fastest for prompts of this many tokens and answers of the phase's cap",
        least=1,
    )
    speedup_on: str | None = option(
        f"GPU for which --faster-at predicts: {', '.join(known_devices())}; default: this device, whose ceilings are "
        "measured"
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_model(self, self.model)
        if self.select is not None:
            check_choice("phase", self.select, PHASES)
        if self.up_to is not None and self.select is None:
            raise ValueError(f"--up-to {self.up_to} needs --select")
        if self.keep_kv and (self.select != "prefill" or self.method != SEARCH):
            raise ValueError(
                f"--keep-kv needs --select prefill and --method {SEARCH}; given: --select {self.select}, --method "
                f"{self.method}"
            )
        if self.method != SEARCH and self.select is None:
            raise ValueError(f"--method {self.method} needs --select")
        if self.faster_at is not None and (self.select is None or self.method != SEARCH):
            raise ValueError(f"--faster-at {self.faster_at} needs --select and --method {SEARCH}")
        if self.speedup_on is not None:
            if self.faster_at is None:
                raise ValueError(f"--speedup-on {self.speedup_on} needs --faster-at, which it applies to")
            known_ceilings(self.speedup_on)
        if self.refine is not None:
            self._check_refine()
        elif not METHODS[self.method].one_by_one and (self.budgets or self.effort is not None):
            raise ValueError(
                f"--budgets are for --method evopress and --refine, --effort for evopress, not for {self.method}"
            )
        if self.batch_size != 1 and (self.method != SEARCH or self.refine is not None):
            raise ValueError(
                f"--batch-size {self.batch_size} is for importance and --method {SEARCH}; got "
                + (f"--method {self.method}" if self.refine is None else "--refine")
            )
        if METHODS[self.method].one_by_one and self.up_to is not None:
            raise ValueError(f"--method {self.method} searches for each set: give --budgets instead of --up-to")
        settings_of(self.method, self._given)  # raises ValueError for an impossible effort
        if self.tasks is not None and self.select is None and self.refine is None:
            raise ValueError(
                f"--tasks are the tasks for --select; importance is measured on {self.setup.calibration_task}: "
                f"give --select, too, or leave --tasks out; given: {' '.join(self.tasks)}"
            )

    def _check_refine(self) -> None:
        """The sets, their phase and what they keep are those of the selection."""
        if self.select is not None or self.effort is not None:
            raise ValueError(f"--refine {self.refine} takes sets that are made: leave out --select and --effort")
        if self.output is None or self.output_dir is not None:
            raise ValueError(
                f"--refine {self.refine} needs --output, the file for the refined selection, and takes no --output-dir"
            )

    @property
    def _given(self) -> dict[str, float]:
        return {} if self.effort is None else {"effort": self.effort}

    @property
    def settings(self) -> dict[str, float]:
        """All numbers of the method."""
        own = settings_of(self.method, self._given)
        return {**own, **({"seed": self.seed} if "seed" in own else {})}
