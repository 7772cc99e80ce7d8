"""What the scripts in `eval/` share: where the results are, and one line for a user's mistake."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from adaskip.benchmarks.protocol import BENCHMARKS
from adaskip.common.options import Parser
from adaskip.common.paths import default_path, given_or_default
from adaskip.runs.cells import parse_run_name, run_name
from adaskip.studies.tables.runs import has_run


def results_parser(description: str | None) -> Parser:
    """A parser that knows `--results-dir`, `--benchmark` and `--testbed`."""
    parser = Parser(description=description, allow_abbrev=False)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--results-dir", type=Path, metavar="DIR", help="folder of the runs (default: results/runs)")
    place.add_argument("--benchmark", metavar="NAME", help="its runs in results/NAME/runs; also package.module:Class")
    place.add_argument(
        "--testbed", action="store_const", dest="benchmark", const="testbed", help="the same as --benchmark testbed"
    )
    return parser


def runs_dir(arguments: argparse.Namespace) -> Path:
    """The folder that `--results-dir` or `--benchmark` names; LongBench's where neither is given."""
    name = BENCHMARKS.name_of(arguments.benchmark or "longbench")
    return given_or_default(arguments.results_dir, runs_of(name))


def runs_of(benchmark: str) -> str:
    """Where a benchmark's runs are if no folder is given."""
    return f"{BENCHMARKS.find(benchmark).results_dir()}/runs"


def runs_dir_of(arguments: argparse.Namespace, name: str) -> Path:
    """The folder that `--results-dir` or `--benchmark` names.

    Where neither is given and only the testbed has a run called `name`: the testbed's, which standard error is told.
    """
    asked, testbed = runs_dir(arguments), default_path(runs_of("testbed"))
    wanted = run_name(*parse_run_name(name))
    if arguments.results_dir or arguments.benchmark or has_run(wanted, asked) or not has_run(wanted, testbed):
        return asked
    print(f"no run {wanted} in {asked}; taking the testbed's, in {testbed}", file=sys.stderr)
    return testbed


def add_output_dir(parser: Parser) -> None:
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="where to write (default: beside the runs' folder)"
    )


def output_dir(arguments: argparse.Namespace) -> Path:
    """`--output-dir`, or the folder that holds the runs' folder."""
    return arguments.output_dir or runs_dir(arguments).parent


def num_jobs() -> int:
    """Processes to score with."""
    return os.cpu_count() or 1


def wide_console() -> Console:
    """The terminal; where there is none (a pipe, a file), lines wide enough for the tables."""
    console = Console()
    return console if console.is_terminal else Console(width=120)


def exit_code(command: Callable[[], None]) -> int:
    """Run `command`; a user's mistake is one line and 2, a file that cannot be read or written one line and 1."""
    try:
        command()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2 if isinstance(error, ValueError) else 1
    return 0
