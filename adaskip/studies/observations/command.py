"""The scripts in `observations/`: measure what is missing, then test, tabulate and draw what is saved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from rich.console import Console

from adaskip.common.commands import study
from adaskip.studies.observations import figures, hit_rates, kinds, layers, phases, skip_check, skip_findings
from adaskip.studies.observations.findings import Findings, write_findings
from adaskip.studies.observations.measuring import measure_targets
from adaskip.studies.observations.saved import load_saved
from adaskip.studies.observations.settings import ObserveConfig, Target

Result = tuple[list[Findings], list[Path]]
"""What was found, and the figures of it."""


def main(observation: str, doc: str | None) -> int:
    """A script's whole life; returns its exit code. doc: the script's docstring."""
    return study(doc, ObserveConfig, lambda config: _run(observation, config))


def _run(observation: str, config: ObserveConfig) -> int:
    found, drawn = OBSERVATIONS[observation](config)
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for findings in found:
        console.print(f"{findings.title}", style="bold")
        for claim in findings.claims:
            console.print(f"- {claim.sentence}")
    written = [path for findings in found for path in write_findings(findings, config.out_dir)] + drawn
    console.print("wrote " + ", ".join(path.name for path in written) + f" to {config.out_dir}")
    return 0


def _figure(
    name: str,
    phase_names: Sequence[str],
    find: Callable[..., Findings],
    draw: Callable[..., list[Path]],
) -> Callable[[ObserveConfig], Result]:
    """An observation that is a figure of some tasks in some phases."""

    def observe(config: ObserveConfig) -> Result:
        tasks = config.tasks or config.observations.tasks[name]
        targets = [Target(task, phase) for task in tasks for phase in phase_names]  # pyright: ignore[reportArgumentType]
        if not config.draw_only:
            measure_targets(config, targets)
        saved = load_saved(config.out_dir, targets)
        return [find(saved, targets)], draw(saved, targets, config.out_dir)

    return observe


def _tables(config: ObserveConfig) -> Result:
    setup = config.observations
    pairs, stand_ins, online = setup.table1, setup.stand_ins, setup.table2
    if config.tasks is not None:
        pairs = tuple((first, second) for first in config.tasks for second in config.tasks if first != second)
        stand_ins, online = {}, config.tasks
    offline = [Target(stand_ins.get(task, task), "prefill") for pair in pairs for task in pair]
    answers = [Target(task, "decode") for task in online]
    if not config.draw_only:
        measure_targets(config, [*offline, *answers])
    found = [hit_rates.find_offline(load_saved(config.out_dir, offline), pairs, stand_ins)] if pairs else []
    return [*found, hit_rates.find_online(load_saved(config.out_dir, answers), online, setup.windows)], []


def _check(config: ObserveConfig) -> Result:
    if not config.draw_only:
        skip_check.measure_check(config)
    check = skip_check.load_check(config.out_dir)
    return [skip_findings.find(check)], skip_findings.draw(check, config.out_dir)


OBSERVATIONS: dict[str, Callable[[ObserveConfig], Result]] = {
    "ob1": _figure("ob1", ["prefill"], layers.find, figures.draw_layers),
    "ob2": _figure("ob2", ["prefill"], kinds.find, figures.draw_kinds),
    "ob3": _figure("ob3", ["prefill", "decode"], phases.find, figures.draw_phases),
    "tables12": _tables,
    "importance_check": _check,
}
