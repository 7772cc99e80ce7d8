"""What online learning brings: against none with the same offline set, and against as many sublayers chosen offline.

Differences are paired by sample, with 95 % bootstrap intervals. Learning online skips more, and who skips more keeps
less; so the question is whether what is learnt is better than what a larger offline budget would have added. Between
two budgets a sample's quality is interpolated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from pandas import DataFrame, concat

from adaskip.common.intervals import Estimate, mean, mean_estimate
from adaskip.models.stories import NOT_AT_HAND, STORIES
from adaskip.strategies.adaskip import LEARNING_WINDOW
from adaskip.studies.ablation import online
from adaskip.studies.ablation.online import AblationConfig, Results, Variant
from adaskip.studies.plots.style import BLUE, GREEN, ORANGE, PURPLE, SKY, save, styled
from adaskip.studies.study import Claim, Findings, Study
from adaskip.studies.tables import labels

NAME = "online_ablation"
BETTER, WORSE, CHANCE, BEYOND, NOTHING = "better", "worse", "within chance", "beyond the offline sets", "adds nothing"
COLORS = (SKY, BLUE, GREEN, ORANGE, PURPLE)
"""By P, in order; more than these begin again."""
MARKERS = ("v", "s", "D", "^", "o")
"""By beta: quantiles rising, the paper's last."""
OFFLINE_LINE = {"color": "black", "marker": ".", "linewidth": 0.9, "markersize": 5, "zorder": 1}
HEADER = (
    *("Model", "Budget", "P", "beta", "fired", "FFNs added", "skipped per step", "quality"),
    *("gain over off", "gain over as many offline", "verdict"),
)


COLUMNS = ("id", "quality", "skipped", "added", "tpot_ms")
Samples = Mapping[Variant, DataFrame]
"""Of one model; its frames have `COLUMNS` and the same samples in the same order."""


@dataclass(frozen=True)
class Compared:
    """One variant over all samples of a group of models.

    skipped: sublayers per decode step. added: FFNs that joined, per request. fired: share of requests in which any did.
    over_off: quality gained over the same offline set. over_offline: over offline sets of as many sublayers, None
    beyond the largest. verdict: on the latter.
    """

    variant: Variant
    quality: Estimate
    skipped: float
    added: float
    fired: float
    over_off: Estimate
    over_offline: Estimate | None
    verdict: str


def compare(models: Sequence[Samples], variant: Variant) -> Compared:
    """One variant against offline sets, model by model."""
    ours = concat([samples[variant] for samples in models])
    off = concat([samples[Variant(variant.sublayers) if variant.window else variant] for samples in models])
    expected = [quality for samples in models for quality in _offline_quality(samples, variant)]
    over_offline, verdict = None, BEYOND if ours.added.any() else NOTHING
    if len(expected) == len(ours):
        over_offline = _estimate(ours.quality.to_numpy() - expected)
        if ours.added.any():
            low, high = over_offline.low or 0.0, over_offline.high or 0.0
            verdict = BETTER if low > 0 else WORSE if high < 0 else CHANCE
    return Compared(
        variant,
        quality=_estimate(ours.quality.to_numpy()),
        skipped=mean(ours.skipped.tolist()),
        added=mean(ours.added.tolist()),
        fired=mean((ours.added > 0).astype(float).tolist()),
        over_off=_estimate(ours.quality.to_numpy() - off.quality.to_numpy()),
        over_offline=over_offline,
        verdict=verdict,
    )


def _offline_quality(samples: Samples, variant: Variant) -> list[float]:
    """Each sample's quality if as many sublayers as the variant skips on average had been skipped offline; nothing
    where that is beyond the offline sets."""
    wanted = mean(samples[variant].skipped.tolist())
    budgets = sorted(v.sublayers for v in samples if not v.window and v.sublayers)
    if not budgets[0] <= wanted <= budgets[-1]:
        return []
    above = next(budget for budget in budgets if budget >= wanted)
    below = max((budget for budget in budgets if budget <= wanted), default=above)
    weight = (wanted - below) / (above - below) if above > below else 0.0
    fewer, more = (samples[Variant(budget)].quality for budget in (below, above))
    return ((1 - weight) * fewer + weight * more).tolist()


def _estimate(values: np.ndarray) -> Estimate:
    estimate = mean_estimate(values.tolist())
    assert estimate is not None, "every variant has samples"
    return estimate


@dataclass(frozen=True)
class Group:
    """Models of one measure and the same variants, whose samples are taken together."""

    name: str
    is_score: bool
    off: list[Compared]
    learning: list[Compared]


def groups(results: Mapping[str, Results]) -> list[Group]:
    """Models that run tasks, by the variants that were run, and stories260K."""
    alike: dict[tuple[str, tuple[Variant, ...]], dict[str, Samples]] = {}
    for name, each in sorted(results.items(), key=lambda item: item[1]["measure"] != online.SCORE):
        samples = {
            Variant(v["sublayers"], v["window"], v["quantile"]): DataFrame(v["samples"], columns=list(COLUMNS))
            for v in each["variants"]
        }
        alike.setdefault((each["measure"], tuple(samples)), {})[name] = samples
    found = []
    for (measure, variants), models in alike.items():
        compared = [compare(list(models.values()), variant) for variant in variants]
        off, learning = ([c for c in compared if bool(c.variant.window) is learns] for learns in (False, True))
        found.append(Group(", ".join(models), measure == online.SCORE, off, learning))
    return found


def find(results: Mapping[str, Results]) -> Findings:
    """The claims and the table of every group of models."""
    found = groups(results)
    return Findings(
        name=NAME,
        title="Ablation: learning online which further FFNs to skip",
        notes=[
            "AdaSkip in the decode phase. Without online learning (off) at several budgets; with it at the least "
            "budget, with P tokens of learning window and beta, which FFNs must exceed to join: the paper's (the least "
            "offline similarity in the set), or a quantile of the offline similarities of all FFNs.",
            f"Quality: {_quality(results)}. More is better. Gains are mean differences over the same samples with 95 % "
            "bootstrap intervals: over the same offline set, and over offline sets of as many sublayers (interpolated "
            "between budgets). Speed is told as sublayers skipped per decode step, which is exact; the times of runs "
            "are of different moments and give no speedup.",
            *([] if STORIES in results else [NOT_AT_HAND]),
        ],
        claims=[claim for group in found for claim in _claims(group)],
        table=DataFrame([row for group in found for row in _rows(group)], columns=list(HEADER)),
        numbers=[_numbers(group, c) for group in found for c in (*group.off, *group.learning)],
        sources={name: each["sources"] for name, each in results.items()},
    )


def _quality(results: Mapping[str, Results]) -> str:
    names = {
        online.SCORE: "mean score over tasks and models, per cent",
        online.REFERENCE_LOSS: "negative loss of the reference answer, nats per token",
        "loss": f"on {STORIES} negative loss in nats",
    }
    found = {each["measure"] for each in results.values()}
    return "; ".join(text for measure, text in names.items() if measure in found)


def _claims(group: Group) -> list[Claim]:
    """That the window adds FFNs, that these are better than as many chosen offline, and that they cost no quality."""
    adding = [c for c in group.learning if c.added > 0]
    paper = [c for c in group.learning if (c.variant.window, c.variant.quantile) == (LEARNING_WINDOW, None)]
    told = ""
    if paper:
        told = (
            f"At the paper's P = {LEARNING_WINDOW} and beta: in {100 * paper[0].fired:.0f} % of the requests, "
            f"{paper[0].added:.2f} FFNs each on average."
        )
    fires = Claim(f"{group.name}: the window adds FFNs", len(adding), len(group.learning), told)

    tested = [c for c in adding if c.over_offline is not None]
    parts = [f"{verdict} beyond chance at {_listed(tested, verdict)}" for verdict in (BETTER, WORSE)]
    parts.append(f"within chance in {sum(c.verdict == CHANCE for c in tested)}")
    if beyond := sum(c.verdict == BEYOND for c in group.learning):
        parts.append(f"{beyond} more skip more than any offline set that was run")
    text = f"{group.name}: skipping what was learnt online keeps more than as many sublayers chosen offline"
    better = sum(c.verdict == BETTER for c in tested)
    helps = Claim(text, better, len(tested), f"At as many sublayers: {'; '.join(parts)}.")

    kept = [c for c in adding if c.over_off.high is None or c.over_off.high >= 0]
    told = f"It costs quality beyond chance in {len(adding) - len(kept)} of {len(adding)}."
    if gains := [c.skipped - c.variant.sublayers for c in kept]:
        told += f" Where it does not, it skips {min(gains):.2f} to {max(gains):.2f} sublayers more per step."
    text = f"{group.name}: online learning costs no quality beyond chance"
    return [fires, helps, Claim(text, len(kept), len(adding), told)]


def _listed(tested: Sequence[Compared], verdict: str) -> str:
    """`P = 5 (q0.25, paper), P = 20 (q0.5)`"""
    betas: dict[int, list[str]] = {}
    for c in tested:
        if c.verdict == verdict:
            betas.setdefault(c.variant.window, []).append(c.variant.beta)
    return ", ".join(f"P = {window} ({', '.join(names)})" for window, names in betas.items()) or "none"


def _rows(group: Group) -> list[list[str]]:
    rows, missing = [], [labels.MISSING] * 3
    for c in (*group.off, *group.learning):
        if c.variant.window:
            learning = [str(c.variant.window), c.variant.beta, f"{100 * c.fired:.0f} %", f"{c.added:.2f}"]
            gains = [_text(c.over_off, group), _text(c.over_offline, group), c.verdict]
        else:
            learning, gains = ["off" if c.variant.sublayers else "full model", *missing], missing
        quality = [f"{c.skipped:.2f}", _text(c.quality, group)]
        rows.append([group.name, str(c.variant.sublayers), *learning, *quality, *gains])
    return rows


def _text(estimate: Estimate | None, group: Group) -> str:
    """Per cent with one decimal, or nats with three."""
    if group.is_score or estimate is None:
        return labels.percent(estimate)
    ends = "" if estimate.low is None else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.value:.3f}{ends}"


def _numbers(group: Group, c: Compared) -> dict[str, object]:
    numbers = {"models": group.name, **vars(c.variant), "skipped_per_step": c.skipped, "fired": c.fired}
    numbers |= {"added": c.added, "quality": c.quality.as_dict()}
    if c.variant.window:
        over_offline = None if c.over_offline is None else c.over_offline.as_dict()
        numbers |= {"gain_over_off": c.over_off.as_dict(), "gain_over_offline": over_offline, "verdict": c.verdict}
    return numbers


def draw(results: Mapping[str, Results], out_dir: Path) -> list[Path]:
    """Quality against sublayers skipped per decode step, a panel per group: the line of offline budgets, and every P
    and beta beside it."""
    found = groups(results)
    with styled():
        figure = Figure(figsize=(3.4 * len(found) + 1.5, 3.2), layout="constrained")
        panels = figure.subplots(1, len(found), squeeze=False)[0]
        handles: dict[str, Line2D] = {"off": Line2D([], [], **OFFLINE_LINE, label="no online learning")}
        for group, panel in zip(found, panels, strict=True):
            _draw(panel, group, handles)
            panel.set_title(group.name)
            panel.set_ylabel("mean score, per cent" if group.is_score else "negative loss, nats")
            panel.grid()
        figure.supxlabel("sublayers skipped per decode step", fontsize=8)
        figure.legend(handles=list(handles.values()), loc="outside right upper")
        return save(figure, out_dir / NAME)


def _draw(panel: Axes, group: Group, handles: dict[str, Line2D]) -> None:
    scale = 100 if group.is_score else 1
    panel.plot([c.skipped for c in group.off], [scale * c.quality.value for c in group.off], **OFFLINE_LINE)
    windows, betas = (dict.fromkeys(getattr(c.variant, name) for c in group.learning) for name in ("window", "beta"))
    colors = {window: COLORS[i % len(COLORS)] for i, window in enumerate(windows)}
    markers = {beta: MARKERS[i % len(MARKERS)] for i, beta in enumerate(betas)}
    for c in group.learning:
        color, marker = colors[c.variant.window], markers[c.variant.beta]
        y = scale * c.quality.value
        low, high = (y if end is None else scale * end for end in (c.quality.low, c.quality.high))
        panel.vlines(c.skipped, low, high, color=color, linewidth=0.6, zorder=2)
        panel.plot([c.skipped], [y], color=color, marker=marker, markersize=4.5, linestyle="none", zorder=3)
    for window, color in colors.items():
        handles.setdefault(f"P{window}", Line2D([], [], color=color, linewidth=3, label=f"P = {window}"))
    for beta, marker in markers.items():
        label = "beta: the paper's" if beta == "paper" else f"beta: quantile {beta[1:]}"
        handles.setdefault(beta, Line2D([], [], color="#666666", marker=marker, linestyle="none", label=label))


STUDY = Study(
    AblationConfig,
    measure=online.measure,
    read=online.read,
    find=lambda results, config: [find(results)],
    draw=lambda results, config: draw(results, config.out_dir),
)
main = STUDY.main
