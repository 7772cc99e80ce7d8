"""Scores every budget and task of a run: `python eval/eval.py --model llama-EE-PREFILL [--testbed]`."""

import sys

from adaskip.studies.tables.console import exit_code, results_parser, runs_dir_of, wide_console
from adaskip.studies.tables.evaluate import evaluate, print_scores


def main() -> None:
    parser = results_parser(__doc__)
    parser.add_argument("--model", required=True, metavar="RUN_NAME", help="name of the run, e.g. llama-EE-PREFILL")
    arguments = parser.parse_args()
    print_scores(evaluate(arguments.model, runs_dir_of(arguments, arguments.model)), wide_console())


if __name__ == "__main__":
    sys.exit(exit_code(main))
