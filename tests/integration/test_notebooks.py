"""The code of the notebooks runs without Jupyter and prints what the committed notebooks show."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import matplotlib as mpl
import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))
OF_A_MACHINE = re.compile(r"/(home|root|tmp|work|Users|opt)/|Traceback")


def code_cells(path: Path) -> list[dict]:
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def printed(cell: dict) -> str:
    return "".join("".join(output["text"]) for output in cell["outputs"] if output.get("name") == "stdout")


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_prints_what_it_shows(path, monkeypatch, capsys):
    """Cells tagged `checked` print the same on every machine; what the others claim of their numbers they assert."""
    module = ModuleType(path.stem)
    monkeypatch.setitem(sys.modules, path.stem, module)
    monkeypatch.chdir(path.parent)
    with mpl.rc_context({"backend": "agg"}):
        for cell in code_cells(path):
            exec(compile("".join(cell["source"]), path.name, "exec"), vars(module))
            shown = capsys.readouterr().out
            if "checked" in cell["metadata"].get("tags", ()):
                assert shown == printed(cell)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_committed_notebook_has_outputs_and_nothing_of_a_machine(path):
    cells = code_cells(path)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert sum(bool(cell["outputs"]) for cell in cells) >= len(cells) - 1
    assert not OF_A_MACHINE.search(json.dumps([cell["outputs"] for cell in cells]))
