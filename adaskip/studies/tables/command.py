"""`eval/eval.py`, `tables.py`, `plots.py` and `tradeoff.py`: saved runs in, scores, tables and figures out."""

from __future__ import annotations

from collections.abc import Callable

from adaskip.common.paths import given_or_default
from adaskip.studies.tables.console import (
    add_output_dir,
    exit_code,
    num_jobs,
    output_dir,
    results_parser,
    runs_dir,
    runs_dir_of,
    wide_console,
)
from adaskip.studies.tables.evaluate import evaluate, print_scores
from adaskip.studies.tables.report import headline_of, load_tables, write_plots, write_tables, write_tradeoff
from adaskip.studies.tables.scoreboard import load_scoreboard
from adaskip.studies.tables.tradeoff import find_tradeoff
from adaskip.studies.tables.tradeoff_text import sentences

SPEEDS = "speed/results/cpu/testbed_{model}.json"


def main(name: str, doc: str | None) -> int:
    """A script's whole life; returns its exit code. name: of `SCRIPTS`. doc: the script's docstring."""
    return exit_code(lambda: SCRIPTS[name](doc))


def _eval(doc: str | None) -> None:
    parser = results_parser(doc)
    parser.add_argument("--model", required=True, metavar="RUN_NAME", help="name of the run, e.g. llama-EE-PREFILL")
    arguments = parser.parse_args()
    print_scores(evaluate(arguments.model, runs_dir_of(arguments, arguments.model)), wide_console())


def _tables(doc: str | None) -> None:
    parser = results_parser(doc)
    add_output_dir(parser)
    arguments = parser.parse_args()
    tables = load_tables(runs_dir(arguments), jobs=num_jobs(), progress=True)
    for path in write_tables(tables, output_dir(arguments) / "tables"):
        print(f"wrote {path}")
    print(*headline_of(tables), sep="\n")


def _plots(doc: str | None) -> None:
    parser = results_parser(doc)
    add_output_dir(parser)
    arguments = parser.parse_args()
    tables = load_tables(runs_dir(arguments), jobs=num_jobs(), progress=True)
    for path in write_plots(tables, output_dir(arguments) / "plots"):
        print(f"wrote {path}")


def _tradeoff(doc: str | None) -> None:
    parser = results_parser(doc)
    add_output_dir(parser)
    parser.add_argument(
        "--speeds",
        metavar="PATTERN",
        help=f"`adaskip bench` results, with {{model}} for a model's name (default: {SPEEDS})",
    )
    arguments = parser.parse_args()
    board = load_scoreboard(runs_dir(arguments), jobs=num_jobs(), progress=True)
    tradeoff = find_tradeoff(board, str(given_or_default(arguments.speeds, SPEEDS)))
    for path in write_tradeoff(tradeoff, output_dir(arguments)):
        print(f"wrote {path}")
    print(*sentences(tradeoff), sep="\n")


SCRIPTS: dict[str, Callable[[str | None], None]] = {
    "eval": _eval,
    "tables": _tables,
    "plots": _plots,
    "tradeoff": _tradeoff,
}
