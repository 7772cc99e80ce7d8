"""Scores of the full testbed models: `python -m dev.testbed_training.evaluate --family llama`."""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from adaskip.benchmarks.longbench import TASKS
from adaskip.benchmarks.prompts import build_prompt_ids
from adaskip.benchmarks.scoring import score_sample
from adaskip.core.generate import generate
from adaskip.testbed import FAMILIES, checkpoint_dir, records
from adaskip.testbed.tasks import SUMMARIES
from dev.testbed_training.tokenizer import EOS_ID, PAD_ID

EVALUATED = ("multifieldqa_en", "triviaqa", "trec", "gov_report", "multi_news", "qasper")
MAX_SUMMARY_TOKENS = 128
MAX_ANSWER_TOKENS = 32


def predictions(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, task: str, samples: list[dict], batch_size: int = 10
) -> list[str]:
    """Greedy answers of the full model."""
    texts = []
    for start in range(0, len(samples), batch_size):
        asked = [TASKS[task].template.format(**sample) for sample in samples[start : start + batch_size]]
        limit = model.config.max_position_embeddings
        prompts = [torch.tensor(build_prompt_ids(text, tokenizer, limit)) for text in asked]
        answers = generate(
            model,
            None,
            prompts,
            max_new_tokens=MAX_SUMMARY_TOKENS if task in SUMMARIES else MAX_ANSWER_TOKENS,
            eos_token_ids=[EOS_ID],
            pad_token_id=PAD_ID,
        )
        texts += [tokenizer.decode(answer.token_ids, skip_special_tokens=True) for answer in answers]
    return texts


def evaluate(checkpoint: Path, limit: int, split: str = "test", tasks: tuple[str, ...] = EVALUATED) -> dict[str, float]:
    """Mean score x 100 of each task on the first `limit` records of a split, in float32."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    scores = {}
    for task in tqdm(tasks, desc=checkpoint.name, unit="task"):
        samples = records(task, split, limit)
        texts = predictions(model, tokenizer, task, samples)
        scores[task] = 100 * statistics.mean(
            score_sample(task, text, sample["answers"], sample["all_classes"])
            for text, sample in zip(texts, samples, strict=True)
        )
    return scores


def main(argv: list[str] | None = None) -> None:
    """Print the scores as a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, action="append", help="may be repeated; default: all three")
    parser.add_argument("--checkpoint", type=Path, help="evaluate this folder instead of the committed model")
    parser.add_argument("--limit", type=int, default=200, help="records per task")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    table = Table("model", *EVALUATED)
    for family in args.family or FAMILIES:
        scores = evaluate(args.checkpoint or checkpoint_dir(family), args.limit)
        table.add_row(family, *(f"{scores[task]:.2f}" for task in EVALUATED))
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
