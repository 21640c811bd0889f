"""`python -m pygpt` is the `pygpt` command."""

import sys

from pygpt.cli import main

if __name__ == "__main__":
    sys.exit(main())
