"""What docs/ shows works: recipes load, keys and verbs exist, links lead somewhere."""

import re
from pathlib import Path

import pytest

from pipeline.arguments import build_parser
from pipeline.recipe import Data
from pipeline.recipe.data import FORMATS
from pipeline.recipe_file import parse_yaml

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
DATA = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"^```yaml\n(.*?)^```$", DATA, re.MULTILINE | re.DOTALL)
LVIS = {"name": "lvis", "format": "lvis", "images": "coco", "annotations": "lvis.json"}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=lambda text: text.split("\n")[1].strip()[:40])
def test_every_recipe_of_the_data_page_loads(snippet: str) -> None:
    tree = parse_yaml(snippet, "docs/data.md")
    assert isinstance(tree, dict)
    section = tree.pop("data", tree)
    Data.model_validate({"root": "/datasets", "train": [LVIS], **section})


def test_the_data_page_has_a_recipe_of_every_format() -> None:
    shown = set(re.findall(r"format: (\w+)", "".join(SNIPPETS)))
    assert shown == set(FORMATS)


def commands() -> list[str]:
    """Command lines of all pages, which stand indented; without what follows a #."""
    text = "\n".join(page.read_text(encoding="utf-8") for page in PAGES)
    joined = re.sub(r"\\\n\s+", "", text)
    return [
        re.sub(r"\s#.*", "", line) for line in re.findall(r"^    longtail ([a-z].*)$", joined, re.M)
    ]


@pytest.mark.parametrize("line", commands())
def test_every_command_parses(line: str) -> None:
    words = line.replace("[", "").replace("]", "").split()
    assert build_parser().parse_args(words).verb == words[0]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
