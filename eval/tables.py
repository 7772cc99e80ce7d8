"""Writes Tables 3 and 4, ours beside the paper's, and the summary: `python eval/tables.py [--testbed]`."""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.tables.command", "tables", __doc__))
