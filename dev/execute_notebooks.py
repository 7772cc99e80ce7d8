"""Executes notebooks and stores their outputs: python dev/execute_notebooks.py notebooks/*.ipynb

The output depends on the machine as little as possible: no cell times, no kernel versions, no warnings or progress bars
(standard error). If a cell raises, the notebook is not changed.
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> float:
    """Run all cells in the notebook's folder and write the outputs to the notebook. Returns the time in seconds."""
    began = time.perf_counter()
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(path.parent)}}
    NotebookClient(notebook, timeout=300, record_timing=False, resources=resources).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    nbformat.write(notebook, path)
    return time.perf_counter() - began


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        print(f"{argument}: {execute(Path(argument)):.0f} s")
