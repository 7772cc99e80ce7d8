"""eval/peer_divergence.py: what is said of saved divergences and costs."""

from __future__ import annotations

import pytest

from adaskip.studies.ablation.peers import PeersConfig, _prompts, read_selections
from adaskip.studies.ablation.peers_findings import find
from tests.profiles import selection_of

COST = {
    **{"num_forwards": 2000, "num_tokens": 50_000, "seconds": 30.0},
    **{"adaskip_forwards": 10, "adaskip_tokens": 5000, "adaskip_seconds": 2.0},
}


def saved(**others: list[float | None]) -> dict:
    """One cell with four prompts, on which calibrated diverges by 1, 2, 3 and 4."""
    rows = {"calibrated": [1.0, 2.0, 3.0, 4.0], **others}
    about = {"phase": "decode", "sublayers": 8, "plan": {}}
    costs = [
        {"row": "calibrated", "phase": "decode", "sets": list(range(1, 17)), "calibrated": True, "cost": COST},
        {"row": "adaskip", "phase": None, "sets": [], "calibrated": True, "cost": None},
        {"row": "unified", "phase": None, "sets": [], "calibrated": False, "cost": None},
        {"row": "cosine_window", "phase": "decode", "sets": [2, 4, 6, 8], "calibrated": True, "cost": COST},
        {"row": "evopress", "phase": "decode", "sets": [8, 12, 16], "calibrated": True, "cost": COST},
    ]
    return {
        "tiny": {
            "sources": {},
            "prompts": {"decode": {"count": 4, "fingerprint": ""}},
            "costs": costs,
            "cells": [{**about, "row": name, "divergences": values} for name, values in rows.items()],
        }
    }


def test_each_cell_is_one_sentence_of_what_is_below_and_above_beyond_chance():
    others = {
        "adaskip": [1.5, 2.5, 3.4, 4.6],
        "unified": [None, 9.0, 9.0, 9.0],
        "evopress": [0.9, 2.2, 2.8, 4.1],
        "older": [0.5, 1.5, 2.5, 3.4],
    }
    found, _ = find(saved(**others))
    assert (
        "tiny, decode, 8 sublayers: Calibrated is below AdaSkip, Unified Skipping beyond chance; within chance of "
        "EvoPress; **above** older beyond chance." in found.as_markdown()
    )
    (row,) = found.table.to_dict("records")
    assert row["Calibrated"] == "2.5000"
    assert row["AdaSkip"].startswith("3.0000 (+0.5000 [+0.4")
    assert row["Unified Skipping"] == "overflow"
    assert row["older"].startswith("**1.9750**")
    assert list(row)[:4] == ["Model", "Phase", "Skipped", "Calibrated"]
    holding = {claim.text.split(" diverges")[0]: claim.holding for claim in found.claims}
    assert holding == {"AdaSkip": 1, "Unified Skipping": 1, "EvoPress": 0, "older": 0}
    assert "NaN" not in found.as_json()


def test_a_strategy_that_stays_finite_is_less_divergent_than_a_calibrated_set_that_overflows():
    results = saved(adaskip=[9.0, 9.0, 9.0, 9.0])
    results["tiny"]["cells"][0]["divergences"] = [None, 1.0, 1.0, 1.0]
    found, _ = find(results)
    assert "Calibrated is **above** AdaSkip beyond chance." in found.as_markdown()


def test_costs_are_multiples_of_adaskips_calibration():
    _, found = find(saved())
    shown = {row["Strategy"]: row for row in found.table.to_dict("records")}
    assert [shown["Calibrated"][unit] for unit in ("Forwards", "Tokens", "Seconds")] == ["200.0", "10.0", "15.0"]
    assert shown["Calibrated"]["Sets"] == "1 to 16"
    assert (shown["Cosine Window"]["Sets"], shown["EvoPress"]["Sets"]) == ("2 to 8, every 2", "8, 12, 16")
    assert [shown[name]["Seconds"] for name in ("AdaSkip", "Unified Skipping")] == ["1.0", "0.0"]


def test_calibrated_is_always_compared():
    with pytest.raises(ValueError, match="every strategy is compared with calibrated; given: adaskip evopress"):
        PeersConfig(testbed=True, strategies=("adaskip", "evopress"))


def test_records_that_a_search_has_seen_are_left_out():
    config = PeersConfig(testbed=True, models=("llama",), limit=4, device="cpu")
    job = config.job("llama", "decode", "calibrated", None)
    loaded, tasks = job.loading.load(), list(job.answer_caps)
    scored = {task: job.records.scored(task) for task in tasks}
    every = _prompts(config, "llama", "decode", loaded, set())
    seen = {scored[tasks[0]][0]["_id"]}
    fresh = _prompts(config, "llama", "decode", loaded, seen)
    assert len(every) == len(fresh) == config.limit
    assert [prompt.tolist() for prompt in fresh[1:4:2]] == [
        prompt.tolist() for prompt in every[1:4:2]
    ]  # the other task
    assert fresh[0].tolist() == every[2].tolist() != every[0].tolist()
    with pytest.raises(ValueError, match="phase decode has 0 records that no search has seen"):
        _prompts(config, "llama", "decode", loaded, {each["_id"] for samples in scored.values() for each in samples})


def test_a_selection_file_is_a_row_of_its_name_or_that_of_its_strategy(tmp_path):
    path, other = (selection_of(16, phase, "evopress").save(tmp_path / phase) for phase in ("decode", "e2e"))
    given = {"testbed": True, "models": ("llama",)}
    found = read_selections(PeersConfig(**given, selections=(str(path), str(other), f"a={path}", f"a={other}")))
    rows = [(name, phase) for name in ("evopress", "a") for phase in ("decode", "e2e")]
    assert [(name, each.phase) for name, each in found] == rows
    for selections, message in (
        ((f"adaskip={path}",), "the row adaskip is taken"),
        ((f"a={path}x",), "does not exist"),
        ((f"a={path}", f"a={tmp_path}/./decode"), "the row a is taken"),
        ((str(path), f"{tmp_path}/./decode"), "the row evopress is taken"),
    ):
        with pytest.raises(ValueError, match=message):
            read_selections(PeersConfig(**given, selections=selections))


def test_kept_kv_is_compared_in_phase_prefill_alone():
    with pytest.raises(ValueError, match="--keep-kv needs --phases prefill; given: prefill decode e2e"):
        PeersConfig(testbed=True, keep_kv=True)
