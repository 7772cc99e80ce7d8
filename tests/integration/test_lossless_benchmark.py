"""speed/lossless.py on a testbed model: continues, refuses another run's file, and counts what differs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "speed" / "lossless.py"


@pytest.mark.slow
def test_the_benchmark_continues_and_counts_differing_answers(tmp_path, monkeypatch, capsys):
    def start(prompts):
        arguments = ["lossless.py", "--model", "llama", "--prompts", str(prompts), "--output", str(tmp_path)]
        monkeypatch.setattr("sys.argv", arguments)
        runpy.run_path(str(SCRIPT), run_name="__main__")
        return capsys.readouterr().out

    assert "10 answers compared with stock `generate`, 0 differing" in start(2)
    path = tmp_path / "lossless-llama.json"
    whole = json.loads(path.read_text())
    first, second = whole["records"]
    path.write_text(json.dumps({**whole, "records": [first]}))
    start(2)
    again = json.loads(path.read_text())["records"]
    assert again[0] == first
    assert again[1]["answers"]["full"]["tokens"] == second["answers"]["full"]["tokens"]
    with pytest.raises(SystemExit) as refusal:
        start(3)
    assert refusal.value.code == 2
    again[1]["answers"]["adaskip 25.0% gamma 4"]["tokens"][-1] += 1
    path.write_text(json.dumps({**whole, "records": again}))
    table = start(2)
    assert "10 answers compared with stock `generate`, 1 differing" in table
    assert "is finished" in table
