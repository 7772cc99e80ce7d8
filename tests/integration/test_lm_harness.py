"""Model type `adaskip` of lm-evaluation-harness on a local task: scores and answers are those of the plan."""

from __future__ import annotations

import json
import re
import sys
from functools import partialmethod
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adaskip import AdaSkip, Budget, FixedPlan, SkipPlan, calibrate, make_plan, skipping
from adaskip.cli import main
from adaskip.models.loading import load_model
from adaskip.models.rope import DynamicNTKRope
from tests.checkpoints import write_family
from tests.zeroed import zeroed

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402
from lm_eval.utils import simple_parse_args_string  # noqa: E402

from adaskip.benchmarks import lm_harness  # noqa: E402
from adaskip.benchmarks.lm_harness import AdaSkipLM  # noqa: E402

PLAN = SkipPlan(attention={1}, ffn={0})
QUESTIONS = [
    {"question": "The quick brown fox", "choices": [" jumps over", " who", " lazy dog."], "answer": " jumps over"},
    {"question": "Question: who?", "choices": [" Answer: she.", " the lazy dog", " no"], "answer": " Answer: she."},
    {"question": "The", "choices": [" quick brown fox jumps", " dog", " a"], "answer": " quick brown fox jumps"},
]
TASKS = {
    "choice": {
        "output_type": "multiple_choice",
        "doc_to_choice": "{{choices}}",
        "metric_list": [{"metric": "acc"}],
    },
    "words": {
        "output_type": "generate_until",
        "generation_kwargs": {"until": ["dog"], "max_gen_toks": 12, "do_sample": False},
        "metric_list": [{"metric": "exact_match"}],
    },
    "text": {"output_type": "loglikelihood_rolling", "metric_list": [{"metric": "word_perplexity"}]},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Checkpoint, plan and tasks of a random Llama of two layers."""
    folder = tmp_path_factory.mktemp("harness")
    checkpoint = write_family("llama", folder / "model")
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="float32").eval()
    strategy = FixedPlan(num_layers=2, plan=PLAN, phase="prefill")
    make_plan(model, strategy, base_model=str(checkpoint)).save_pretrained(folder / "plan")
    (folder / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    for name, task in TASKS.items():
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "questions.jsonl")}}}
        texts = {"doc_to_text": "{{question}}", "doc_to_target": "{{answer}}"}
        if name == "text":
            texts = {"doc_to_text": "", "doc_to_target": "{{question}}{{answer}}"}
        record = {"task": f"adaskip_{name}", "test_split": "test", **data, **texts, **task}
        (folder / f"{name}.yaml").write_text(json.dumps(record))  # JSON is YAML
    return folder


@pytest.fixture(scope="module", autouse=True)
def tasks_of_this_file_only():
    """Without lm_eval's own tasks, whose thousands of files take seconds to read."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(TaskManager, "__init__", partialmethod(TaskManager.__init__, include_defaults=False))
        yield


def evaluated(lm: HFLM, folder) -> dict[str, list]:
    """The answer to each request of every task, in the order of the questions."""
    manager = TaskManager(include_path=str(folder))
    names = [f"adaskip_{name}" for name in TASKS]
    found = lm_eval.simple_evaluate(lm, tasks=names, task_manager=manager, bootstrap_iters=0)
    samples = {name: found["samples"][f"adaskip_{name}"] for name in TASKS}
    return {name: [row["resps"] for row in sorted(rows, key=lambda r: r["doc_id"])] for name, rows in samples.items()}


@pytest.fixture(scope="module")
def model(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype="float32").eval()


@pytest.fixture(scope="module")
def expected(folder, model):
    """What model type hf answers of the model whose sublayers put out zero, and of the stock model."""
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    return SimpleNamespace(
        skipped=evaluated(HFLM(pretrained=zeroed(model, PLAN), tokenizer=tokenizer), folder),
        stock=evaluated(HFLM(pretrained=model, tokenizer=tokenizer), folder),
    )


def numbers(answers: dict[str, list]) -> torch.Tensor:
    """All log-likelihoods, in order."""
    choices = [response[0][0] for row in answers["choice"] for response in row]
    return torch.tensor([float(value) for value in (*choices, *(row[0][0] for row in answers["text"]))])


def test_scores_and_answers_are_those_of_zeroed_sublayers(folder, expected):
    for size in (1, 3):
        lm = AdaSkipLM(
            pretrained=str(folder / "model"), dtype="float32", plan=str(folder / "plan"), device="cpu", batch_size=size
        )
        found = evaluated(lm, folder)
        torch.testing.assert_close(numbers(found), numbers(expected.skipped))
        assert found["words"] == expected.skipped["words"]
    assert (numbers(expected.stock) - numbers(expected.skipped)).abs().min() > 1e-3
    assert expected.stock["words"] != expected.skipped["words"]


def test_the_command_line_hands_over_to_lm_eval(folder, expected, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [])
    monkeypatch.setattr("lm_eval.api.metrics.bootstrap_stderr", lambda *given, **options: 0.0)  # of 100,000 draws
    model_args = f"pretrained={folder / 'model'},dtype=float32,plan={folder / 'plan'}"
    options = ["--model", "adaskip", "--model_args", model_args, "--device", "cpu", "--include_path", str(folder)]
    output = ["--output_path", str(folder / "out"), "--log_samples"]
    assert main(["lm-eval", "run", *options, *output, "--tasks", "adaskip_text"]) == 0
    assert "|adaskip_text|" in capsys.readouterr().out
    (file,) = (folder / "out").rglob("samples_*.jsonl")
    found = [float(json.loads(line)["resps"][0][0]) for line in file.read_text().splitlines()]
    assert found == pytest.approx([float(row[0][0]) for row in expected.skipped["text"]], rel=1e-5)


def test_a_strategy_is_chosen_by_arguments(folder, model):
    profile = calibrate(model, [torch.arange(3, 20), torch.arange(9, 30)])
    profile.save(folder / "profile.json")
    given = {"strategy": "adaskip", "budget": 2, "phase": "e2e", "profile": str(folder / "profile.json")}
    lm = AdaSkipLM(pretrained=str(folder / "model"), dtype="float32", device="cpu", learning_window=3, **given)
    budget = Budget(sublayers=2)
    assert lm.strategy == AdaSkip(num_layers=2, budget=budget, phase="e2e", profile=profile, learning_window=3)


def test_log_likelihoods_in_phase_decode_are_the_full_models_and_warn(folder, expected, caplog):
    given = {"strategy": "early_exit", "budget": 2, "phase": "decode"}
    found = evaluated(AdaSkipLM(pretrained=str(folder / "model"), dtype="float32", device="cpu", **given), folder)
    torch.testing.assert_close(numbers(found), numbers(expected.stock))
    assert found["words"] != expected.stock["words"]
    assert "phase decode skips nothing while a prompt is read" in caplog.text


def test_log_likelihoods_of_a_strategy_that_skips_only_in_prompts_are_refused(folder):
    given = {"strategy": "pop", "budget": 2, "phase": "prefill"}
    lm = AdaSkipLM(pretrained=str(folder / "model"), dtype="float32", device="cpu", **given)
    for score in (lm.loglikelihood, lm.loglikelihood_rolling):
        with pytest.raises(ValueError, match="of which strategy pop runs only the last in the full model"):
            score([])


@pytest.mark.parametrize(("given", "expected"), [({}, (7, 4)), ({"max_decode_steps": 5}, (5, 5))])
def test_skipdecodes_last_step_is_the_end_of_the_answer_unless_it_is_given(folder, model, given, expected, monkeypatch):
    used = []

    def watched(model, strategy):
        used.append(strategy.max_decode_steps)
        return skipping(model, strategy)

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    lm = AdaSkipLM(pretrained=model, tokenizer=tokenizer, strategy="skipdecode", budget=2, phase="decode", **given)
    monkeypatch.setattr(lm_harness, "skipping", watched)
    tasks = [{"until": ["dog"], "max_gen_toks": 7}, {"until": ["dog"], "max_new_tokens": 4}]
    requests = [Instance("generate_until", {}, ("The quick", each), 0) for each in tasks]
    assert len(lm.generate_until(requests, disable_tqdm=True)) == 2
    assert sorted(used) == sorted(expected)


def test_internlm_is_loaded_as_runs_load_it(tmp_path, monkeypatch):
    path = write_family("internlm", tmp_path / "internlm")
    monkeypatch.setattr(lm_harness, "find_source", lambda name: SimpleNamespace(path=path))
    given = {"strategy": "early_exit", "budget": 2, "dtype": "float32", "device": "cpu", "batch_size": 2}
    lm = AdaSkipLM(pretrained="internlm", **given)
    loaded = load_model("internlm", path, device="cpu")
    assert (type(lm.model), type(lm.tokenizer)) == (type(loaded.model), type(loaded.tokenizer))
    assert isinstance(lm.model.model.rotary_emb, DynamicNTKRope)
    ids = torch.arange(3, 43)[None]
    assert torch.equal(lm.model(ids).logits, loaded.model(ids).logits)
    (answer,) = lm.generate_until([Instance("generate_until", {}, ("The quick", {"until": [], "max_gen_toks": 3}), 0)])
    assert isinstance(answer, str)


def test_an_argument_that_a_loaded_model_cannot_take_is_refused(model):
    with pytest.raises(ValueError, match="model type adaskip has no argument max_steps; allowed: those of model type"):
        AdaSkipLM(pretrained=model, strategy="early_exit", budget=2, max_steps=3)


@pytest.mark.parametrize("name", ["gguf_file", "subfolder", "revision"])
def test_a_named_model_says_where_its_weights_are(name):
    with pytest.raises(ValueError, match=f"pretrained=llama says by itself where its weights are: leave out {name}"):
        AdaSkipLM(pretrained="llama", strategy="early_exit", budget=2, **{name: "other"})


def test_a_model_that_was_passed_is_the_stock_model_between_requests(folder, model):
    lm = AdaSkipLM(
        pretrained=model, tokenizer=AutoTokenizer.from_pretrained(folder / "model"), plan=str(folder / "plan")
    )
    ids = torch.arange(3, 12)[None]
    before = model(ids).logits
    request = Instance("loglikelihood", {}, ("The quick", " brown fox"), 0)
    assert lm.loglikelihood([request], disable_tqdm=True)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ("", "model type adaskip needs plan=FOLDER or strategy=NAME,budget=SUBLAYERS"),
        ("strategy=full", "the full model is model type hf"),
        (
            "strategy=early_exit",
            "strategy early_exit needs budget=N, the number of sublayers to skip, at least 1; got None",
        ),
        ("strategy=early_exit,budget=half", "needs budget=N, the number of sublayers to skip, at least 1; got half"),
        ("strategy=early_exit,budget=4,phase=prefill", "4"),
        ("strategy=early_exit,budget=2,phase=never", "never"),
        ("strategy=early_exit,budget=2,profile=p.json", "strategy early_exit needs no profile; got p.json"),
        ("strategy=early_exit,budget=2,learning_window=3", "early_exit has no option learning_window"),
        ("strategy=early_exit,budget=2,max_decode_steps=64", "early_exit has no option max_decode_steps"),
        ("strategy=skipdecode,budget=2,max_decode_steps=few", "--model_args max_decode_steps must be int, not 'few'"),
        ("strategy=skipdecode,budget=2,max_decode_steps=0", "max_decode_steps must be at least 1; got 0"),
        ("strategy=early_exit,budget=2,max_steps=64", "model type adaskip has no argument max_steps"),
        ("strategy=adaskip,budget=2", "strategy adaskip needs profile=FILE (ImportanceProfile)"),
        ("strategy=adaskp,budget=2", "adaskp"),
        ("plan=PLAN,budget=2", "a plan says by itself what is skipped and when: leave out budget, or plan"),
        ("plan=no-such-plan", "no-such-plan"),
    ],
)
def test_arguments_that_do_not_fit_are_refused_in_one_line(args, message, folder):
    given = simple_parse_args_string(args.replace("PLAN", str(folder / "plan")))
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as refused:
        AdaSkipLM(pretrained=str(folder / "model"), device="cpu", **given)
    assert "\n" not in str(refused.value)


def test_a_refusal_ends_the_command_with_one_line(folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [])
    options = ["--model_args", f"pretrained={folder / 'model'}", "--include_path", str(folder)]
    assert main(["lm-eval", "--model", "adaskip", *options, "--tasks", "adaskip_text"]) == 2
    assert (
        capsys.readouterr().err.splitlines()[-1].startswith("error: model type adaskip needs plan=FOLDER or strategy")
    )


def test_without_lm_eval_the_command_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "adaskip.benchmarks.lm_harness")
    monkeypatch.delitem(sys.modules, "lm_eval.__main__", raising=False)
    assert main(["lm-eval", "ls", "tasks"]) == 2
    assert "pip install 'adaskip[lm-eval]'" in capsys.readouterr().err
