"""Tables 1 and 2: hit rates between datasets, and within requests.

python observations/tables12.py --model llama|internlm|vicuna|all [--testbed]
"""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.observations.command", "tables12", __doc__))
