"""Draws score kept against measured speedup with the Pareto front: `python eval/tradeoff.py --testbed`."""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.tables.command", "tradeoff", __doc__))
