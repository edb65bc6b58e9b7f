"""Every YAML example of the README and the docs has no fault: a recipe, or a part of one that is filled up here."""

import re
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfpipe.cli import main
from hfpipe.recipe import Recipe

ROOT = Path(__file__).parent.parent
BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = {
    f"{page.name}:{page.read_text()[: found.start()].count(chr(10)) + 1}": textwrap.dedent(found[1])
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    for found in BLOCK.finditer(page.read_text())
}
WHOLE = {key: text for key, text in EXAMPLES.items() if "..." not in re.sub(r"#.*|\"[^\"]*\"", "", text)}
WEB: dict[str, Any] = {"name": "web", "kind": "pretrain", "objective": "causal", "data": [{"path": "team/web"}]}
CHAT: dict[str, Any] = {"name": "chat", "kind": "sft", "data": [{"path": "team/chat"}], "lora": {"r": 8}}
STEPS = {"training": {"max_steps": 10}}
HELD = {"data": {"path": "team/held", "split": "test"}, "metrics": ["bits_per_byte"]}


def filled(part: Any) -> dict[str, Any]:
    """A whole recipe around an example, which may be a list of stages, fields of a recipe or of a stage, or suites."""
    stages, more = [CHAT], {}
    if isinstance(part, list):
        stages = part
    elif set(part) <= set(Recipe.model_fields):
        more = part
    elif set(part) & {"data", "training", "quantization"}:
        stages = [CHAT | part]
    else:
        more = {"evaluate": part}
    if "cross_validation" in more:
        stages = [CHAT | {"name": more["cross_validation"]["stage"]}]
    stages = [STEPS | stage for stage in (WEB, *stages)]
    return {"name": "x", "model": {"id": "team/base"}, "stages": stages, "evaluate": {"general": HELD}, **more}


@pytest.mark.parametrize("example", WHOLE)
def test_an_example_has_no_fault(example: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(filled(yaml.safe_load(WHOLE[example])), sort_keys=False))
    assert main(["check", "--fast", str(path)]) == 0, capsys.readouterr()


def test_most_examples_are_whole() -> None:
    assert len(WHOLE) > 0.7 * len(EXAMPLES)
