"""The code in README and guides runs as it stands, and README keeps to its length."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from adaskip.benchmarks.protocol import BENCHMARKS
from adaskip.core import blocks
from adaskip.strategies.registry import registry

ROOT = Path(__file__).parents[2]
README = ROOT / "README.md"
START = ROOT / "docs/guides/index.md"
GUIDES = sorted(set((ROOT / "docs/guides").glob("*.md")) - {START})
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def code_of(page: Path) -> str:
    """All blocks of a page that are marked `python`; those marked `py` need what the tests lack (CUDA, the Hub)."""
    return "\n".join(BLOCK.findall(page.read_text(encoding="utf-8")))


def run_from_the_root(source: str, page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("page")  # dataclasses look their module up
    monkeypatch.setitem(sys.modules, "page", module)
    monkeypatch.chdir(ROOT)
    for each in (registry, BENCHMARKS):
        monkeypatch.setattr(each, "classes", dict(each.all()))  # what a page registers is forgotten
    monkeypatch.setattr(blocks, "_structures", dict(blocks._structures))
    exec(compile(source, page.name, "exec"), vars(module))


@pytest.mark.parametrize("page", [README, ROOT / "docs/index.md"], ids=lambda page: page.name)
def test_the_first_lines_answer_the_question(page, monkeypatch, capsys):
    run_from_the_root(code_of(page), page, monkeypatch)
    assert capsys.readouterr().out.rstrip().endswith("Answer: Ada sells red ships to Oslo")


def test_readme_and_start_page_show_the_same_first_lines():
    assert code_of(README) == code_of(ROOT / "docs/index.md")


def test_readme_has_at_most_150_lines():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("page", [page for page in GUIDES if code_of(page)], ids=lambda page: page.stem)
def test_a_guide_is_a_program_that_runs(page, monkeypatch):
    run_from_the_root(code_of(START) + code_of(page), page, monkeypatch)


@pytest.mark.parametrize(
    "page", [README, *sorted(ROOT.glob("docs/**/*.md")), ROOT / "CONTRIBUTING.md"], ids=lambda page: page.stem
)
def test_links_of_pages_hold_in_the_repository(page):
    links = re.findall(r"\]\(([^)\s#:]+)(?:#[^)\s]*)?\)", page.read_text(encoding="utf-8"))
    assert [link for link in links if not (page.parent / link).exists()] == []
