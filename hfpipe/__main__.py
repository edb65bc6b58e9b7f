"""`python -m hfpipe`, and what `accelerate launch -m hfpipe` starts on every rank."""

import os
import sys

# `-m` puts the working directory first: a file html.py that lies there would run in place of the library's, with the
# token of this machine at hand. Only the folder of hfpipe itself stays, last: spawned processes look for it.
_package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:] = [*(path for path in sys.path if path not in ("", os.getcwd(), _package)), _package]

from hfpipe.cli import main  # noqa: E402

if __name__ == "__main__":  # a spawned process imports this file too
    sys.exit(main())
