"""What stands in for a skipped sublayer: Eq. (3)'s scale against nothing, least squares, and per-channel affine.

python eval/compensation.py --testbed [--draw-only]
"""

import sys

from adaskip.studies.ablation.compensation import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
