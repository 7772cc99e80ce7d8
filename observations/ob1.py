"""Observation 1, Figure 2: IO similarity per whole layer.

python observations/ob1.py --model llama|internlm|vicuna|all [--testbed]
"""

import sys

from adaskip.studies.observations.command import main

if __name__ == "__main__":
    sys.exit(main("ob1", __doc__))
