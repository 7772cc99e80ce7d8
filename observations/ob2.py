"""Observation 2, Figure 3: IO similarity of attention and FFN sublayers.

python observations/ob2.py --model llama|internlm|vicuna|all [--testbed]
"""

import sys

from adaskip.studies.observations.command import main

if __name__ == "__main__":
    sys.exit(main("ob2", __doc__))
