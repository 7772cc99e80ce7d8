"""`adaskip show SELECTION --prompt-tokens`: the Pareto sets of each length, and what is refused in one line."""

from __future__ import annotations

from dataclasses import replace

import pytest
from transformers import LlamaConfig

from adaskip.cli import main
from adaskip.core.plan import SkipPlan
from adaskip.profiles.selection import Selected, SelectionProfile
from adaskip.roofline import Ceilings, ModelShape, known_ceilings
from adaskip.runs import choose_by_speedup
from adaskip.runs.choose_by_speedup import Predictor, Request
from adaskip.runs.pareto import pareto_front
from tests.profiles import profile_of, selection_of

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    max_position_embeddings=8192,
    architectures=["LlamaForCausalLM"],
)
ONE, TWO, THREE = 1.1, 2.2, 3.3


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ({1: (0.1, ONE), 2: (0.2, TWO)}, {1, 2}),
        ({1: (0.1, TWO), 2: (0.2, ONE)}, {1}),  # worse in both
        ({1: (0.1, ONE), 2: (0.1, TWO)}, {2}),  # slower, as divergent
        ({1: (0.1, ONE), 2: (0.2, ONE)}, {1}),  # as fast, more divergent
        ({1: (0.1, ONE), 2: (0.1, ONE)}, {1, 2}),  # equal in both
        ({1: (0.1, 0.9), 2: (0.2, 1.0), 3: (0.3, ONE)}, {3}),  # not faster than the full model
        ({1: (0.3, THREE), 2: (0.2, ONE), 3: (0.1, TWO)}, {1, 3}),
        ({}, set()),
    ],
)
def test_on_the_front_is_what_nothing_is_at_least_as_good_as_in_both_and_better_in_one(points, front):
    assert pareto_front(points) == front


@pytest.fixture
def folder(tmp_path) -> str:
    """A model without weights."""
    CONFIG.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def saved(tmp_path, **changes) -> str:
    """Attentions take longer in the set of 1, and after long prompts also than the two FFNs in the set of 2."""
    sets = {1: ({1}, set()), 2: (set(), {0, 2}), 3: ({1}, {0, 2})}
    divergences = {1: 0.2, 2: 0.1, 3: 0.3}
    selected = {
        count: Selected(dict.fromkeys(attention, 1.1), dict.fromkeys(ffn, 1.1), divergences[count], "search")
        for count, (attention, ffn) in sets.items()
    }
    profile = replace(selection_of(4, "prefill"), **{"selected": selected, "hidden_size": 64, **changes})
    return str(profile.save(tmp_path / "selection.json"))


def shown(capsys, *argv: str) -> list[list[str]]:
    assert main(["show", *argv]) == 0
    return [line.split() for line in capsys.readouterr().out.splitlines()]


def test_each_length_has_a_front_of_its_own_by_the_roofline(folder, tmp_path, capsys):
    path = saved(tmp_path)
    asked = [path, "--prompt-tokens", "64", "8192", "--speedup-on", "L20", "--model", folder]
    told, heading, *rows = shown(capsys, *asked)
    assert heading == ["sublayers", "divergence", "64", "8192"]
    assert "L20" in told
    assert {row[0]: [cell.endswith("*") for cell in row[-2:]] for row in rows} == {
        "1": [False, True],
        "2": [True, True],
        "3": [True, True],
    }
    profile = SelectionProfile.load(path)
    for i, length in enumerate((64, 8192)):
        predictor = Predictor(ModelShape.of(CONFIG), "prefill", [Request(length, 1)], known_ceilings("L20"))
        assert [row[4 + i].rstrip("*") for row in rows] == [
            f"{predictor.speedup(chosen.plan):.3f}" for chosen in profile.selected.values()
        ]
    assert [row[0] for row in shown(capsys, *asked[:2], "64", *asked[4:])[2:]] == ["2", "3"]  # the others are left out


def test_the_length_of_the_answers_counts_in_decode_and_kept_kv_in_prefill(folder, tmp_path, capsys):
    for changes, options, request in (
        ({"phase": "decode"}, [], Request(100, 128)),
        ({"phase": "decode"}, ["--new-tokens", "7900"], Request(100, 7900)),
        ({"keep_kv": True}, [], Request(8000, 1)),
    ):
        path = saved(tmp_path, **changes)
        profile = SelectionProfile.load(path)
        predictor = Predictor(ModelShape.of(CONFIG), profile.phase, [request], known_ceilings("L20"))
        plan = replace(profile.selected[3].plan, keeps_kv=profile.keep_kv)
        asked = ["--prompt-tokens", str(request.prompt_tokens), "--speedup-on", "L20", "--model", folder]
        told, *_, row = shown(capsys, path, *asked, *options)
        assert row[-1] == f"{predictor.speedup(plan):.3f}*"
        assert (str(request.new_tokens) in told) == (profile.phase == "decode")


def test_sets_that_save_no_time_are_on_no_front(folder, tmp_path, capsys):
    """With kept K/V the prompt's last token runs by itself, which takes longer than skipping saves here."""
    argv = [saved(tmp_path, keep_kv=True), "--prompt-tokens", "64", "--speedup-on", "L20", "--model", folder]
    assert " ".join(shown(capsys, *argv)[1]) == "no set is predicted to be faster than the full model"


def test_without_a_named_device_this_one_is_measured_in_the_dtype_of_the_selection(
    folder, tmp_path, capsys, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        choose_by_speedup, "measure_ceilings", lambda *given: (asked.append(given), Ceilings("this one", 1e12, 1e11))[1]
    )
    path = saved(tmp_path, dtype="bfloat16", attn_implementation="eager")
    *_, row = shown(capsys, path, "--prompt-tokens", "512", "--model", folder)
    assert [str(dtype) for _, dtype in asked] == ["torch.bfloat16"]
    ceilings = Ceilings("this one", 1e12, 1e11)
    predictor = Predictor(ModelShape.of(CONFIG), "prefill", [Request(512, 1)], ceilings, attention="eager")
    assert row[-1] == f"{predictor.speedup(SkipPlan({1}, {0, 2})):.3f}*"


def test_a_published_selection_needs_neither_weights_nor_a_model(capsys, monkeypatch):
    monkeypatch.setattr("adaskip.models.source.find_folder", lambda *args, **options: pytest.fail("looked for weights"))
    monkeypatch.setattr("adaskip.models.source.ModelSource.is_local", False)
    lines = shown(capsys, "smollm2-selection-decode", "--prompt-tokens", "1024", "4096", "--speedup-on", "A100")
    assert [row[0] for row in lines[2:]] == [str(count) for count in range(1, 17)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt-tokens", "0"], "--prompt-tokens must be at least 1, not 0"),
        (["--prompt-tokens", "64", "64"], "--prompt-tokens names something twice"),
        (["--prompt-tokens", "64", "8193"], "--prompt-tokens 8193, with 1 new tokens, needs 8193 positions; the model"),
        (["--prompt-tokens", "64", "--new-tokens", "0"], "--new-tokens must be at least 1, not 0"),
        (["--prompt-tokens", "64", "--speedup-on", "L2"], "unknown device 'L2'. Did you mean 'L20'"),
        (["--speedup-on", "L20"], "--speedup-on needs --prompt-tokens"),
        (["--prompt-tokens", "64", "--new-tokens", "5"], "--new-tokens is for selections of phases decode and e2e"),
        (["--new-tokens", "5"], "--new-tokens needs --prompt-tokens"),
        (["--prompt-tokens", "64", "--plot", "x.png"], "without --plot"),
        (["--prompt-tokens", "64", "--model", "nothing-here"], "the shape of nothing-here is unknown"),
        (["--prompt-tokens", "64", "--model", "smollm2"], "with 4 layers of width 64, but smollm2 has 30 of 576"),
    ],
)
def test_what_cannot_be_shown_is_one_line(folder, tmp_path, capsys, options, message):
    model = [] if "--model" in options or "--prompt-tokens" not in options else ["--model", folder]
    assert main(["show", saved(tmp_path), *options, *model]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_other_files_have_no_pareto_sets(folder, tmp_path, capsys):
    profile_of([0.5], [0.5]).save(tmp_path / "importance.json")
    SkipPlan(ffn={1}).save(tmp_path / "plan.json")
    for name, message in (
        (str(tmp_path / "importance.json"), "is not a saved selection profile"),
        (str(tmp_path / "plan.json"), "is not a saved selection profile"),
        ("smollm2-8-of-60", "is not a saved selection profile"),
        ("missing", "missing does not exist"),
        (saved(tmp_path), "the shape of random is unknown"),  # what it names is no model here
    ):
        assert main(["show", name, "--prompt-tokens", "64", "--speedup-on", "L20"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert message in line
    assert main(["show", "--prompt-tokens", "64"]) == 2
    assert "is for one selection" in capsys.readouterr().err
