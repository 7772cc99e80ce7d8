"""Draws scores against the budget, retention, and the skipped sublayers: `python eval/plots.py [--testbed]`."""

import sys

from adaskip.studies.tables.console import add_output_dir, exit_code, num_jobs, output_dir, results_parser, runs_dir
from adaskip.studies.tables.report import load_tables, write_plots


def main() -> None:
    parser = results_parser(__doc__)
    add_output_dir(parser)
    arguments = parser.parse_args()
    tables = load_tables(runs_dir(arguments), jobs=num_jobs(), progress=True)
    for path in write_plots(tables, output_dir(arguments) / "plots"):
        print(f"wrote {path}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
