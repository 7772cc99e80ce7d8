"""Test loss of stories260K under every strategy, on stories that the full model tells.

python eval/stories.py [--draw-only], with stories260K in $ADASKIP_REAL
"""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.ablation.stories", __doc__))
