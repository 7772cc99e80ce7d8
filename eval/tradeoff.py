"""Draws score kept against measured speedup with the Pareto front: `python eval/tradeoff.py --testbed`."""

import sys

from adaskip.common.paths import given_or_default
from adaskip.studies.tables.console import add_output_dir, exit_code, num_jobs, output_dir, results_parser, runs_dir
from adaskip.studies.tables.report import write_tradeoff
from adaskip.studies.tables.scoreboard import load_scoreboard
from adaskip.studies.tables.tradeoff import find_tradeoff
from adaskip.studies.tables.tradeoff_text import sentences

SPEEDS = "speed/results/cpu/testbed_{model}.json"


def main() -> None:
    parser = results_parser(__doc__)
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


if __name__ == "__main__":
    sys.exit(exit_code(main))
