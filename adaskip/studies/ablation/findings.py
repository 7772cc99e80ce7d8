"""The ablation's verdict in words, and its table; both are made from the comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from adaskip.common.intervals import Estimate
from adaskip.models.stories import STORIES
from adaskip.strategies.adaskip import LEARNING_WINDOW
from adaskip.studies.ablation.comparing import Comparison, comparisons
from adaskip.studies.ablation.saved import Subject
from adaskip.studies.ablation.settings import Variant
from adaskip.studies.observations.findings import Claim, Findings, Table
from adaskip.studies.tables import labels

NAME = "online_ablation"
Group = tuple[str, list[Subject]]


def groups(subjects: Sequence[Subject]) -> list[Group]:
    """The models that run tasks together, and stories260K."""
    tasks = [subject for subject in subjects if subject.measure == "score"]
    stories = [subject for subject in subjects if subject.measure == "loss"]
    named = [(", ".join(subject.name for subject in tasks), tasks), (STORIES, stories)]
    return [(name, members) for name, members in named if members]


def find(subjects: Sequence[Subject], left_out: str | None = None) -> Findings:
    """left_out: why stories260K is missing."""
    found = groups(subjects)
    return Findings(
        name=NAME,
        title="Ablation: learning online which further FFNs to skip",
        notes=[
            "AdaSkip in the decode phase. Without online learning (off) at several budgets; with it at the least "
            "budget, with P tokens of learning window and beta, which FFNs must exceed to join: the paper's (the least "
            "offline similarity in the set), or a quantile of the offline similarities of all FFNs.",
            "Quality: mean score over tasks and models, per cent; on stories260K negative loss in nats. More is "
            "better. Gains are mean differences over the same samples with 95 % bootstrap intervals: over the same "
            "offline set, and over offline sets of as many sublayers (interpolated between budgets). Speed is told as "
            "sublayers skipped per decode step, which is exact; the times of runs are of different moments and give no "
            "speedup.",
            *([left_out] if left_out else []),
        ],
        claims=[claim for group in found for claim in _claims(*group)],
        table=_table(found),
        numbers=[_as_dict(name, each) for name, members in found for part in comparisons(members) for each in part],
        sources={subject.name: subject.sources for subject in subjects},
    )


def _claims(name: str, subjects: list[Subject]) -> list[Claim]:
    _, online = comparisons(subjects)
    return [_fires(name, online), _helps(name, online), _keeps(name, online)]


def _fires(name: str, online: list[Comparison]) -> Claim:
    paper = next((c for c in online if c.variant.window == LEARNING_WINDOW and c.variant.quantile is None), None)
    evidence = ""
    if paper is not None:
        evidence = (
            f"At the paper's P = {LEARNING_WINDOW} and beta: in {100 * paper.fired:.0f} % of the requests, "
            f"{paper.added:.2f} FFNs each on average."
        )
    return Claim(f"{name}: the window adds FFNs", sum(c.added > 0 for c in online), len(online), evidence)


def _helps(name: str, online: list[Comparison]) -> Claim:
    """Whether what is learnt beats a larger offline budget."""
    tested = [c for c in online if c.added > 0 and c.over_offline is not None]
    verdicts = [c.verdict for c in tested]
    told = [f"{verdict} beyond chance at {_listed(tested, verdict)}" for verdict in ("better", "worse")]
    beyond = sum(c.verdict == "beyond the offline sets" for c in online)
    told.append(f"within chance in {verdicts.count('within chance')}")
    if beyond:
        told.append(f"{beyond} more skip more than any offline set that was run")
    return Claim(
        f"{name}: skipping what was learnt online keeps more than as many sublayers chosen offline",
        verdicts.count("better"),
        len(tested),
        f"At as many sublayers: {'; '.join(told)}.",
    )


def _keeps(name: str, online: list[Comparison]) -> Claim:
    """Whether it costs quality against the same offline set."""
    tested = [c for c in online if c.added > 0]
    lost = [c for c in tested if c.over_off.high is not None and c.over_off.high < 0]
    gains = [c.skipped - c.variant.sublayers for c in tested if c not in lost]
    evidence = f"It costs quality beyond chance in {len(lost)} of {len(tested)}."
    if gains:
        evidence += f" Where it does not, it skips {min(gains):.2f} to {max(gains):.2f} sublayers more per step."
    kept = len(tested) - len(lost)
    return Claim(f"{name}: online learning costs no quality beyond chance", kept, len(tested), evidence)


def _listed(tested: Sequence[Comparison], verdict: str) -> str:
    """`P = 5 (q0.25, paper), P = 20 (q0.5)`"""
    betas: dict[int, list[str]] = {}
    for c in tested:
        if c.verdict == verdict:
            betas.setdefault(c.variant.window, []).append(c.variant.beta)
    return ", ".join(f"P = {window} ({', '.join(names)})" for window, names in betas.items()) or "none"


HEADER = (
    *("Model", "Budget", "P", "beta", "fired", "FFNs added", "skipped per step", "quality"),
    *("gain over off", "gain over as many offline", "verdict"),
)


def _table(found: Sequence[Group]) -> Table:
    rows = []
    for name, subjects in found:
        percent = subjects[0].measure == "score"
        off, online = comparisons(subjects)
        for c in off:
            learning = ["off" if c.variant.sublayers else "full model", *[labels.MISSING] * 3]
            rest = [f"{c.skipped:.2f}", _text(c.quality, percent), *[labels.MISSING] * 3]
            rows.append([name, str(c.variant.sublayers), *learning, *rest])
        for c in online:
            learning = [str(c.variant.window), c.variant.beta, f"{100 * c.fired:.0f} %", f"{c.added:.2f}"]
            gains = [_text(c.over_off, percent), _text(c.over_offline, percent), c.verdict]
            rest = [f"{c.skipped:.2f}", _text(c.quality, percent), *gains]
            rows.append([name, str(c.variant.sublayers), *learning, *rest])
    return Table(HEADER, rows)


def _text(estimate: Estimate | None, percent: bool) -> str:
    """Per cent with one decimal, or nats with three."""
    if estimate is None:
        return labels.MISSING
    if percent:
        return labels.percent(estimate)
    ends = "" if estimate.low is None else f" [{estimate.low:.3f}, {estimate.high:.3f}]"
    return f"{estimate.value:.3f}{ends}"


def _as_dict(name: str, c: Comparison) -> dict[str, object]:
    variant: Variant = c.variant
    numbers: dict[str, object] = {
        **{"models": name, **vars(variant), "skipped_per_step": c.skipped, "fired": c.fired, "added": c.added},
        "quality": c.quality.as_dict(),
    }
    if variant.window:
        numbers |= {
            "gain_over_off": c.over_off.as_dict(),
            "gain_over_offline": None if c.over_offline is None else c.over_offline.as_dict(),
            "verdict": c.verdict,
        }
    return numbers
