"""The verdict on compensation, and its table, from the saved divergences.

Every compensation is compared with the scale of Eq. (3), prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pandas import DataFrame

from adaskip.calibration.compensation import AFFINE, LEAST_SQUARES, NONE, SCALE, SHIFT
from adaskip.common.intervals import Estimate, mean, mean_estimate, mean_of_means_estimate
from adaskip.models.stories import NOT_AT_HAND, STORIES
from adaskip.studies.study import Claim, Findings
from adaskip.studies.tables import labels

NAME = "compensation"
LABELS = {
    SCALE: "scale of Eq. (3)",
    NONE: "no compensation",
    LEAST_SQUARES: "least-squares scale",
    AFFINE: "affine per channel",
    SHIFT: "scale of Eq. (3) and shift per channel",
}
OTHERS = (NONE, LEAST_SQUARES, AFFINE, SHIFT)
HELPS, HARMS, MIXED, CHANCE = "helps", "harms", "mixed", "within chance"

Cells = list[dict[str, Any]]
"""Saved cells: phase, sublayers, and divergences by compensation and prompt."""


def _differences(cell: Mapping[str, Any], name: str) -> list[float]:
    """For each prompt the divergence minus that with the scale of Eq. (3), in nats."""
    measured = cell["divergences"]
    return [ours - scale for ours, scale in zip(measured[name], measured[SCALE], strict=True)]


def difference(cell: Mapping[str, Any], name: str) -> Estimate:
    """The mean of the differences."""
    found = mean_estimate(_differences(cell, name))
    assert found is not None, "there are prompts"
    return found


def relative(cells: Cells, name: str) -> Estimate:
    """The difference relative to the mean with the scale of Eq. (3), averaged over cells; bootstrap over the prompts of
    each phase."""
    by_phase: dict[str, list[list[float]]] = {}
    for cell in cells:
        shares = [x / mean(cell["divergences"][SCALE]) for x in _differences(cell, name)]
        by_phase.setdefault(cell["phase"], []).append(shares)
    return mean_of_means_estimate(
        [[mean(of_prompt) for of_prompt in zip(*shares, strict=True)] for shares in by_phase.values()]
    )


def beyond_chance(found: Estimate) -> int:
    """-1 if the whole interval of a difference is below 0, 1 if above, else 0."""
    assert found.low is not None
    assert found.high is not None
    return -1 if found.high < 0 else 1 if found.low > 0 else 0


def verdict(cells: Cells, name: str) -> str:
    """The verdict on one model over all cells; mixed if a cell significantly shows the opposite."""
    overall = beyond_chance(relative(cells, name))
    found = {overall, *(beyond_chance(difference(cell, name)) for cell in cells)}
    return MIXED if {-1, 1} <= found else {-1: HELPS, 0: CHANCE, 1: HARMS}[overall]


def best(*models: Cells) -> str:
    """The compensation that helps on all of these models and lowers divergence most on average; the scale of Eq. (3)
    if none does."""
    helping = [name for name in OTHERS if all(verdict(cells, name) == HELPS for cells in models)]
    gains = {name: mean([relative(cells, name).value for cells in models]) for name in helping}
    return min(gains, key=gains.__getitem__, default=SCALE)


def find(results: Mapping[str, Any]) -> Findings:
    """results: by model, `sources` and `cells`."""
    by_model = {model: each["cells"] for model, each in results.items()}
    choice = best(*by_model.values())
    told = ", ".join(f"{LABELS[best(cells)]} on {model}" for model, cells in by_model.items())
    reason = "it helps on every model" if choice != SCALE else "no other way helps on every model"
    summary = f"Best of what helps, by model: {told}. Kept as the default: {LABELS[choice]}, since {reason}."
    rows, numbers = [], []
    for model, cell in ((model, cell) for model, cells in by_model.items() for cell in cells):
        row = {"Model": model, "Phase": labels.PHASES[cell["phase"]], "Skipped": str(cell["sublayers"])}
        about = {"model": model, "phase": cell["phase"], "sublayers": cell["sublayers"]}
        for name in (SCALE, *OTHERS):
            value, found = mean(cell["divergences"][name]), difference(cell, name) if name != SCALE else None
            row[LABELS[name]] = f"{value:.4f}" if found is None else _text(value, found)
            of_name = {"divergence": value, "difference": found and found.as_dict()}
            numbers.append({**about, "compensation": name, **of_name})
        rows.append(row)
    return Findings(
        name=NAME,
        title="What stands in for a skipped sublayer",
        notes=[
            "AdaSkip's sets, each sublayer replaced by the identity (no compensation), the scale of Eq. (3), the "
            "least-squares scale, a least-squares scale and shift per channel (affine), or Eq. (3)'s scale with a "
            "least-squares shift per channel. Fitted on the calibration prompts' tokens. None costs a matrix product.",
            "Shown is KL(full || skipped) of the next-token distribution in nats on prompts that calibrated nothing "
            "and test nothing, less is better; in brackets the mean difference from Eq. (3)'s scale over the same "
            "prompts with its 95 % bootstrap interval, **bold** where it is better beyond chance.",
            *([] if STORIES in results else [NOT_AT_HAND]),
            summary,
        ],
        claims=[_claim(by_model, name) for name in OTHERS],
        table=DataFrame(rows),
        numbers=numbers,
        sources={name: each["sources"] for name, each in results.items()},
        has_figure=False,
        summary=summary,
    )


def _text(value: float, found: Estimate) -> str:
    shown = f"**{value:.4f}**" if beyond_chance(found) < 0 else f"{value:.4f}"
    return f"{shown} ({found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}])"


def _claim(by_model: Mapping[str, Cells], name: str) -> Claim:
    outcomes = [beyond_chance(difference(cell, name)) for cells in by_model.values() for cell in cells]
    told = []
    for model, cells in by_model.items():
        found = relative(cells, name)
        ends = "" if found.low is None or found.high is None else f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
        told.append(f"{model}: {verdict(cells, name)} ({100 * found.value:+.1f} %{ends})")
    return Claim(
        f"{LABELS[name][0].upper()}{LABELS[name][1:]} diverges less than Eq. (3)'s scale beyond chance",
        outcomes.count(-1),
        len(outcomes),
        f"More beyond chance in {outcomes.count(1)}. Divergence against that under Eq. (3)'s scale by model: "
        f"{'; '.join(told)}.",
    )
