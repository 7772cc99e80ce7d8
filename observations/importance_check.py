"""Skips the most and the least similar layers.

python observations/importance_check.py --model llama|internlm|vicuna|all [--testbed]
"""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.observations.command", "importance_check", __doc__))
