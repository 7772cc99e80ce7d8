"""What the scripts in `eval/` share: where the results are, and one line for a user's mistake."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from adaskip.options import Parser
from adaskip.results.runs import RUNS_DIR, TESTBED_RUNS_DIR


def results_parser(description: str | None) -> Parser:
    """A parser that knows `--results-dir` and `--testbed`."""
    parser = Parser(description=description, allow_abbrev=False)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--results-dir", type=Path, metavar="DIR", help=f"folder of the runs (default: {RUNS_DIR})")
    place.add_argument("--testbed", action="store_true", help=f"the same as --results-dir {TESTBED_RUNS_DIR}")
    return parser


def runs_dir(arguments: argparse.Namespace) -> Path:
    """The folder that `--results-dir` or `--testbed` names."""
    return TESTBED_RUNS_DIR if arguments.testbed else arguments.results_dir or RUNS_DIR


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
