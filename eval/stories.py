"""Measures the test loss of stories260K under every strategy, on stories sampled from the full model.

python eval/stories.py [--draw-only]; the environment variable ADASKIP_REAL names the folder that contains stories260K
"""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.ablation.stories", __doc__))
