"""The 60 run scripts hold names only, and those are the names in their paths."""

import ast
from pathlib import Path

import pytest

from adaskip.core.plan import PHASES
from adaskip.models.registry import registry
from adaskip.strategies.names import SHORT_NAMES

ROOT = Path(__file__).resolve().parents[2]
EXPECTED = {
    f"{phase}/run_{model}_{short}.py": {"phase": phase, "model": model, "strategy": strategy}
    for phase in PHASES
    for model in registry()
    for strategy, short in SHORT_NAMES.items()
    if short in ("EE", "SD", "US", "ADA", "CAL")
}
WORDS = {
    "prefill": "Prefill phase",
    "decode": "Decode phase",
    "e2e": "End to end",
    "llama": "LLaMA",
    "internlm": "InternLM",
    "vicuna": "Vicuna",
    "smollm2": "SmolLM2",
    "early_exit": "Early Exit",
    "skipdecode": "SkipDecode",
    "unified": "Unified Skipping",
    "adaskip": "AdaSkip",
    "calibrated": "Calibrated",
}


def test_there_are_exactly_the_60_scripts():
    found = {str(path.relative_to(ROOT)) for phase in PHASES for path in (ROOT / phase).glob("*.py")}
    assert found == set(EXPECTED)
    assert len(found) == 60


@pytest.mark.parametrize(("path", "names"), EXPECTED.items())
def test_a_script_names_the_cell_of_its_path_and_nothing_else(path, names):
    script = ast.parse((ROOT / path).read_text())
    assert ast.get_docstring(script) == ", ".join(WORDS[name] for name in names.values()) + "."
    _, imported, guard = script.body
    assert ast.unparse(imported) == "from adaskip.cli import run_cell"
    (call,) = guard.body
    assert ast.unparse(guard.test) == "__name__ == '__main__'"
    assert call.value.func.id == "run_cell"
    assert {keyword.arg: keyword.value.value for keyword in call.value.keywords} == names
