"""Observation 3, Figure 4: IO similarity in prefill and in decode.

python observations/ob3.py --model llama|internlm|vicuna|all [--testbed]
"""

import sys

from adaskip.studies.observations.command import main

if __name__ == "__main__":
    sys.exit(main("ob3", __doc__))
