"""`python -m vitx` is the command `vitx`."""

import sys

from vitx.cli import main

if __name__ == "__main__":
    sys.exit(main())
