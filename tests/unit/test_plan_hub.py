"""Plans and profiles are pushed to the Hub and pulled from it; here a local one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.fake_hub import COMMIT, FakeHub, fake_hub
from tests.profiles import profile_of
from tests.tiny_runs import ROOT

PUSH = """
from adaskip.core.plan import PlanOrigin, SkipPlan
origin = PlanOrigin("org/base", 4, 16, "prefill", "w", "c", "", "fixed", {"sublayers": 2})
plan = SkipPlan(frozenset({1}), frozenset({2}), {("ffn", 2): 0.75}, origin)
print(plan.push_to_hub("org/plan", private=True, token="t"))
assert SkipPlan.from_pretrained("org/plan") == plan
assert SkipPlan.from_pretrained("org/plan").origin == origin
"""
PUSH_AGAIN = """
from adaskip.core.plan import PlanOrigin, SkipPlan
origin = PlanOrigin("org/base", 4, 16, "prefill", "w", "c", "", "fixed", {"sublayers": 2})
plan = SkipPlan(frozenset({1}), origin=origin)
plan.push_to_hub("org/plan", token="t")
plan.push_to_hub("org/plan", token="t")
try:
    plan.push_to_hub("org/model", token="t")
except ValueError as error:
    print(error)
"""
PULL = """
from adaskip.profiles.importance import ImportanceProfile
print(ImportanceProfile.load("org/profile").num_layers)
"""
MISSING = """
from adaskip.core.plan import SkipPlan
for name in ("org/none", "org/profile"):
    try:
        SkipPlan.from_pretrained(name)
    except ValueError as error:
        print(error)
"""


@pytest.fixture
def run(tmp_path):
    """A program with the Hub's address, which the client reads when it is imported."""
    with fake_hub() as address:

        def run(code: str) -> list[str]:
            environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
            command = [sys.executable, "-c", code]
            ended = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
            assert ended.returncode == 0, ended.stderr
            return ended.stdout.splitlines()

        yield run


def test_a_pushed_plan_is_pulled_as_it_was(run):
    (url,) = run(PUSH)
    assert url.endswith(f"/org/plan/commit/{COMMIT}")
    assert sorted(FakeHub.repositories["org/plan"]) == ["README.md", "adaskip_plan.json"]


def test_a_model_card_of_somebody_else_on_the_hub_is_kept(run):
    FakeHub.repositories["org/model"] = {"README.md": b"# Mine"}
    (line,) = run(PUSH_AGAIN)
    assert line.startswith("README.md of org/model was not written by adaskip")
    assert FakeHub.repositories["org/model"] == {"README.md": b"# Mine"}


def test_a_profile_is_pulled_and_what_is_not_there_is_one_line(run, tmp_path):
    content = profile_of([0.5] * 4, [0.6] * 4).save(tmp_path / "p.json").read_bytes()
    FakeHub.repositories["org/profile"] = {"adaskip_profile.json": content}
    assert run(PULL + MISSING) == [
        "4",
        "'org/none' is neither a file or folder here nor usable from the Hub: no such repository",
        "'org/profile' is neither a file or folder here nor usable from the Hub: it has no adaskip_plan.json",
    ]
