"""Observation 1, Figure 2: IO similarity per whole layer.

python observations/ob1.py --model llama|internlm|vicuna|all [--testbed]
"""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.observations.command", "ob1", __doc__))
