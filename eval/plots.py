"""Draws scores against the budget, retention, and the skipped sublayers: `python eval/plots.py [--testbed]`."""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.tables.command", "plots", __doc__))
