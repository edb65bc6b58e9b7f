"""`python -m hfpipe`, and what `accelerate launch -m hfpipe` starts on every rank."""

import sys

from hfpipe.cli import main

if __name__ == "__main__":  # a spawned process imports this file too
    sys.exit(main())
