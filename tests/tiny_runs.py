"""What the tests of runs share: a tiny checkpoint and tiny data, and readers of what runs leave."""

import json
import random
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adaskip.runs.folder import TIMES

ROOT = Path(__file__).resolve().parents[1]
WORDS = [f"w{number}" for number in range(60)]
NUM_SAMPLES = 5
NUM_CALIBRATION = 20
NUM_SHORT = 10


def make_checkpoint(path: Path) -> Path:
    """A random Llama of three layers whose answers differ from prompt to prompt, with a word-level tokenizer."""
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["<unk>", "<pad>", "<eos>", *WORDS])}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", pad_token="<pad>", eos_token="<eos>"
    ).save_pretrained(path)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS) + 3,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=32768,  # as long a prompt as any of the three models may have, and its answer
        initializer_range=0.5,
        pad_token_id=1,
        bos_token_id=None,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(path)
    return path


def make_data(path: Path) -> Path:
    """LongBench-E files; `length` says that the few words are more than 4000, or of the last ten records fewer."""
    rng = random.Random(0)
    for task in ("trec", "triviaqa", "multifieldqa_en", "gov_report", "multi_news", "qasper"):
        count = NUM_CALIBRATION if task == "qasper" else NUM_SAMPLES
        samples = [make_sample(task, f"{task}-{number}", 5000, rng) for number in range(count)]
        samples += [make_sample(task, f"{task}-short-{number}", 3000, rng) for number in range(NUM_SHORT)]
        write_samples(path / f"{task}_e.jsonl", samples)
    return path


def make_sample(task: str, name: str, length: int, rng: random.Random) -> dict:
    return {
        "input": "" if task in ("gov_report", "multi_news") else rng.choice(WORDS),
        "context": " ".join(rng.choices(WORDS, k=rng.randint(5, 30))),
        "answers": [rng.choice(WORDS)],
        "length": length,
        "dataset": f"{task}_e",
        "language": "en",
        "all_classes": WORDS[:4] if task == "trec" else None,
        "_id": name,
    }


def write_samples(path: Path, samples: list[dict]) -> None:
    path.write_text("".join(json.dumps(sample) + "\n" for sample in samples))


def cell(strategy="early_exit", phase="decode", budget="2", model="llama"):
    return ["--model", model, "--phase", phase, "--strategy", strategy] + (["--budget", budget] if budget else [])


def records(folder: Path) -> dict[str, list[dict]]:
    """Every task's records, merged or still in parts, by their samples' order, without their times."""
    found: dict[str, list[dict]] = {}
    for path in sorted([*folder.glob("*.jsonl"), *folder.glob("parts/*.jsonl")]):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        found.setdefault(path.name.split(".")[0], []).extend(rows)
    return {
        task: [
            {name: value for name, value in row.items() if name not in TIMES}
            for row in sorted(rows, key=lambda row: row["index"])
        ]
        for task, rows in found.items()
    }


def error_of(capsys) -> str:
    """The one line on standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]
