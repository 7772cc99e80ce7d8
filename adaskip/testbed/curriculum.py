"""What the models are trained on, step by step: short contexts first, full LongBench prompts last.

A batch is a function of (seed, step) alone, so training can be stopped anywhere and continued with the same data.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast

from adaskip.longbench import TASKS
from adaskip.testbed import lexicon as lex
from adaskip.testbed.tasks import Sample, draw

IGNORED = -100
REPEAT = "repeat"
ASKED_BEFORE = re.compile(r"(\w+)\s?\?\n(?:Answer|Type):( [^\n]+)")


@dataclass(frozen=True)
class Phase:
    """A stretch of training with one range of context lengths and one mixture of tasks."""

    steps: int
    """Optimizer steps of this phase."""
    tokens: int
    """Tokens per step, padding included."""
    context_tokens: tuple[int, int]
    """Range from which each batch draws its context length."""
    bare: float
    """Share of QA and summary samples without the template's instructions."""
    lr: float
    """Learning rate, relative to the recipe's."""
    weights: dict[str, float]
    """Task mixture; `repeat` is a random word sequence given twice."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides how a model is trained, except family and seed."""

    phases: tuple[Phase, ...]
    muon_lr: float = 0.01
    """Peak learning rate of the hidden matrices."""
    adamw_lr: float = 3e-3
    """Peak learning rate of embeddings, norms and biases."""
    query_key_std: float = 0.08
    """Initial standard deviation of the query and key projections, which start equal."""
    warmup: int = 50
    """Steps of linear warm-up."""
    decay: float = 0.3
    """Last share of the steps, over which the learning rate falls linearly to 2 % of its peak."""

    @property
    def steps(self) -> int:
        return sum(phase.steps for phase in self.phases)

    def phase_at(self, step: int) -> Phase:
        """The phase that step `step` (from 0) belongs to."""
        for phase in self.phases:
            if step < phase.steps:
                return phase
            step -= phase.steps
        raise ValueError(f"the recipe ends before step {step}")

    def lr_scale(self, step: int) -> float:
        """Learning rate at a step, relative to its peak."""
        left = (self.steps - step) / (self.decay * self.steps)
        return self.phase_at(step).lr * min(1.0, (step + 1) / self.warmup, max(0.02, left))


def answer_text(sample_task: str, answer: str) -> str:
    """The answer as it follows the prompt: summaries start on a line of their own."""
    return f"\n{answer}" if sample_task in ("gov_report", "multi_news") else f" {answer}"


BARE = {
    "multifieldqa_en": "{context}\n\nQuestion: {input}\nAnswer:",
    "qasper": "Article: {context}\n\nQuestion: {input}\n\nAnswer:",
    "gov_report": "Report:\n{context}\n\nSummary:",
    "multi_news": "News:\n{context}\n\nSummary:",
    "trec": "{context}\n{input}",
    "triviaqa": "{context}\n\n{input}",
}


def segments(sample: Sample, bare: bool, max_more: int = 12) -> list[tuple[str, bool]]:
    """The training text in pieces, with whether the piece is to be learnt; `<eos>` ends every final answer."""
    template = BARE[sample.task] if bare else TASKS[sample.task].template
    prompt = template.format(context=sample.context, input=sample.input)
    pieces, start = [], 0
    for match in ASKED_BEFORE.finditer(prompt):
        if re.search(rf" {match[1]}\b", prompt[: match.start()]):
            pieces += [(prompt[start : match.start(2)], False), (match[2], True)]
            start = match.end(2)
    pieces += [(prompt[start:], False), (answer_text(sample.task, sample.response or sample.answer) + "<eos>", True)]
    gap = "\n\nAnswer:" if sample.task == "qasper" else "\nAnswer:"
    for question, answer in sample.more[:max_more]:
        pieces += [(f"\nQuestion: {question}{gap}", False), (f" {answer}<eos>", True)]
    return pieces


def encode(pieces: list[tuple[str, bool]], tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Token ids and labels (`IGNORED` where nothing is to be learnt)."""
    ids, labels = [], []
    for (_, learnt), piece in zip(pieces, tokenizer([text for text, _ in pieces])["input_ids"], strict=True):
        ids += piece
        labels += piece if learnt else [IGNORED] * len(piece)
    return ids, labels


def repeated(rng: random.Random, size: int, tokenizer: PreTrainedTokenizerFast) -> tuple[list[int], list[int]]:
    """Random words, then the same words again: the second half is to be learnt."""
    words = rng.choices(lex.NAMES + lex.KINDS + lex.GOODS + lex.PLACES + lex.ACTIONS, k=max(8, size // 2))
    half = tokenizer("".join(f" {word}" for word in words))["input_ids"]
    start = rng.randint(0, len(half) // 4)
    return half + half[start:], [IGNORED] * (len(half) + 1) + half[start + 1 :]


def batch(recipe: Recipe, step: int, seed: int, tokenizer: PreTrainedTokenizerFast):
    """Input ids and labels `[B, S]` of one step, right-padded, and the task of each row."""
    rng, phase = random.Random(f"{seed} {step}"), recipe.phase_at(step)
    size = rng.randint(*phase.context_tokens)
    rows, tasks, longest = [], [], 0
    names, weights = list(phase.weights), list(phase.weights.values())
    while True:
        task = rng.choices(names, weights)[0]
        if task == REPEAT:
            row = repeated(rng, size, tokenizer)
        else:
            row = encode(segments(draw(task, "train", size, rng), rng.random() < phase.bare), tokenizer)
        longest = max(longest, len(row[0]))
        if rows and longest * (len(rows) + 1) > phase.tokens:
            break
        rows.append(row)
        tasks.append(task)
    longest = max(len(ids) for ids, _ in rows)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), IGNORED)
    for i, (row_ids, row_labels) in enumerate(rows):
        ids[i, : len(row_ids)] = torch.tensor(row_ids)
        labels[i, : len(row_labels)] = torch.tensor(row_labels)
    return ids, labels, tasks


QUESTIONS = {"multifieldqa_en": 3.0, "triviaqa": 2.0, "trec": 2.0}
SUMMARIES = {"gov_report": 1.0, "multi_news": 1.0}
FULL = {**QUESTIONS, **SUMMARIES, "qasper": 0.3}
RECIPE = Recipe(
    phases=(
        Phase(steps=300, tokens=1024, context_tokens=(16, 40), bare=1.0, lr=1.0, weights={REPEAT: 1.0}),
        Phase(steps=300, tokens=2048, context_tokens=(20, 80), bare=0.9, lr=0.5, weights={**FULL, REPEAT: 0.5}),
        Phase(steps=500, tokens=2048, context_tokens=(60, 250), bare=0.7, lr=0.5, weights=FULL),
        Phase(steps=500, tokens=3072, context_tokens=(250, 640), bare=0.3, lr=0.5, weights=FULL),
        Phase(steps=400, tokens=4096, context_tokens=(480, 640), bare=0.0, lr=0.5, weights=FULL),
    )
)
