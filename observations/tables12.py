"""Tables 1 and 2: hit rates between datasets, and within requests.

python observations/tables12.py --model llama|internlm|vicuna|all [--testbed]
"""

import sys

from adaskip.studies.observations.command import main

if __name__ == "__main__":
    sys.exit(main("tables12", __doc__))
