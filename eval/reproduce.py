"""Makes tables, plots and observations of the testbed's models from the committed profiles; `make reproduce` runs it.

python eval/reproduce.py [--dry-run] [--limit N | --subset N] [--strategies full adaskip] [--output-dir DIR]
"""

import sys

from adaskip.common.commands import script

if __name__ == "__main__":
    sys.exit(script("adaskip.studies.reproduce.command", __doc__))
