"""`python -m adaskip` is the command `adaskip`."""

import sys

from adaskip.cli import main

if __name__ == "__main__":
    sys.exit(main())
