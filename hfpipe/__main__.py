"""`python -m hfpipe`, what `accelerate launch -m hfpipe` starts on every rank, and the command `hfpipe`."""

import _signal  # the built-in part of `signal`, which takes no import
import os
import sys

# `-m` puts the working directory first: a file html.py that lies there would run in place of the library's, with the
# token of this machine at hand. Only the folder of hfpipe itself stays, last: spawned processes look for it.
try:
    _here = os.getcwd()
except OSError:  # it was removed
    _here = ""
_package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:] = [*(path for path in sys.path if path not in ("", _here, _package)), _package]


def start() -> int:
    """Runs the command line; signals are handled before anything else is imported."""
    all_of_them = {_signal.SIGINT, _signal.SIGTERM, _signal.SIGHUP}
    _signal.pthread_sigmask(_signal.SIG_BLOCK, all_of_them)
    from hfpipe.core import signals

    signals.install()
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, all_of_them)
    several = os.environ.get("WORLD_SIZE", "") not in ("", "0", "1")
    if several and os.environ.get("RANK", "0") != "0":  # the main process alone talks; faults go to the error output
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    from hfpipe.cli import main

    code = main()
    if signals.pending() or (several and code):  # threads of libraries would keep the process for as long as they like
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code


if __name__ == "__main__":  # a spawned process imports this file too
    sys.exit(start())
