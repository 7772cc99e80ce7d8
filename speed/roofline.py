"""Predicts the minimum TTFT and TPOT of every strategy on every GPU, beside the paper's speedups.

python speed/roofline.py [--measure] [--prompt-tokens 8000] [--new-tokens 512]
"""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.limits.command", __doc__))
