"""The command `vitx`, run as `python -m vitx`."""

import sys

from vitx.cli import main

if __name__ == "__main__":
    sys.exit(main())
