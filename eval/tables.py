"""Writes Tables 3 and 4, ours beside the paper's, and the summary: `python eval/tables.py [--testbed]`."""

import sys

from adaskip.studies.tables.console import add_output_dir, exit_code, num_jobs, output_dir, results_parser, runs_dir
from adaskip.studies.tables.report import headline_of, load_tables, write_tables


def main() -> None:
    parser = results_parser(__doc__)
    add_output_dir(parser)
    arguments = parser.parse_args()
    tables = load_tables(runs_dir(arguments), jobs=num_jobs(), progress=True)
    for path in write_tables(tables, output_dir(arguments) / "tables"):
        print(f"wrote {path}")
    print(*headline_of(tables), sep="\n")


if __name__ == "__main__":
    sys.exit(exit_code(main))
