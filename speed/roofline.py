"""The limit of the hardware: least TTFT and TPOT of every strategy on every GPU, beside the paper's speedups.

python speed/roofline.py [--measure] [--prompt-tokens 8000] [--new-tokens 512]
"""

import sys

from adaskip.studies.limits.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
