"""Observation 3, Figure 4: IO similarity in prefill and in decode.

python observations/ob3.py --model llama|internlm|vicuna|all [--testbed]
"""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.observations.command", "ob3", __doc__))
