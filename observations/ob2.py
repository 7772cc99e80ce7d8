"""Observation 2, Figure 3: IO similarity of attention and FFN sublayers.

python observations/ob2.py --model llama|internlm|vicuna|all [--testbed]
"""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.observations.command", "ob2", __doc__))
