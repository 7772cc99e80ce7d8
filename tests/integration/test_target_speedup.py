"""`--target-speedup` on a tiny model: what it chooses, that it keeps it, and what it refuses."""

import json
import shutil

import pytest

from adaskip import cli
from adaskip.profiles.selection import SelectionProfile
from adaskip.runs import choose_by_speedup, loading, speedup
from adaskip.runs.speedup import PAIRS, Target
from tests.tiny_runs import NUM_SAMPLES, cell, error_of, records

UP_TO = 4


@pytest.fixture(scope="module")
def profiles(checkpoint, data_dir, tmp_path_factory):
    """A selection of each phase."""
    found = {}
    for phase in ("prefill", "decode", "e2e"):
        found[phase] = tmp_path_factory.mktemp("profiles") / f"{phase}.json"
        given = ("--checkpoint", checkpoint, "--data-dir", data_dir, "--output", found[phase], "--select", phase)
        given = (*given, "--output-dir", found[phase].parent / "runs")
        argv = [*given, "--model", "llama", "--device", "cpu", "--threads", "1", "--samples", "3", "--up-to", UP_TO]
        assert cli.main(["calibrate", *map(str, argv)]) == 0
    return found


@pytest.fixture
def command(options, profiles):
    """The command of a phase and a speedup, predicted for an L20."""

    def of(phase, asked, *more):
        chosen = ["--target-speedup", str(asked), "--speedup-on", "L20", "--profile", str(profiles[phase])]
        return ["run", *cell("calibrated", phase, ""), *options, *chosen, "--max-new-tokens", "6", *more]

    return of


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_the_run_skips_what_was_chosen_and_tells_asked_predicted_and_attained(
    command, profiles, tmp_path, capsys, phase
):
    assert cli.main(command(phase, 1.3)) == 0
    (path,) = (tmp_path / "runs").glob("*/*-sublayers/speedup-1.3-L20.json")
    target, attained = Target.load(path), Target.load(path).attained
    assert path.parent.name == f"{target.sublayers}-sublayers"
    assert target.predicted >= 1.3
    assert target.divergence == SelectionProfile.load(profiles[phase]).selected[target.sublayers].divergence
    assert json.loads((path.parent / "manifest.json").read_text())["finished"]
    assert all(request.new_tokens == 6 and request.count == NUM_SAMPLES for request in target.requests.values())
    assert attained is not None
    assert len(attained.full_s) == len(attained.skipped_s) == PAIRS
    assert min(*attained.full_s, *attained.skipped_s) > 0
    ratios = sorted(full / skipped for full, skipped in zip(attained.full_s, attained.skipped_s, strict=True))
    assert attained.speedup == pytest.approx((ratios[PAIRS // 2 - 1] + ratios[PAIRS // 2]) / 2)
    assert capsys.readouterr().out.splitlines()[-1] == target.line
    assert f"asked 1.30, predicted {target.predicted:.2f} on L20, attained {attained.speedup:.2f} [" in target.line


def test_a_continued_run_keeps_its_choice_and_is_measured_once(command, tmp_path, monkeypatch, capsys):
    argv = command("e2e", 1.3)
    assert cli.main(argv) == 0
    (path,) = (tmp_path / "runs").glob("*/*-sublayers/speedup-*.json")
    whole, content, line = records(path.parent), path.read_bytes(), capsys.readouterr().out.splitlines()[-1]
    (path.parent / "gov_report.jsonl").write_bytes(b"")
    monkeypatch.setattr(speedup, "choose_target", None)
    assert cli.main(argv) == 0
    assert records(path.parent) == whole
    assert path.read_bytes() == content
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_a_finished_and_measured_run_loads_no_model(command, monkeypatch, capsys):
    argv = command("decode", 1.3)
    assert cli.main(argv) == 0
    line = capsys.readouterr().out.splitlines()[-1]
    monkeypatch.setattr(loading, "_held", {})
    monkeypatch.setattr(loading, "load_source", None)
    assert cli.main(argv) == 0
    assert capsys.readouterr().out.splitlines()[-1] == line


def test_a_run_killed_before_it_was_measured_is_measured_when_it_is_continued(command, tmp_path, monkeypatch):
    argv = command("decode", 1.3)
    with monkeypatch.context() as patched:
        patched.setattr(speedup, "generate", _out_of_memory)
        assert cli.main(argv) == 1
    (path,) = (tmp_path / "runs").glob("*/*-sublayers/speedup-*.json")
    assert Target.load(path).attained is None
    monkeypatch.setattr(speedup, "choose_target", None)
    assert cli.main(argv) == 0
    assert Target.load(path).attained is not None


def _out_of_memory(*args, **options):
    raise RuntimeError("out of memory")


def test_the_records_are_those_of_the_budget_given_outright(command, options, profiles, tmp_path):
    assert cli.main(command("e2e", 1.3)) == 0
    (path,) = (tmp_path / "runs").glob("*/*-sublayers/speedup-*.json")
    chosen, count = records(path.parent), Target.load(path).sublayers
    shutil.rmtree(path.parent)
    argv = ["run", *cell("calibrated", "e2e", str(count)), *options, "--max-new-tokens", "6"]
    assert cli.main([*argv, "--profile", str(profiles["e2e"])]) == 0
    assert records(path.parent) == chosen


def test_without_a_named_device_the_present_one_is_measured(command, tmp_path, monkeypatch):
    asked = []

    def measured(device, dtype):
        asked.append((device.type, str(dtype)))
        return speedup.Ceilings("CPU", 1e11, 1e10, "measured")

    monkeypatch.setattr(choose_by_speedup, "measure_ceilings", measured)
    argv = command("prefill", 1.2)
    del argv[argv.index("--speedup-on") : argv.index("--speedup-on") + 2]
    assert cli.main(argv) == 0
    (path,) = (tmp_path / "runs").glob("*/*-sublayers/speedup-1.2.json")
    assert asked == [("cpu", "torch.float32")]
    assert Target.load(path).ceilings.name == "CPU"


def test_a_speedup_no_set_reaches_is_one_line_with_the_range_and_leaves_nothing(command, tmp_path, capsys):
    assert cli.main(command("e2e", 50)) == 2
    assert "--target-speedup 50 cannot be reached: the sets of this selection, of 1 to 4 sublayers" in error_of(capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (
            ("--strategy", "adaskip"),
            "strategies allowed with it: 'calibrated', 'cosine_window', 'blockpruner', 'evopress'; given: 'adaskip'",
        ),
        (("--target-speedup", "1"), "--target-speedup must be above 1; given: 1"),
        (("--target-speedup", "nan"), "--target-speedup must be above 1; given: nan"),
        (("--budget", "2"), "takes one budget: .* given: --budget 2, --target-speedup 1.3"),
        (("--speedup-on", "L2"), "unknown device 'L2'. Did you mean 'L20'"),
    ],
)
def test_what_cannot_be_asked_is_one_line(command, capsys, changed, message, tmp_path):
    assert cli.main(command("e2e", 1.3, *changed)) == 2
    line = error_of(capsys)
    assert all(part in line for part in message.split(" .* "))
    assert not (tmp_path / "runs").exists()


def test_a_device_without_a_speedup_is_refused(options, capsys):
    assert cli.main(["run", *cell("calibrated", "e2e"), *options, "--speedup-on", "L20"]) == 2
    assert "needs --target-speedup" in error_of(capsys)


def test_a_damaged_choice_is_one_line_that_says_what_to_do(command, tmp_path, capsys):
    assert cli.main(command("prefill", 1.3)) == 0
    (path,) = (tmp_path / "runs").glob("*/*-sublayers/speedup-*.json")
    path.write_text("{}")
    capsys.readouterr()
    assert cli.main(command("prefill", 1.3)) == 2
    assert "delete it to choose again" in error_of(capsys)
