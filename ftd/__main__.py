"""`python -m ftd` is `ftd`."""

import sys

from ftd.cli import main

if __name__ == "__main__":
    sys.exit(main())
