"""speed/lossless.py on a testbed model: continues, refuses another run's file, and counts what differs."""

from __future__ import annotations

import json
import runpy
from pathlib import Path

import pytest

from adaskip.studies.bench import lossless

SCRIPT = Path(__file__).resolve().parents[2] / "speed" / "lossless.py"


@pytest.fixture
def start(tmp_path, monkeypatch, capsys):
    """Run the script on the testbed's llama with some drafts: exit code, standard output, the line of an error."""
    monkeypatch.setattr(lossless, "DRAFTS", lossless.DRAFTS[:2])

    def start(*options: str) -> tuple[int, str, str]:
        arguments = ["lossless.py", "--testbed", "--model", "llama", "--threads", "1", "--output-dir", str(tmp_path)]
        monkeypatch.setattr("sys.argv", [*arguments, *options])
        with pytest.raises(SystemExit) as ended:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        return ended.value.code, *capsys.readouterr()  # pyright: ignore[reportReturnType]

    return start


@pytest.mark.slow
def test_the_benchmark_continues_and_counts_differing_answers(start, tmp_path):
    code, table, _ = start("--prompts", "3")
    assert code == 0
    assert "12 answers compared with stock `generate`, 0 differing" in table
    path = tmp_path / "cpu" / "lossless-llama.json"
    whole = json.loads(path.read_text())
    first, second, third = whole["records"]
    path.write_text(json.dumps({**whole, "records": [first]}))
    assert start("--prompts", "3")[0] == 0
    again = json.loads(path.read_text())["records"]
    assert again[0] == first
    for made, before in zip(again[1:], (second, third), strict=True):
        assert [x["tokens"] for x in made["answers"].values()] == [x["tokens"] for x in before["answers"].values()]
    code, _, error = start("--prompts", "2")
    assert code == 2
    assert "was measured with other prompts_fingerprint; give another --output-dir" in error
    older = {**whole["manifest"], "drafting_version": 1}
    path.write_text(json.dumps({"manifest": older, "records": [first]}))
    assert "was measured with other drafting_version; give another --output-dir" in start("--prompts", "3")[2]
    found = {"row": 0, "at": 1, "logits": [2.5, 2.25], "spacing": 0.25}
    again[1]["answers"]["adaskip 25.0% adaptive"]["differences"] = [found]
    path.write_text(json.dumps({**whole, "records": again}))
    table = start("--draw-only")[1]
    assert "12 answers compared with stock `generate`, 1 differing" in table
    assert "| 1     | 2.5, 2.25          | 1" in table


def test_prompts_are_answered_together(start, tmp_path):
    code, table, _ = start("--prompts", "4", "--rows", "2", "--strategies", "ngrams", "--tasks", "trec", "qasper")
    assert code == 0
    assert "4 answers compared with stock `generate`, 0 differing" in table
    saved = json.loads((tmp_path / "cpu" / "lossless-llama-rows2.json").read_text())
    assert [(record["task"], len(set(record["ids"]))) for record in saved["records"]] == [("trec", 2), ("qasper", 2)]
    for record in saved["records"]:
        full, ngrams = record["answers"]["full"], record["answers"]["ngrams"]
        assert ngrams["tokens"] == full["tokens"]
        assert ngrams["verify_forwards"] <= max(map(len, full["tokens"])) - 1


def test_nothing_saved_is_nothing_to_draw(start, tmp_path):
    code, _, error = start("--draw-only")
    assert code == 2
    assert f"nothing is saved in {tmp_path}; leave out --draw-only" in error


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--prompts", "1"], "--prompts must be at least 2, not 1"),
        (["--models", "lama"], "unknown model of testbed 'lama'. Did you mean 'llama'?"),
        (["--strategies", "skipdecode"], "unknown strategy that drafts"),
        (["--peers", "prompt_lookup"], "unknown assisted generation"),
        (["--shares", "0.3"], "unknown share"),
        (["--strategies", "nested"], "--strategies nested drafts with all sets of a strategy; give a strategy with"),
        (["--strategies", "nested", "adaskip", "--shares", "0.25"], "give a strategy with several --shares, too"),
        (["--rows", "9", "--strategies", "ngrams"], "--rows must be 1 to 8, not 9"),
        (["--rows", "2"], "--rows 2: only n-grams draft for several rows; give --strategies ngrams"),
        (["--rows", "2", "--strategies", "ngrams", "--peers", "early_exit"], "give --strategies ngrams and no --peers"),
        (["--tasks", "terc"], "unknown task of testbed 'terc'. Did you mean 'trec'?"),
    ],
)
def test_a_mistaken_option_is_refused(start, options, says):
    code, _, error = start(*options)
    assert code == 2
    assert says in error


def test_the_whole_layer_drafts_skip_whole_layers():
    assert [draft.sublayers(16) for draft in lossless.DRAFTS] == [8, 12, 16, 8, 16, 8, 8]
    assert lossless.Draft("early_exit", 0.25).sublayers(5) == 2
    assert lossless.Draft("adaskip", 0.375).sublayers(5) == 4
