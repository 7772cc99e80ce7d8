"""`eval/eval.py`, `tables.py`, `plots.py` and `tradeoff.py`: saved runs in, scores, tables and figures out."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from adaskip.benchmarks.protocol import BENCHMARKS, DEFAULT
from adaskip.common.options import Parser
from adaskip.common.paths import default_path, given_or_default
from adaskip.runs.cells import parse_run_name, run_name
from adaskip.studies.tables.evaluate import evaluate, print_scores
from adaskip.studies.tables.report import headline_of, write_plots, write_tables, write_tradeoffs
from adaskip.studies.tables.results import Results, load_results
from adaskip.studies.tables.runs import has_run
from adaskip.studies.tables.tradeoff import find_tradeoffs
from adaskip.studies.tables.tradeoff_text import sentences

SPEEDS, OTHER_SPEEDS = "speed/results/cpu/testbed_{model}.json", "speed/results/cpu/{model}.json"
"""Results of `adaskip bench` for the testbed's models, and for others."""


def main(name: str, doc: str | None) -> int:
    """Run a script; returns the exit code. name: in `SCRIPTS`. doc: the docstring of the script."""
    SCRIPTS[name](_parser(doc))
    return 0


def _parser(doc: str | None) -> Parser:
    parser = Parser(description=doc, allow_abbrev=False)
    place = parser.add_mutually_exclusive_group()
    place.add_argument("--results-dir", type=Path, metavar="DIR", help="folder of the runs (default: results/runs)")
    place.add_argument(
        "--benchmark", metavar="NAME", help="read the runs in results/NAME/runs; also package.module:Class"
    )
    place.add_argument(
        "--testbed", action="store_const", dest="benchmark", const="testbed", help="the same as --benchmark testbed"
    )
    parser.add_argument(
        "--data-dir",
        metavar="DIR",
        help="data of the benchmark, to score the first sentence of the context as a floor; not needed for the testbed",
    )
    return parser


def _eval(parser: Parser) -> None:
    parser.add_argument("--model", required=True, metavar="RUN_NAME", help="name of a run, e.g. llama-EE-PREFILL")
    arguments = parser.parse_args()
    results = evaluate(arguments.model, _runs_dir_with(arguments.model, arguments), arguments.data_dir)
    console = Console()  # without a terminal (a pipe, a file): wide enough for the tables
    print_scores(results, arguments.model, console if console.is_terminal else Console(width=120))


def _tables(parser: Parser) -> None:
    arguments, out_dir = _with_output_dir(parser)
    results = _load(arguments)
    _tell(write_tables(results, out_dir / "tables"))
    print(*headline_of(results), sep="\n")


def _plots(parser: Parser) -> None:
    arguments, out_dir = _with_output_dir(parser)
    _tell(write_plots(_load(arguments), out_dir / "plots"))


def _tradeoff(parser: Parser) -> None:
    parser.add_argument(
        "--speeds",
        metavar="PATTERN",
        nargs="+",
        help="`adaskip bench` results, with {model} for a model's name; of several, the first that timed a strategy "
        f"gives its speedup (default: {OTHER_SPEEDS}; of the testbed {SPEEDS})",
    )
    parser.add_argument(
        "--prompt-tokens",
        type=int,
        metavar="N",
        help="use the speeds for prompts of N tokens, if there are several lengths",
    )
    arguments, out_dir = _with_output_dir(parser)
    results = _load(arguments)
    is_testbed = [benchmark.name for benchmark in results.benchmarks] == ["testbed"]
    patterns = arguments.speeds or [str(default_path(SPEEDS if is_testbed else OTHER_SPEEDS))]
    tradeoffs = find_tradeoffs(results, patterns, arguments.prompt_tokens)
    _tell(write_tradeoffs(tradeoffs, out_dir))
    print(*(line for tradeoff in tradeoffs for line in sentences(tradeoff)), sep="\n")


def _with_output_dir(parser: Parser) -> tuple[argparse.Namespace, Path]:
    """The arguments, and the output folder, by default the parent of the runs' folder."""
    parser.add_argument(
        "--output-dir",
        type=Path,
        metavar="DIR",
        help="output folder (default: the folder that contains the folder of the runs)",
    )
    arguments = parser.parse_args()
    return arguments, arguments.output_dir or _runs_dir(arguments).parent


def _runs_dir(arguments: argparse.Namespace) -> Path:
    """The folder of `--results-dir` or `--benchmark`, by default of the paper's benchmark."""
    return given_or_default(arguments.results_dir, _runs_of(BENCHMARKS.name_of(arguments.benchmark or DEFAULT)))


def _runs_of(benchmark: str) -> str:
    return f"{BENCHMARKS.find(benchmark).results_dir()}/runs"


def _runs_dir_with(name: str, arguments: argparse.Namespace) -> Path:
    """The folder of `--results-dir` or `--benchmark`.

    If neither is given and only the testbed has a run called `name`, its folder, with a line on standard error.
    """
    asked, testbed = _runs_dir(arguments), default_path(_runs_of("testbed"))
    wanted = run_name(*parse_run_name(name))
    if arguments.results_dir or arguments.benchmark or has_run(wanted, asked) or not has_run(wanted, testbed):
        return asked
    print(f"no run {wanted} in {asked}; using that of the testbed in {testbed}", file=sys.stderr)
    return testbed


def _load(arguments: argparse.Namespace) -> Results:
    """Load the results; runs that cannot be compared are reported on standard error."""
    jobs = os.cpu_count() or 1
    results = load_results(_runs_dir(arguments), jobs=jobs, progress=True, data_dir=arguments.data_dir)
    for line in results.notes:
        print(line, file=sys.stderr)
    return results


def _tell(written: list[Path]) -> None:
    for path in written:
        print(f"wrote {path}")


SCRIPTS: dict[str, Callable[[Parser], None]] = {
    "eval": _eval,
    "tables": _tables,
    "plots": _plots,
    "tradeoff": _tradeoff,
}
