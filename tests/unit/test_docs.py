"""The documents: their links, files, commands and settings exist, and README.md stays short."""

import re
from pathlib import Path

import pytest

from distributed.config import help_text
from distributed.config.leaves import table_around

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "examples/README.md",
    *sorted((ROOT / "docs").glob("*.md")),
]
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"`((?:tests|distributed|launch|configs|slurm|docs|results|examples)/[\w./-]+\.\w+)`")
MODULE = re.compile(r"(?:python|torchrun[^`\n]*) -m ((?:distributed|launch)[\w.]*)")
SETTING = re.compile(r"--((?:sweep\.)?[a-z_]+(?:\.[a-z_0-9]+)+)")
TARGET = re.compile(r"(?:^|`)make (?:[A-Z]+=\S+ )*([a-z][\w-]*|\.venv/\.ready)", re.MULTILINE)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def anchor_of(heading: str) -> str:
    """Return GitHub's anchor of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(page: Path) -> set[str]:
    lines = FENCE.sub("", page.read_text()).splitlines()
    return {anchor_of(line.lstrip("#").strip()) for line in lines if line.startswith("#")}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_named_files_exist(page):
    assert [name for name in FILE.findall(page.read_text()) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page):
    text = page.read_text()
    modules = [ROOT.joinpath(*name.rstrip(".").split(".")) for name in MODULE.findall(text)]
    assert [
        path for path in modules if not (path / "__main__.py").exists() and not path.with_suffix(".py").exists()
    ] == []
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w.-]+):", makefile, re.MULTILINE)) | {".venv/.ready"}
    assert [name for name in TARGET.findall(text) if name not in targets] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_exist(page):
    known = set(re.findall(r"--([a-z_.0-9]+)", help_text()))
    used = {name.removeprefix("sweep.") for name in SETTING.findall(page.read_text())} - {"trial_seed", "metric"}
    unknown = {name for name in used - known if not table_around(name)}
    assert sorted(name for name in unknown if not name.startswith("scaling.")) == []


def lines_that_wrap(page: Path) -> list[str]:
    """Return the lines outside tables and pasted output, i.e. blocks without a language."""
    lines, block = [], None
    for line in page.read_text().splitlines():
        if line.startswith("```"):
            block = line if block is None else None
        elif block != "```" and not line.startswith("|"):
            lines.append(line)
    return lines


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_are_at_most_100_wide(page):
    assert [line for line in lines_that_wrap(page) if len(line) > 100] == []


def test_the_readme_is_short():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 150
    assert max(map(len, lines)) <= 100


def test_the_index_lists_every_page():
    listed = set(LINK.findall((ROOT / "docs" / "README.md").read_text()))
    assert {page.name for page in PAGES if page.parent.name == "docs"} - {"README.md"} <= listed


def test_the_map_lists_every_folder():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    folders = {path.parent.name for path in (ROOT / "distributed").glob("*/__init__.py")}
    assert sorted(name for name in folders if f"`{name}/" not in text) == []
