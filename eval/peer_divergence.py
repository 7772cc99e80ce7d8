"""Compares how far the output diverges from the full model's under each strategy, on records that chose no set.

python eval/peer_divergence.py --model smollm2 --data-dir DIR [--limit N] [--selections [NAME=]FILE ...] [--draw-only]
"""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.ablation.peers", __doc__))
