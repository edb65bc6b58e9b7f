"""README and docs are true: examples of YAML have no fault, links and paths lead somewhere, references are made.

An example is a recipe, or a part of one that is filled up here.
"""

import importlib.util
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
import yaml

from hfpipe.cli import main
from hfpipe.cli.parser import build_parser
from hfpipe.core import errors
from hfpipe.recipe import Recipe

ROOT = Path(__file__).parent.parent
BESIDE = ("README.md", "README.zh-CN.md", "CONTRIBUTING.md", "AGENTS.md", "llms.txt")
PAGES = [*(ROOT / name for name in BESIDE), *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```yaml\n(.*?)^```$", re.MULTILINE | re.DOTALL)
EXAMPLES = {
    f"{page.name}:{page.read_text()[: found.start()].count(chr(10)) + 1}": textwrap.dedent(found[1])
    for page in PAGES
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


def commands(page: Path) -> list[str]:
    """The commands of hfpipe in the code of a page, whole ones, as a shell would see them."""
    text = page.read_text()
    code = "\n".join(found[1] for found in re.finditer(r"^```bash\n(.*?)^```$", text, re.MULTILINE | re.DOTALL))
    code += "\n" + "\n".join(line[4:] for line in text.splitlines() if line.startswith("    "))
    code += "\n" + "\n".join(re.findall(r"`(hfpipe [a-z][^`]*)`", text))
    code = re.sub(r"\\\n\s*", " ", code)
    found = []
    for line in code.splitlines():
        line = re.sub(
            r"^(\w+=\S+ )*(\$ )?|^echo .*\| |^accelerate launch .*-m (?=hfpipe)|\.venv/bin/", "", line.strip()
        )
        words = re.split(r"\s#\s|\s[|&>]", line)[0].replace("...", "").split()
        if line.startswith("hfpipe ") and words[1].isalpha() and not re.search(r"[\[(]|hfpipe \w+ \w+ prints", line):
            found.append(" ".join(words))
    return found


WRITTEN = [page for page in PAGES if page.name not in ("commands.md", "recipe-reference.md")]


@pytest.mark.parametrize("page", WRITTEN, ids=lambda page: page.name)
def test_commands_have_the_options_that_there_are(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = []
    for line in commands(page):
        try:
            build_parser().parse_args(shlex.split(line)[1:])
        except SystemExit:
            said = capsys.readouterr().err.splitlines()[-1]
            if "arguments are required" not in said:  # the name of a command in a sentence
                wrong.append(f"{line}: {said}")
    assert wrong == []


def make_references() -> Any:
    spec = importlib.util.spec_from_file_location("make_references", ROOT / "docs" / "make_references.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_references_are_what_the_code_makes() -> None:
    for name, make in make_references().PAGES.items():
        assert (ROOT / "docs" / name).read_text() == make(), f"docs/{name} is out of date: run `make docs`"


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    missing = [page.name for page in PAGES if page.parent == ROOT / "docs" and f"({page.name})" not in index]
    assert missing == ["README.md"]


def test_the_site_has_every_page() -> None:
    config = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    shown = set(re.findall(r"'([^']+\.md)'", str(config["nav"])))
    written = {str(page.relative_to(ROOT)) for page in PAGES if page.suffix == ".md"}
    assert shown == written


def test_the_page_on_faults_has_every_exit_code() -> None:
    told = {int(code) for code in re.findall(r"^\| (\d+) \|", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE)}
    raised = {kind.exit_code for kind in vars(errors).values() if isinstance(kind, type)}
    assert told == raised | {0, 1, 130}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    wrong = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        name, _, anchor = target.partition("#")
        if "://" in target:
            continue
        linked = (page.parent / name).resolve() if name else page
        headings = re.findall(r"^#+ (.*)$", linked.read_text(), re.MULTILINE) if linked.suffix == ".md" else []
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        if not linked.exists() or (anchor and anchor not in anchors):
            wrong.append(target)
    for path in re.findall(r"`((?:hfpipe|tests|docs|recipes|benchmarks)/[\w./-]+)`", text):
        if not (ROOT / path).exists():
            wrong.append(path)
    assert wrong == []
