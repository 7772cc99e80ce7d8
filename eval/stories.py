"""Test loss of stories260K under every strategy, on stories that the full model tells.

python eval/stories.py [--draw-only], with stories260K in $ADASKIP_REAL
"""

import sys

from adaskip.studies.ablation.selection import main

if __name__ == "__main__":
    sys.exit(main(__doc__))
