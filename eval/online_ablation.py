"""Compares online learning with different P and beta against none: sublayers gained and score lost.

python eval/online_ablation.py --testbed [--jobs N] [--draw-only]
"""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.ablation.online_findings", __doc__))
