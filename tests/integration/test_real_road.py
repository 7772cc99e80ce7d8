"""The road of real checkpoints, with small random snapshots in the layouts of the Hub: as typed, and when it fails."""

import json
import os
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adaskip import cli
from adaskip.strategies.names import GRID_STRATEGIES
from tests.checkpoints import write_family, write_hub_cache
from tests.tiny_runs import NUM_SAMPLES, ROOT

FAMILIES = ("llama", "internlm", "vicuna")
REPO, REVISION = "org/name", "0123456789abcdef0123456789abcdef01234567"


def script(monkeypatch, line: str, *options) -> int:
    """Exit code of `python <line> <options>`, run in this process."""
    path, *arguments = line.split()
    monkeypatch.setattr(sys, "argv", [str(ROOT / path), *arguments, *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / path), run_name="__main__")
    code = ended.value.code
    assert isinstance(code, int)
    return code


@pytest.mark.parametrize("family", FAMILIES)
def test_a_snapshot_goes_all_the_way_without_a_flag_more(family, data_dir, tmp_path, monkeypatch, capsys, away):
    """Data in, tables out: the model's own prompt limit, wrapper and stop tokens, and the smallest budget."""
    snapshot = write_hub_cache(family, tmp_path / "hub", REPO, REVISION)
    name = f"{family}-ADA-PREFILL"
    assert script(monkeypatch, f"prefill/run_{family}_ADA.py", "--checkpoint", snapshot, "--data-dir", data_dir) == 0
    assert capsys.readouterr().out.startswith(f"{name}/2-sublayers: {3 * NUM_SAMPLES} samples")
    manifest = json.loads((tmp_path / f"results/runs/{name}/2-sublayers/manifest.json").read_text())
    assert (manifest["revision"], manifest["num_layers"]) == (REVISION, 2)
    assert manifest["budget"] == {"sublayers": 2, "layers": 1.0, "fraction": 0.5}
    assert manifest["dtype"] == "float32"
    assert len(list((tmp_path / "results/profiles").glob(f"{family}-*.json"))) == 1
    assert script(monkeypatch, f"eval/eval.py --model {name}") == 0
    scores = capsys.readouterr().out
    assert "2 of 4" in scores
    buckets = scores[scores.index("by length") :].splitlines()
    assert sum(row.count("no samples") == 2 and f"({NUM_SAMPLES})" in row for row in buckets) == 3  # of 5000 words each
    assert script(monkeypatch, "eval/tables.py") == 0
    table = (tmp_path / "results/tables/table3_prefill.md").read_text()
    assert f"{NUM_SAMPLES} samples a task" in table
    assert "| 50 %    | AdaSkip" in table


def refuse(tmp_path: Path, *options, script="prefill/run_llama_ADA.py") -> str:
    """The one line on standard error with which the script ends, leaving nothing behind."""
    folder = tmp_path / "cwd"
    folder.mkdir()
    results = list((ROOT / "results").rglob("*-sublayers"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, str(ROOT / script), *map(str, options)]
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (2, ""), ended.stderr
    lines = ended.stderr.splitlines()
    assert len(lines) == 1, ended.stderr
    assert lines[0].startswith("error: ")
    assert not [path for path in folder.rglob("*") if path.is_file()]
    assert not list(folder.rglob("*-sublayers"))
    assert list((ROOT / "results").rglob("*-sublayers")) == results
    return lines[0]


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    return write_family("llama", tmp_path_factory.mktemp("llama"))


def truncated(folder: Path) -> None:
    path = sorted(folder.glob("model-*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-100])


def emptied(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def without_weights(folder: Path) -> None:
    for path in folder.glob("model*"):
        path.unlink()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (emptied, "has no config.json, so it is not a checkpoint in the Hugging Face layout"),
        (without_weights, "has no weights: neither model*.safetensors nor pytorch_model*.bin"),
        (truncated, "-of-00002.safetensors is truncated or not a safetensors file"),
        (shutil.rmtree, "/broken' does not exist"),
    ],
)
def test_a_damaged_checkpoint_is_refused(llama, data_dir, tmp_path, damage, says):
    broken = shutil.copytree(llama, tmp_path / "broken")
    damage(broken)
    assert says in refuse(tmp_path, "--checkpoint", broken, "--data-dir", data_dir)


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--checkpoint", "meta-llama/Llama-3.1-8B-Instruct"]])
def test_without_weights_and_network_the_line_says_where_to_get_them(data_dir, tmp_path, options):
    line = refuse(tmp_path, *options, "--data-dir", data_dir)
    assert "meta-llama/Llama-3.1-8B-Instruct (revision 0e9e39f249a16976918f6564b8830bc894c89659)" in line
    assert "--checkpoint DIR" in line


def without_field(record: str) -> str:
    return json.dumps({name: value for name, value in json.loads(record).items() if name != "answers"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda line: line[:40], "triviaqa_e.jsonl:2: not valid JSON ("),
        (without_field, "triviaqa_e.jsonl:2: the record has no field 'answers'; it has: "),
    ],
)
def test_damaged_data_is_refused_with_file_and_line(llama, data_dir, tmp_path, damage, says):
    broken = Path(shutil.copytree(data_dir, tmp_path / "broken"))
    lines = (broken / "triviaqa_e.jsonl").read_text().splitlines()
    (broken / "triviaqa_e.jsonl").write_text("\n".join([lines[0], damage(lines[1]), *lines[2:]]) + "\n")
    assert says in refuse(tmp_path, "--checkpoint", llama, "--data-dir", broken)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ([], "data.zip of zai-org/LongBench at 5e628be is not in the local Hub cache; give 'hub' to download it"),
        (["--data-dir", "nowhere"], "no LongBench data at nowhere: give a folder of <task>.jsonl files"),
        (["--tasks", "triviaq"], "unknown LongBench task 'triviaq'. Did you mean triviaqa?"),
        (["--budget", "65"], "budget of 65 sublayers (sublayers=65) is too large; allowed for 2 layers: 0..3"),
    ],
)
def test_a_mistaken_option_is_refused(llama, data_dir, tmp_path, options, says):
    data = [] if not options or "--data-dir" in options else ["--data-dir", data_dir]
    assert says in refuse(tmp_path, "--checkpoint", llama, *data, *options)


@pytest.mark.slow
def test_a_budget_of_65_sublayers_is_refused_without_weights(tmp_path, data_dir):
    line = refuse(tmp_path, "--budget", "65", "--data-dir", data_dir)
    assert "budget of 65 sublayers (sublayers=65) is too large; allowed for 32 layers: 0..63" in line


GRID = ["grid", "--models", "llama", "--dry-run"]


def test_the_dry_run_needs_neither_weights_nor_data(tmp_path, monkeypatch, capsys, away):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cli.main([*GRID, "--subset", "10", "--data-dir", "hub"]) == 0
    lines = capsys.readouterr().out.splitlines()
    count = 3 * (1 + 3 * (len(GRID_STRATEGIES) - 1))
    assert len(lines) == count + 5
    hours = {}
    for line in lines[:count]:
        label, samples, _, number, unit, state = line.split()
        assert (samples, state) == ("30" if "PREFILL" in label else "20", "missing")
        hours[label] = float(number) * (1 if unit == "h" else 1 / 3600)
    assert (
        hours["llama-FULL-E2E/0-sublayers"] > hours["llama-ADA-E2E/8-sublayers"] > hours["llama-ADA-E2E/16-sublayers"]
    )
    assert hours["llama-FULL-E2E/0-sublayers"] == hours["llama-FULL-DECODE/0-sublayers"]
    assert hours["llama-EE-DECODE/8-sublayers"] > hours["llama-EE-E2E/8-sublayers"]
    assert lines[count] == f"0 of {count} cells done in results/runs"
    assert "on one L20" in lines[count + 1]
    assert "a lower bound" in lines[count + 1]
    assert "The data was not found" in lines[count + 2]
    assert lines[count + 3].startswith(
        "llama: 16.1 GB of weights (meta-llama/Llama-3.1-8B-Instruct, not on this machine)"
    )
    assert "0.1 GB of data" in lines[count + 4]
    assert not list(tmp_path.iterdir())


def test_the_dry_run_counts_samples_and_words_where_there_is_data(tmp_path, data_dir, checkpoint, capsys):
    given = [*GRID, "--phases", "decode", "--checkpoint", str(checkpoint), "--data-dir", str(data_dir)]
    assert cli.main([*given, "--output-dir", str(tmp_path)]) == 0
    output = capsys.readouterr().out
    assert output.count(f"{2 * NUM_SAMPLES} samples") == len(GRID_STRATEGIES)
    assert "The samples were counted; a word is taken as 1.4 tokens" in output
    assert "not on this machine" not in output
    assert "GB of data" not in output


def test_a_dry_run_for_a_faster_gpu_takes_less(tmp_path, capsys):
    times = {}
    for device in ("L20", "H200"):
        given = [*GRID, "--phases", "prefill", "--strategies", "full", "--output-dir", str(tmp_path)]
        assert cli.main([*given, "--estimate-for", device]) == 0
        number, unit = capsys.readouterr().out.split("samples")[1].split()[:2]
        times[device] = float(number) * (3600 if unit == "h" else 1)
    assert times["L20"] > 4 * times["H200"] > 0
    assert cli.main([*GRID, "--estimate-for", "L2"]) == 2
    assert "unknown --estimate-for 'L2'. Allowed: L20, " in capsys.readouterr().err


def test_a_dry_run_of_a_task_of_unknown_size_asks_for_the_data(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert cli.main([*GRID, "--tasks", "hotpotqa"]) == 2
    assert "the number of samples of hotpotqa is unknown without its data; give --data-dir" in capsys.readouterr().err


def test_the_dry_run_counts_the_searches_of_calibrated(tmp_path, capsys):
    seconds = {}
    for strategy in ("adaskip", "calibrated", "cosine_window", "blockpruner", "evopress"):
        given = [*GRID, "--phases", "decode", "e2e", "--strategies", strategy, "--output-dir", str(tmp_path)]
        assert cli.main(given) == 0
        told = capsys.readouterr().out.split("searches of sets ")[1].split(";")[0]
        number, unit = told.split()
        seconds[strategy] = float(number) * (3600 if unit == "h" else 1)
    assert seconds["adaskip"] == 0
    assert seconds["calibrated"] > 60
    assert 0 < seconds["cosine_window"] < seconds["calibrated"]
    assert seconds["blockpruner"] > 10 * seconds["cosine_window"]
    assert seconds["evopress"] > 60


@pytest.mark.slow
def test_a_whole_grid_runs_continues_and_becomes_tables(checkpoint, data_dir, tmp_path, monkeypatch, capsys, away):
    given = ["grid", "--models", "llama", "--checkpoint", str(checkpoint), "--data-dir", str(data_dir)]
    given += ["--subset", "2", "--max-new-tokens", "8", "--threads", "1"]
    assert cli.main(given) == 0
    cells, samples = 3 * len(GRID_STRATEGIES), 2 * (3 + 2 + 2) * len(GRID_STRATEGIES)
    complete = f"{cells} of {cells} cells complete in results/runs"
    assert f"{complete}, {samples} samples made now" in capsys.readouterr().out
    names = sorted(path.name.split("-")[1] for path in (tmp_path / "results/profiles").glob("llama-selection-*.json"))
    assert names == ["selection"] * 3
    assert not list((tmp_path / "results/profiles").glob("*.partial.jsonl"))
    assert cli.main(given) == 0
    assert f"{complete}, 0 samples made now" in capsys.readouterr().out
    assert script(monkeypatch, "eval/tables.py") == 0
    assert "| 33.33 % | Calibrated" in (tmp_path / "results/tables/table3_prefill.md").read_text()
    assert (tmp_path / "results/tables/selection.md").is_file()


def test_a_grid_that_cannot_be_is_refused_before_any_cell(tmp_path, data_dir, llama, capsys):
    given = ["grid", "--models", "llama", "--checkpoint", str(llama), "--data-dir", str(data_dir)]
    assert cli.main([*given, "--budgets", "65", "--output-dir", str(tmp_path / "runs")]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert "budget of 65 sublayers" in lines[0]
    assert not (tmp_path / "runs").exists()
