"""Times lossless mode against the full model: differing tokens, acceptance rate, speedup, break-even.

python speed/lossless.py --testbed --threads 1 [--models llama internlm vicuna stories260K] [--draw-only]
"""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.bench.lossless", __doc__))
