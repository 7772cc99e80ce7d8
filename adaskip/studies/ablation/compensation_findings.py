"""The verdict on compensation in words, and its table; both are made from the saved divergences.

Every way is compared with Eq. (3)'s scale, prompt by prompt.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from adaskip.common.intervals import Estimate, mean, mean_estimate, mean_of_means_estimate
from adaskip.studies.observations.findings import Claim, Findings, Table
from adaskip.studies.tables import labels

NAME = "compensation"
NONE, SCALE, LEAST_SQUARES, AFFINE, SHIFT = "none", "scale", "least_squares", "affine", "shift"
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
"""As they are saved: phase, sublayers, and divergences by compensation and prompt."""


def difference(cell: Mapping[str, Any], name: str) -> Estimate:
    """Mean over prompts of the divergence less that under Eq. (3)'s scale, nats."""
    found = mean_estimate(_differences(cell, name))
    assert found is not None
    return found


def relative(cells: Cells, name: str) -> Estimate:
    """The same as a share of the mean under Eq. (3)'s scale, averaged over cells; the prompts of each phase are
    what is resampled."""
    by_phase: dict[str, list[list[float]]] = {}
    for cell in cells:
        shares = [x / mean(cell["divergences"][SCALE]) for x in _differences(cell, name)]
        by_phase.setdefault(cell["phase"], []).append(shares)
    return mean_of_means_estimate(
        [[mean(of_prompt) for of_prompt in zip(*shares, strict=True)] for shares in by_phase.values()]
    )


def beyond_chance(found: Estimate) -> int:
    """-1 if a difference lies below 0 with its whole interval, 1 if above, else 0."""
    assert found.low is not None
    assert found.high is not None
    return -1 if found.high < 0 else 1 if found.low > 0 else 0


def verdict(cells: Cells, name: str) -> str:
    """On one model: what holds over all cells, unless cells say the opposite beyond chance (mixed)."""
    overall = beyond_chance(relative(cells, name))
    found = {overall, *(beyond_chance(difference(cell, name)) for cell in cells)}
    return MIXED if {-1, 1} <= found else {-1: HELPS, 0: CHANCE, 1: HARMS}[overall]


def best(cells: Cells) -> str:
    """On one model: the way that helps and lowers divergence most; Eq. (3)'s scale if none helps."""
    helping = [name for name in OTHERS if verdict(cells, name) == HELPS]
    return min(helping, key=lambda name: relative(cells, name).value, default=SCALE)


def kept(results: Mapping[str, Any]) -> str:
    """The way that helps on every model, of several the one that lowers divergence most; else Eq. (3)'s scale."""
    helping = [name for name in OTHERS if all(verdict(each["cells"], name) == HELPS for each in results.values())]
    gains = {name: mean([relative(each["cells"], name).value for each in results.values()]) for name in helping}
    return min(gains, key=gains.__getitem__, default=SCALE)


def find(results: Mapping[str, Any], left_out: str | None = None) -> Findings:
    """results: by model, `sources` and `cells`. left_out: why stories260K is missing."""
    choice = kept(results)
    by_model = ", ".join(f"{LABELS[best(each['cells'])]} on {model}" for model, each in results.items())
    reason = "it helps on every model" if choice != SCALE else "no other way helps on every model"
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
            *([left_out] if left_out else []),
            f"Best of what helps, by model: {by_model}. Kept as the default: {LABELS[choice]}, since {reason}.",
        ],
        claims=[_claim(results, name) for name in OTHERS],
        table=_table(results),
        numbers=_numbers(results),
        sources={name: each["sources"] for name, each in results.items()},
        has_figure=False,
    )


def _differences(cell: Mapping[str, Any], name: str) -> list[float]:
    measured = cell["divergences"]
    return [ours - scale for ours, scale in zip(measured[name], measured[SCALE], strict=True)]


def _claim(results: Mapping[str, Any], name: str) -> Claim:
    outcomes = [beyond_chance(difference(cell, name)) for each in results.values() for cell in each["cells"]]
    told = []
    for model, each in results.items():
        found = relative(each["cells"], name)
        told.append(f"{model}: {verdict(each['cells'], name)} ({_percent(found)})")
    return Claim(
        f"{LABELS[name][0].upper()}{LABELS[name][1:]} diverges less than Eq. (3)'s scale beyond chance",
        outcomes.count(-1),
        len(outcomes),
        f"More beyond chance in {outcomes.count(1)}. Divergence against that under Eq. (3)'s scale by model: "
        f"{'; '.join(told)}.",
    )


def _percent(found: Estimate) -> str:
    ends = "" if found.low is None or found.high is None else f" [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"{100 * found.value:+.1f} %{ends}"


def _table(results: Mapping[str, Any]) -> Table:
    rows = []
    for model, each in results.items():
        for cell in each["cells"]:
            row = [model, labels.PHASES[cell["phase"]], str(cell["sublayers"])]
            row.append(f"{mean(cell['divergences'][SCALE]):.4f}")
            rows.append([*row, *(_text(cell, name) for name in OTHERS)])
    return Table(["Model", "Phase", "Skipped", *(LABELS[name] for name in (SCALE, *OTHERS))], rows)


def _text(cell: Mapping[str, Any], name: str) -> str:
    value, found = f"{mean(cell['divergences'][name]):.4f}", difference(cell, name)
    value = f"**{value}**" if beyond_chance(found) < 0 else value
    return f"{value} ({found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}])"


def _numbers(results: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [
        {
            **{"model": model, "phase": cell["phase"], "sublayers": cell["sublayers"], "compensation": name},
            "divergence": mean(cell["divergences"][name]),
            "difference": difference(cell, name).as_dict() if name != SCALE else None,
        }
        for model, each in results.items()
        for cell in each["cells"]
        for name in (SCALE, *OTHERS)
    ]
