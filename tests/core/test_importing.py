"""The heavy imports: what they leave out, and what becomes of the garbage collector."""

import subprocess
import sys

import pytest


def said_by(program: str) -> list[str]:
    """The words that a program prints in a fresh interpreter."""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout.split()


def test_the_collector_rests_during_the_import_and_leaves_alone_what_it_made() -> None:
    first, between, kept, after, again = said_by(
        "import gc, sys, types\n"
        "from hfpipe.core.importing import importing\n"
        "print(gc.get_freeze_count())\n"
        "with importing():\n"
        "    print(gc.isenabled())\n"
        "    sys.modules['torch'] = types.ModuleType('torch')\n"
        "frozen = gc.get_freeze_count()\n"
        "print(frozen > 1000, gc.isenabled())\n"
        "with importing():\n"
        "    pass\n"
        "print(gc.get_freeze_count() == frozen)\n"  # torch was there: a caller's garbage is not kept
    )
    assert (first, between, kept, after, again) == ("0", "False", "True", "True", "True")


@pytest.mark.slow
def test_a_run_without_suites_imports_neither_evaluate_nor_the_statistics_of_scipy() -> None:
    program = (
        "import sys\n"
        "from hfpipe.pipeline.cure import run_with_cures\n"
        "print(*(name for name in ('torch', 'evaluate', 'scipy.stats') if name in sys.modules))"
    )
    assert said_by(program) == ["torch"]
