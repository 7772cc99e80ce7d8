"""How the divergence of each strategy compares with calibrated's, and what its sets have cost, from saved results."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from math import inf, isfinite
from typing import Any

from pandas import DataFrame

from adaskip.common.intervals import Estimate, mean, mean_estimate
from adaskip.strategies import LABELS, POP, CalibratedSkip
from adaskip.studies.ablation.compensation_findings import beyond_chance
from adaskip.studies.study import Claim, Findings
from adaskip.studies.tables import labels

REFERENCE = CalibratedSkip.name
POP_NOTE = (
    "POP skips only while the prompt is read: half of its divergence is at tokens of the prompt, whose distributions "
    "its answers do not use."
)
KEPT_NOTE = (
    "Every strategy skips only while the prompt is read, up to its last token, and keeps the K/V (`--keep-kv`). "
    "Distributions are compared where the answer is chosen: at that token and the answer's."
)
Cell = dict[str, list[float]]
"""The divergences of one phase and budget: by row, a value per prompt, infinite after an overflow."""


def find(results: Mapping[str, Any]) -> list[Findings]:
    """The comparison and the costs. results: by model, `sources`, `prompts`, `costs` and `cells`."""
    return [_comparison(results), _cost(results)]


def cells_of(saved: Mapping[str, Any]) -> dict[tuple[str, int], Cell]:
    """By phase and number of sublayers; only cells that have calibrated."""
    found: dict[tuple[str, int], Cell] = {}
    for cell in saved["cells"]:
        values = [inf if value is None else value for value in cell["divergences"]]
        found.setdefault((cell["phase"], cell["sublayers"]), {})[cell["row"]] = values
    order = [*labels.PHASES]
    places = sorted(found, key=lambda place: (order.index(place[0]), place[1]))
    return {place: found[place] for place in places if REFERENCE in found[place]}


def difference(cell: Cell, name: str) -> Estimate:
    """A strategy's divergence less calibrated's, the mean over the prompts; without an interval after an overflow."""
    gaps = [theirs - ours for theirs, ours in zip(cell[name], cell[REFERENCE], strict=True)]
    if not all(map(isfinite, gaps)):
        overflows = sum(map(isfinite, cell[REFERENCE])) - sum(map(isfinite, cell[name]))
        return Estimate(inf if overflows > 0 else -inf if overflows < 0 else 0.0)
    found = mean_estimate(gaps)
    assert found is not None, "there are prompts"
    return found


def outcome(cell: Cell, name: str) -> int:
    """1 if the strategy diverges more than calibrated beyond chance, -1 if less, else 0."""
    found = difference(cell, name)
    if found.low is None or found.high is None:
        return (found.value == inf) - (found.value == -inf)
    return beyond_chance(found)


def _label(name: str) -> str:
    return LABELS.get(name, name)


def _comparison(results: Mapping[str, Any]) -> Findings:
    rows, numbers, sentences = [], [], []
    by_model = {model: cells_of(saved) for model, saved in results.items()}
    kept = any(saved["sources"].get("keep_kv") for saved in results.values())
    names = list(dict.fromkeys(name for cells in by_model.values() for cell in cells.values() for name in cell))
    names.sort(key=lambda name: (name != REFERENCE, name not in LABELS))
    places = [(model, *place, cell) for model, cells in by_model.items() for place, cell in cells.items()]
    for model, phase, sublayers, cell in places:
        about = {"model": model, "phase": phase, "sublayers": sublayers}
        told = {name: _text(cell, name) if name in cell else labels.MISSING for name in names}
        rows.append({"Model": model, "Phase": labels.PHASES[phase], "Skipped": str(sublayers)})
        rows[-1] |= {_label(name): text for name, text in told.items()}
        numbers += [{**about, "row": name, **_numbers(cell, name)} for name in names if name in cell]
        sentences.append(f"- {_sentence(about, cell)}")
    return Findings(
        name="peer_divergence",
        title="Divergence of each strategy's sets from the full model",
        notes=[
            "KL(full || skipped) of the next-token distribution in nats, the mean over prompts that chose no set, less "
            "is better, **bold** for the least of a row; in brackets the difference from Calibrated over the same "
            "prompts with its 95 % bootstrap interval. AdaSkip without online learning; SkipDecode with its full set.",
            *([KEPT_NOTE] if kept else [POP_NOTE] if POP.name in names else []),
            *(f"{model}: {_prompts(saved)}." for model, saved in results.items()),
        ],
        claims=[_claim(name, places) for name in names if name != REFERENCE],
        table=DataFrame(rows),
        numbers=numbers,
        sources={model: saved["sources"] for model, saved in results.items()},
        has_figure=False,
        closing=["\n".join(sentences)],
    )


def _prompts(saved: Mapping[str, Any]) -> str:
    return ", ".join(f"{each['count']} prompts in {labels.PHASES[phase]}" for phase, each in saved["prompts"].items())


def _numbers(cell: Cell, name: str) -> dict[str, Any]:
    value = mean(cell[name]) if all(map(isfinite, cell[name])) else None
    gap = None if name == REFERENCE else difference(cell, name)
    return {"divergence": value, "difference": gap.as_dict() if gap is not None and isfinite(gap.value) else None}


def _text(cell: Cell, name: str) -> str:
    if not all(map(isfinite, cell[name])):
        return "overflow"
    means = {other: mean(values) for other, values in cell.items()}
    value = f"**{means[name]:.4f}**" if means[name] == min(means.values()) else f"{means[name]:.4f}"
    if name == REFERENCE or (found := difference(cell, name)).low is None:
        return value
    return f"{value} ({found.value:+.4f} [{found.low:+.4f}, {found.high:+.4f}])"


def _sentence(about: Mapping[str, Any], cell: Cell) -> str:
    """Whether calibrated is below or above each other strategy, in one cell."""
    outcomes = {name: outcome(cell, name) for name in cell if name != REFERENCE}
    kinds = ((1, "below {} beyond chance"), (0, "within chance of {}"), (-1, "**above** {} beyond chance"))
    told = [
        text.format(", ".join(_label(name) for name, found in outcomes.items() if found == kind))
        for kind, text in kinds
        if kind in outcomes.values()
    ]
    where = f"{about['model']}, {labels.PHASES[about['phase']]}, {about['sublayers']} sublayers"
    return f"{where}: Calibrated is {'; '.join(told) or 'alone'}."


def _claim(name: str, places: list[tuple[str, str, int, Cell]]) -> Claim:
    outcomes = [outcome(cell, name) for *_, cell in places if name in cell]
    return Claim(
        f"{_label(name)} diverges more than Calibrated beyond chance",
        outcomes.count(1),
        len(outcomes),
        f"Less beyond chance in {outcomes.count(-1)}.",
    )


def _cost(results: Mapping[str, Any]) -> Findings:
    rows, numbers = [], []
    for model, saved in results.items():
        for each in saved["costs"]:
            cost = each["cost"]
            times = {unit: _times(each, unit) for unit in ("forwards", "tokens", "seconds")}
            sets, phase = each["sets"], each["phase"]
            rows.append(
                {
                    "Model": model,
                    "Strategy": _label(each["row"]),
                    "Phase": labels.PHASES[phase] if phase else "all",
                    "Sets": _sets(sets),
                    **{unit.capitalize(): f"{value:.1f}" for unit, value in times.items()},
                    "Time in s": labels.MISSING if cost is None else f"{cost['seconds']:.0f}",
                }
            )
            numbers.append({"model": model, **each, "times": times})
    return Findings(
        name="peer_cost",
        title="What choosing the sets has cost",
        notes=[
            "Forwards, tokens and seconds as multiples of AdaSkip's calibration on the same prompts and machine; a "
            "forward that runs only upper layers counts with all its tokens, and the seconds are what it took. Sets: "
            "the numbers of sublayers for which the method made one.",
        ],
        claims=[],
        table=DataFrame(rows),
        numbers=numbers,
        has_figure=False,
    )


def _times(each: Mapping[str, Any], unit: str) -> float:
    """The cost as a multiple of AdaSkip's calibration: 1 for what needs only that, 0 for what needs nothing."""
    cost = each["cost"]
    if cost is None:
        return float(each["calibrated"])
    own = cost["seconds"] if unit == "seconds" else cost[f"num_{unit}"]
    return own / cost[f"adaskip_{unit}"]


def _sets(sets: list[int]) -> str:
    if not sets:
        return "any"
    steps = {b - a for a, b in pairwise(sets)}
    if len(sets) < 4 or len(steps) > 1:
        return ", ".join(map(str, sets))
    return f"{sets[0]} to {sets[-1]}" + ("" if steps == {1} else f", every {steps.pop()}")
