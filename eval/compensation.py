"""What stands in for a skipped sublayer: Eq. (3)'s scale against nothing, least squares, and per-channel affine.

python eval/compensation.py --testbed [--draw-only]
"""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.ablation.compensation", __doc__))
