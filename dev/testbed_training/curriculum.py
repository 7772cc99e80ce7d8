"""Training batches: texts of the recipe's phase, with labels on the answers only.

A batch is a function of (seed, step) alone, so training can be stopped anywhere and continued with the same data.
"""

from __future__ import annotations

import random
import re

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from adaskip.benchmarks.longbench import TASKS
from adaskip.testbed import lexicon as lex
from adaskip.testbed.tasks import SUMMARIES, Sample, draw
from dev.testbed_training.recipe import REPEAT, Phase, Recipe
from dev.testbed_training.tokenizer import EOS, PAD_ID

IGNORED = -100
MAX_MORE_QUESTIONS = 12
SOLVED_EXAMPLE = re.compile(r"(\w+)\?\n(?:Answer|Type):( [^\n]+)")
"""A question's last word, which is what it is about, and the answer after it."""
BARE_TEMPLATES = {
    "multifieldqa_en": "{context}\n\nQuestion: {input}\nAnswer:",
    "qasper": "Article: {context}\n\nQuestion: {input}\n\nAnswer:",
    "gov_report": "Report:\n{context}\n\nSummary:",
    "multi_news": "News:\n{context}\n\nSummary:",
    "trec": "{context}\n{input}",
    "triviaqa": "{context}\n\n{input}",
}

Piece = tuple[str, bool]
"""Some text, and whether it is to be learnt."""
Row = tuple[list[int], list[int]]
"""Token ids, and labels that are `IGNORED` where nothing is to be learnt."""


def segments(sample: Sample, bare: bool) -> list[Piece]:
    """The training text of a sample: its prompt, the response, and the further questions with theirs."""
    template = BARE_TEMPLATES[sample.task] if bare else TASKS[sample.task].template
    pieces = _prompt_pieces(template.format(context=sample.context, input=sample.input))
    start = "\n" if sample.task in SUMMARIES else " "
    pieces.append((f"{start}{sample.response or sample.answer}{EOS}", True))
    gap = "\n\n" if sample.task == "qasper" else "\n"
    for question, answer in sample.more[:MAX_MORE_QUESTIONS]:
        pieces += [(f"\nQuestion: {question}{gap}Answer:", False), (f" {answer}{EOS}", True)]
    return pieces


def _prompt_pieces(prompt: str) -> list[Piece]:
    """The prompt, cut so that the answers of solved examples are learnt where the text before them holds the answer."""
    pieces, start = [], 0
    for example in SOLVED_EXAMPLE.finditer(prompt):
        if re.search(rf" {example[1]}\b", prompt[: example.start()]):
            pieces += [(prompt[start : example.start(2)], False), (example[2], True)]
            start = example.end(2)
    return [*pieces, (prompt[start:], False)]


def encode(pieces: list[Piece], tokenizer: PreTrainedTokenizerFast) -> Row:
    """Token ids and labels of a text."""
    ids, labels = [], []
    for (_, learnt), piece in zip(pieces, tokenizer([text for text, _ in pieces])["input_ids"], strict=True):
        ids += piece
        labels += piece if learnt else [IGNORED] * len(piece)
    return ids, labels


def repeated(rng: random.Random, size: int, tokenizer: PreTrainedTokenizerFast) -> Row:
    """Random words, then the same words again from somewhere in their first quarter; the repetition is learnt."""
    words = rng.choices(lex.NAMES + lex.KINDS + lex.GOODS + lex.PLACES + lex.ACTIONS, k=max(8, size // 2))
    ids = tokenizer("".join(f" {word}" for word in words))["input_ids"]
    start = rng.randint(0, len(ids) // 4)
    return ids + ids[start:], [IGNORED] * (len(ids) + 1) + ids[start + 1 :]


def batch(recipe: Recipe, step: int, seed: int, tokenizer: PreTrainedTokenizerFast) -> tuple[Tensor, Tensor, list[str]]:
    """Input ids and labels `[B, S]` of one step, right-padded, and the task of each row."""
    rng, phase = random.Random(f"{seed} {step}"), recipe.phase_at(step)
    size = rng.randint(*phase.context_tokens)
    rows: list[Row] = []
    tasks: list[str] = []
    while True:
        task = rng.choices(list(phase.weights), list(phase.weights.values()))[0]
        rows.append(_row(task, phase, size, rng, tokenizer))
        tasks.append(task)
        if len(rows) > 1 and len(rows) * max(len(ids) for ids, _ in rows) > phase.tokens:
            break
    return *_padded(rows[:-1]), tasks[:-1]


def _row(task: str, phase: Phase, size: int, rng: random.Random, tokenizer: PreTrainedTokenizerFast) -> Row:
    if task == REPEAT:
        return repeated(rng, size, tokenizer)
    sample = draw(task, "train", size, rng)
    return encode(segments(sample, bare=rng.random() < phase.bare), tokenizer)


def _padded(rows: list[Row]) -> tuple[Tensor, Tensor]:
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.tensor([ids + [PAD_ID] * (longest - len(ids)) for ids, _ in rows])
    labels = torch.tensor([labels + [IGNORED] * (longest - len(labels)) for _, labels in rows])
    return ids, labels
