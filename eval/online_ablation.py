"""Online learning on and off, P and beta varied: what it gains and what it costs.

python eval/online_ablation.py --testbed [--jobs N] [--draw-only]
"""

import sys

from adaskip.studies.ablation.command import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
