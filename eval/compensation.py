"""Compares compensations of a skipped sublayer: the scale of Eq. (3), none, least squares, and per-channel affine.

python eval/compensation.py --testbed [--draw-only]
"""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.ablation.compensation", __doc__))
