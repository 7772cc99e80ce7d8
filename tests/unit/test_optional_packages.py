"""The library works with its base dependencies alone; what else a command needs is told by one line."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from itertools import chain

import pytest

import adaskip
from adaskip.common.optional import EXTRAS, MissingPackageError, missing_package, optional_import
from adaskip.testbed import checkpoint_dir
from tests.tiny_runs import ROOT, make_checkpoint, make_data

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
OWN_EXTRAS = ("paper", "zh", "gguf")
"""Extras of the package; the others are for work on it."""
BEHIND = ("pyarrow", "nltk", "google", "contourpy")
"""Packages that the optional ones bring, hidden with them."""
HIDDEN = ",".join((*EXTRAS, *BEHIND))
LIBRARY = """
import sys, torch
from transformers import LlamaConfig, LlamaForCausalLM
from adaskip import AdaSkip, Budget, CalibratedSkip, SkipPlan, calibrate, lossless, select, skipping
torch.manual_seed(0)
shape = dict(vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=4, num_attention_heads=2)
model = LlamaForCausalLM(LlamaConfig(**shape, initializer_range=0.4)).eval()
prompts = [torch.randint(3, 40, (length,)) for length in (9, 8)]
profile = calibrate(model, prompts)
chosen = select(model, prompts, "decode", up_to=1, eos_token_ids=[2], pad_token_id=0, importance=profile)
call = dict(max_new_tokens=6, do_sample=False, pad_token_id=0)
strategy = AdaSkip(num_layers=4, budget=Budget(sublayers=2), phase="e2e", profile=profile)
full = model.generate(prompts[0][None], **call)
with skipping(model, strategy) as session:
    skipped = model.generate(prompts[0][None], **call)
assert torch.equal(model.generate(prompts[0][None], **call, custom_generate=lossless(model, strategy)), full)
loaded = {name.partition(".")[0] for name in sys.modules}
print("loaded:", *sorted(loaded & set(sys.argv[1].split(","))))

from adaskip import cli
try:
    cli.main(["--help"])
except SystemExit as stop:
    assert stop.code == 0
tiny, plan = sys.argv[2], sys.argv[2] + "-plan"
made = ["plan", "--model", tiny, "--strategy", "unified", "--budget", "2", "--phase", "prefill", "--output", plan]
for command in (made, ["show", plan], *(["export", plan, "--to", to, "--output", plan + to] for to in ("hf", "vllm"))):
    assert cli.main(command) == 0, command
sys.exit(cli.main(["run", "--model", "llama", "--phase", "prefill", "--strategy", "full", *sys.argv[3:]]))
"""


def hidden(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Python without every optional package."""
    return subprocess.run(
        [sys.executable, "tests/hidden.py", HIDDEN, *arguments], cwd=ROOT, capture_output=True, text=True, check=False
    )


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    """What one process without the optional packages did: use the library, show the help, make and export a plan, and
    start a run."""
    data = make_data(tmp_path_factory.mktemp("data"))
    given = [
        HIDDEN,
        str(make_checkpoint(tmp_path_factory.mktemp("models") / "tiny")),
        "--checkpoint",
        str(checkpoint_dir("llama")),
        "--data-dir",
        str(data),
    ]
    return hidden("-c", f"import sys; sys.argv[1:] = {given!r}\n{LIBRARY}")


def test_the_library_works_with_the_base_dependencies_alone(ended):
    assert ended.returncode == 2, ended.stderr  # that of the run, which fails
    assert ended.stdout.startswith("loaded:\n")


def test_the_commands_help_needs_the_base_dependencies_only(ended):
    assert "calibrate" in ended.stdout


def test_plans_are_made_shown_and_exported_with_the_base_dependencies_only(ended):
    assert "skipped        2 of " in ended.stdout
    assert ended.stdout.count("2 sublayers left out; in ") == 2


def test_a_run_without_an_optional_package_is_one_line(ended):
    assert ended.stderr.endswith(
        "error: this needs the package datasets, which is not installed: pip install 'adaskip[paper]'\n"
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("command", "package"),
    [
        ("eval/eval.py --testbed --model llama-EE-PREFILL", "rich"),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("-m adaskip bench --figure overhead_testbed", "matplotlib"),
                ("eval/tables.py --testbed", "rich"),
                ("observations/ob1.py --testbed", "matplotlib"),
                ("speed/roofline.py", "matplotlib"),
            )
        ),
    ],
)
def test_a_command_that_needs_a_missing_package_is_one_line(command, package):
    ended = hidden(*command.split())
    assert ended.returncode == 2
    assert (
        ended.stderr
        == f"error: this needs the package {package}, which is not installed: pip install 'adaskip[paper]'\n"
    )


@pytest.mark.parametrize("name", ["rouge", "rouge_standard", "rouge_zh"])
def test_a_score_that_needs_a_missing_package_is_no_zero(name, monkeypatch):
    from adaskip.benchmarks import metrics

    metrics._rouge_l.cache_clear()
    for package in ("rouge", "rouge_score", "rouge_score.rouge_scorer", "jieba"):
        monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match="which is not installed: pip install 'adaskip"):
        getattr(metrics, name)("a b c", "a b d", None)


def test_a_failed_import_that_no_extra_would_mend_stays_what_it_is():
    with pytest.raises(ModuleNotFoundError, match="nowhere_to_be_found"), optional_import():
        import nowhere_to_be_found  # noqa: F401  # pyright: ignore[reportMissingImports]
    assert missing_package(ImportError("cannot import name 'x' from 'rich'", name="rich")) is None


def distributions(*lists: list[str]) -> set[str]:
    return {re.split(r"[\[<>=]", each)[0].lower().replace("-", "_") for each in chain(*lists)}


def test_extras_bring_what_the_error_says():
    for package, extra in EXTRAS.items():
        assert package in distributions(PROJECT["optional-dependencies"][extra])


def test_every_package_that_the_code_imports_is_declared():
    """In the base, or in an extra that the error knows; bitsandbytes is there where a model is quantised by it, and
    llama_cpp is used where it happens to be."""
    own = {
        "adaskip",
        "torch",
        *distributions(PROJECT["dependencies"]) - {"pyyaml"},
        "yaml",
        "bitsandbytes",
        "llama_cpp",
        *EXTRAS,
    }
    imported = set()
    for path in (ROOT / "adaskip").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module:
                imported.add(node.module.partition(".")[0])
    assert imported - set(sys.stdlib_module_names) <= own


def test_the_pinned_set_holds_every_dependency():
    pinned = distributions((ROOT / "requirements.txt").read_text().split("\n"))
    paper = [each for extra in ("paper", "zh") for each in PROJECT["optional-dependencies"][extra]]
    assert distributions(PROJECT["dependencies"], paper) <= pinned


def test_one_place_says_the_version():
    assert PROJECT["dynamic"] == ["version"]
    assert f"\nversion: {adaskip.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"\n## {adaskip.__version__}\n" in (ROOT / "CHANGELOG.md").read_text()
