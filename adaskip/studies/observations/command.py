"""The scripts in `observations/`: each is a study of the prompts and answers of some tasks."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from adaskip.studies.observations import figures, hit_rates, importance_check, similarity
from adaskip.studies.observations.measuring import measure_targets
from adaskip.studies.observations.saved import Saved, load_saved
from adaskip.studies.observations.settings import ObserveConfig, Target
from adaskip.studies.study import Findings, Study

PHASES: dict[str, tuple[Any, ...]] = {"ob1": ("prefill",), "ob2": ("prefill",), "ob3": ("prefill", "decode")}
"""The phases of each figure."""


def main(observation: str, doc: str | None) -> int:
    """Run the script of an observation; returns the exit code. doc: the docstring of the script."""
    return OBSERVATIONS[observation].main(doc)


def figure_targets(name: str, config: ObserveConfig) -> list[Target]:
    """The measurements of a figure: its tasks in its phases."""
    return [Target(task, phase) for task in config.tasks or config.defaults[name] for phase in PHASES[name]]


def _figure(name: str, find: Callable[..., Findings], draw: Callable[..., list[Path]]) -> Study[ObserveConfig, Saved]:
    return Study(
        ObserveConfig,
        measure=lambda config: measure_targets(config, figure_targets(name, config)),
        read=lambda config: load_saved(config.out_dir, figure_targets(name, config)),
        find=lambda saved, config: [find(saved, figure_targets(name, config))],
        draw=lambda saved, config: draw(saved, figure_targets(name, config), config.out_dir),
    )


def table_targets(config: ObserveConfig) -> tuple[list[Target], list[Target]]:
    """The measurements of Table 1, and of Table 2."""
    pairs, stand_ins, online = _tables_of(config)
    offline = [Target(stand_ins.get(task, task), "prefill") for pair in pairs for task in pair]
    return offline, [Target(task, "decode") for task in online]


def all_targets(config: ObserveConfig) -> list[Target]:
    """The measurements of all figures and tables, without repeats."""
    tables = [target for targets in table_targets(config) for target in targets]
    return list(dict.fromkeys([*(t for name in PHASES for t in figure_targets(name, config)), *tables]))


def _tables_of(config: ObserveConfig) -> tuple[list[tuple[str, str]], dict[str, str], list[str]]:
    """The pairs of Table 1, the tasks measured instead of theirs, and the tasks of Table 2."""
    if config.tasks is None:
        defaults = config.defaults
        return [(one, other) for one, other in defaults["table1"]], defaults["stand_ins"], defaults["table2"]
    return [(one, other) for one in config.tasks for other in config.tasks if one != other], {}, list(config.tasks)


def _read_tables(config: ObserveConfig) -> list[Saved | None]:
    return [load_saved(config.out_dir, targets) if targets else None for targets in table_targets(config)]


def _find_tables(saved: list[Saved | None], config: ObserveConfig) -> list[Findings]:
    (offline, online), (pairs, stand_ins, tasks) = saved, _tables_of(config)
    found = [hit_rates.find_offline(offline, pairs, stand_ins)] if offline else []
    return found + ([hit_rates.find_online(online, tasks, config.defaults["windows"])] if online else [])


OBSERVATIONS: dict[str, Study[ObserveConfig, Any]] = {
    "ob1": _figure("ob1", similarity.find_layers, figures.draw_layers),
    "ob2": _figure("ob2", similarity.find_kinds, figures.draw_kinds),
    "ob3": _figure("ob3", similarity.find_phases, figures.draw_phases),
    "tables12": Study(
        ObserveConfig,
        measure=lambda config: measure_targets(config, [t for targets in table_targets(config) for t in targets]),
        read=_read_tables,
        find=_find_tables,
    ),
    "importance_check": Study(
        ObserveConfig,
        measure=lambda config: importance_check.measure_check(config),
        read=lambda config: importance_check.load_check(config.out_dir),
        find=lambda check, config: [importance_check.find(check)],
        draw=lambda check, config: importance_check.draw(check, config.out_dir),
    ),
}
