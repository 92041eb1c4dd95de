"""`python -m zo_peft`: the same as `zo-peft`."""

import sys

from zo_peft.cli import main

if __name__ == "__main__":
    sys.exit(main())
