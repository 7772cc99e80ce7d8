"""The command line, `adaskip <command> ...`, and the entry points of scripts."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NoReturn

from adaskip.common.commands import STOPPED, guarded
from adaskip.common.options import Parser, add_options, resolve
from adaskip.common.processes import Processes
from adaskip.core.plan_card import plan_map
from adaskip.profiles.selection import METHODS, SelectionProfile
from adaskip.runs.calibrate_config import CalibrateConfig
from adaskip.runs.cells import parse_run_name, run_name, undefined
from adaskip.runs.config import GridConfig, RunConfig
from adaskip.runs.dry_run import dry_run
from adaskip.runs.grid import run_grid
from adaskip.runs.pareto import pareto_lines
from adaskip.runs.plans import ExportConfig, PlanConfig, ShowConfig, export_plan, plan_to, shown
from adaskip.runs.profiles import calibrate_to
from adaskip.runs.refine import refine_to
from adaskip.runs.runner import run
from adaskip.studies.bench.measuring import ReportConfig, bench, bench_report
from adaskip.studies.bench.settings import BenchConfig, figure_settings


def main(argv: Sequence[str] | None = None) -> int:
    """`adaskip <command> ...`; returns the exit code."""
    return guarded(lambda: _command(sys.argv[1:] if argv is None else argv))


def run_cell(*, phase: str, model: str, strategy: str) -> NoReturn:
    """Entry point of the run scripts: run one cell with the options of `adaskip run`.

    As in the paper's artifact, `--model` of a script is the name of the run (`llama-EE-PREFILL`).
    """
    sys.exit(guarded(lambda: _run_script(phase, model, strategy, sys.argv)))


def run_speed(*, model: str) -> NoReturn:
    """Entry point of the speed scripts: `adaskip bench` for one model."""
    sys.exit(guarded(lambda: _speed_script(model, sys.argv)))


def _command(argv: Sequence[str]) -> int:
    if argv[:1] == ["lm-eval"]:
        return _lm_eval(argv[1:])
    parser = Parser(prog="adaskip", description="Sublayer skipping for long-context LLMs on stock transformers models.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (config, _, help_text) in COMMANDS.items():
        add_options(commands.add_parser(name, help=help_text, description=help_text, allow_abbrev=False), config)
    commands.add_parser("lm-eval", help=LM_EVAL_HELP)
    with Processes().together():
        given = vars(parser.parse_args(argv))
        command = given.pop("command")
        if command != "run":
            Processes().require_one(f"adaskip {command}")
        config, execute, _ = COMMANDS[command]
        resolved = resolve(config, given, given.pop("config"), figure_settings)
    return execute(resolved)


def _run_script(phase: str, model: str, strategy: str, argv: Sequence[str]) -> int:
    name = run_name(model, phase, strategy)
    parser = Parser(prog=argv[0], description=f"Runs {name}.", allow_abbrev=False)
    parser.add_argument("--model", metavar="RUN_NAME", default=name, help=f"name of the run; here always {name}")
    add_options(parser, RunConfig, leave_out=("model", "phase", "strategy"))
    with Processes().together():
        given = vars(parser.parse_args(argv[1:]))
        if parse_run_name(asked := given.pop("model")) != (model, phase, strategy):
            raise ValueError(
                f"{argv[0]} runs {name}, but --model is {asked!r}; use the script of that run, or leave --model out"
            )
        yaml_file = given.pop("config")
        cell = {"phase": phase, "model": model, "strategy": strategy}
        config = resolve(RunConfig, {**given, **cell}, yaml_file, fixed=cell)
    return _run(config)


def _speed_script(model: str, argv: Sequence[str]) -> int:
    parser = Parser(prog=argv[0], description=f"Times {model} under every strategy.", allow_abbrev=False)
    add_options(parser, BenchConfig, leave_out=("model", "figure"))
    given = vars(parser.parse_args(argv[1:]))
    yaml_file = given.pop("config")
    return bench(resolve(BenchConfig, {**given, "model": model}, yaml_file, fixed=("model", "figure")))


def _run(config: RunConfig) -> int:
    outcome = run(config, show_progress=True)
    if not Processes().is_main:
        return 0
    before = f", {outcome.found} of them before" if outcome.found else ""
    print(f"{outcome.cell.label}: {outcome.made + outcome.found} samples{before}, in {outcome.folder}")
    if outcome.target is not None:
        print(outcome.target.line)
    return 0


def _calibrate(config: CalibrateConfig) -> int:
    profile, paths = calibrate_to(config) if config.refine is None else refine_to(config)
    where = " and ".join(map(str, paths))
    if isinstance(profile, SelectionProfile):
        for count, chosen in profile.selected.items():
            value = METHODS[profile.method].criterion.format(chosen.divergence)
            print(f"{count:3} sublayers  {value}  {chosen.plan.to_dict()}  {chosen.found_by}")
        cost = profile.cost
        multiples = (cost.num_forwards / cost.adaskip_forwards, cost.num_tokens / cost.adaskip_tokens, cost.multiple)
        forwards, tokens, seconds = (f"{times:.{0 if times >= 10 else 1}f}" for times in multiples)
        print(
            f"{cost.num_forwards} forwards over {cost.num_tokens} tokens in {cost.seconds:.1f} s: {forwards}, {tokens} "
            f"and {seconds} times AdaSkip's calibration; in {where}"
        )
        return 0
    print(f"profile of {config.model} over {profile.tokens} tokens in {where}")
    return 0


def _plan(config: PlanConfig) -> int:
    plan, folder = plan_to(config)
    assert plan.origin is not None, "of a made plan"
    print(plan_map(plan, plan.origin.num_layers))
    print(f"{len(plan)} of {2 * plan.origin.num_layers} sublayers, phase {plan.origin.phase}; in {folder}")
    return 0


def _show(config: ShowConfig) -> int:
    if config.plan is not None and config.prompt_tokens is not None:
        given = {"new_tokens": config.new_tokens, "on": config.speedup_on, "model": config.model}
        lines = pareto_lines(config.plan, config.prompt_tokens, **given)
    else:
        lines = shown(config.plan)
    if config.plot is not None:
        from adaskip.studies.plots.plan_map import plot_plan  # matplotlib is of an extra

        lines.append(f"drawn in {plot_plan(config.plan, Path(config.plot))}")
    _print_lines(lines)
    return 0


def _export(config: ExportConfig) -> int:
    report = export_plan(config)
    print(f"{report['num_skipped']} sublayers left out; in {config.output}")
    found = (report["verified"] or {"compared": False}).items()
    print(", ".join(f"{name} {value:.2g}" if isinstance(value, float) else f"{name} {value}" for name, value in found))
    return 0


def _lm_eval(argv: Sequence[str]) -> int:
    from adaskip.benchmarks.lm_harness import run_lm_eval  # lm_eval is of an extra

    run_lm_eval(argv)
    return 0


def _grid(config: GridConfig) -> int:
    if left_out := undefined(config.phases, config.strategies):
        print(f"cells left out, since not defined: {', '.join(left_out)}", file=sys.stderr)
    if config.dry_run:
        _print_lines(dry_run(config))
        return 0
    outcome = run_grid(config)
    complete, failed = len(outcome.complete), len(outcome.failed)
    print(f"{complete} of {complete + failed} cells complete in {config.runs_dir}, {outcome.made} samples made now")
    if failed:
        print(f"{failed} cells failed; run the same command again to retry them", file=sys.stderr)
    return STOPPED if outcome.failed else 0


def _print_lines(lines: Iterable[str]) -> None:
    """Print all lines, or stop when the reader (such as `head`) closes the pipe."""
    try:
        for line in lines:
            print(line)
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # drop buffered output at exit


LM_EVAL_HELP = "Run lm-evaluation-harness, with model type `adaskip`; the options are lm_eval's own."
COMMANDS: dict[str, tuple[type, Callable[..., int], str]] = {
    "run": (
        RunConfig,
        _run,
        "Run one cell: a model with a strategy in a phase at a budget. `accelerate launch --multi_gpu --num_processes "
        "N -m adaskip run` splits the samples over N processes, which must share a file system.",
    ),
    "grid": (
        GridConfig,
        _grid,
        "Run many cells; by default the whole grid. Finished cells are skipped.",
    ),
    "calibrate": (
        CalibrateConfig,
        _calibrate,
        "Measure the importance profile of a model, or choose sets of sublayers by a search or another paper's method.",
    ),
    "plan": (PlanConfig, _plan, "Choose the sublayers of a strategy for a model and save them as a plan."),
    "show": (ShowConfig, _show, "Show a saved plan, profile or selection, or list the published ones."),
    "export": (ExportConfig, _export, "Write the model of a saved plan as a checkpoint for other software."),
    "bench": (BenchConfig, bench, "Time the full model and the strategies in interleaved rounds."),
    "bench-report": (ReportConfig, bench_report, "Write tables and plots of the saved benchmarks."),
}
