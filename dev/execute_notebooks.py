"""Executes notebooks and keeps their outputs: python dev/execute_notebooks.py notebooks/*.ipynb

What is written depends on the machine as little as possible: no times of cells, no versions of the kernel, no warnings
or progress bars (standard error). A notebook with a cell that raises is left as it was.
"""

import sys
import time
from pathlib import Path

import nbformat
from nbclient import NotebookClient


def execute(path: Path) -> float:
    """Run all cells from the notebook's folder and write the outputs into it. Returns the seconds it took."""
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
