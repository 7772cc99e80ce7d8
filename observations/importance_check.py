"""Skips the most and the least similar layers.

python observations/importance_check.py --model llama|internlm|vicuna|all [--testbed]
"""

import sys

from adaskip.studies.observations.command import main

if __name__ == "__main__":
    sys.exit(main("importance_check", __doc__))
