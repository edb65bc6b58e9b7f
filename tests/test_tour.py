"""The tours are walked: every command in them is run by a shell, in the order of the page, on fewer steps and rows."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FEWER = {
    "hfpipe run quickstart.yaml": "--set stages.prose.training.max_steps=8 --set stages.packages.data.0.take=64 "
    "--set evaluate.general.data.take=10 --set evaluate.packages.data.take=10 --set shift=false "
    "--set evaluate.general.budget=100%",
    "hfpipe run my.yaml": "--set stages.instructions.training.num_train_epochs=1",
}


def script(page: Path) -> str:
    """The commands of a page as one shell script; what an answer of the model would be is left to chance."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    lines = "".join(blocks).splitlines()
    shorter = [
        f"{found} {FEWER[found]}" if (found := line.split("  #")[0].strip()) in FEWER else line for line in lines
    ]
    assert sum(line.split(" --set")[0] in FEWER for line in shorter) == len(FEWER)
    return "set -e\n" + "\n".join(shorter) + "\n"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("name", ["tour.md"])
def test_every_command_of_the_tour_runs(name: str, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-c", script(ROOT / "docs" / name)],
        cwd=tmp_path,
        env=os.environ | {"PATH": path},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    for words in ("start it with", "use it:", "strength", "wrote my.yaml", "runs/my/report.html"):
        assert words in done.stdout


def test_the_tour_has_the_same_commands_in_chinese() -> None:
    def spoken(name: str) -> list[str]:
        return [line.split("  #")[0].rstrip() for line in script(ROOT / "docs" / name).splitlines()]

    assert spoken("tour.md") == spoken("tour.zh-CN.md")
