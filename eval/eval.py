"""Scores every budget and task of a run: `python eval/eval.py --model llama-EE-PREFILL [--testbed]`."""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.tables.command", "eval", __doc__))
