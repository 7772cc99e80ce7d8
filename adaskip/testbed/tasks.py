"""Generated counterparts of the paper's tasks, as records in LongBench's format.

Every task states random facts ("Alder sells copper ships to Oslo.") and asks for some of them, so the answer is only in
the context. The split of a fact is a hash of its words: no fact of the test set is in any training or calibration text,
for any seed.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from adaskip.testbed import lexicon as lex

SPLITS = ("train", "calibration", "test")
TEST_CONTEXT_TOKENS = (520, 600)
MAX_SECTIONS = 8

# Lengths in tokens, to fill a context to its size.
FACT_TOKENS = 7
FILLER_TOKENS = 8
PARAGRAPH_TOKENS = 70
SOLVED_PASSAGE_TOKENS = 49
TYPED_QUESTION_TOKENS = 15
SECTION_OVERHEAD_TOKENS = 15
MIN_SECTION_TOKENS = 26
TOKENS_PER_FACT = (10, 22)
"""Range of context tokens per fact of a document: random in training, else the maximum."""

MAX_FACTS = 30
SUMMARIES = ("gov_report", "multi_news")


def split_of(*words: str) -> str:
    """The only split that contains this combination of words: 3 of 5 train, 1 calibration, 1 test."""
    bucket = hashlib.sha256(" ".join(words).encode()).digest()[0] % 5
    return {0: "test", 1: "calibration"}.get(bucket, "train")


@dataclass(frozen=True)
class Fact:
    """One sentence of a context; a question about `name` asks for it."""

    name: str
    action: str
    kind: str
    goods: str
    place: str

    @property
    def sentence(self) -> str:
        return f"{self.name} {self.action} {self.kind} {self.goods} to {self.place}."

    @property
    def question(self) -> str:
        return f"What is said about {self.name}?"

    @property
    def answer(self) -> str:
        return self.sentence.removesuffix(".")


@dataclass(frozen=True)
class Sample:
    """A LongBench record, and further questions about its context for training."""

    task: str
    input: str
    context: str
    answer: str
    """The reference that a prediction is scored against."""
    response: str = ""
    """The response that a model is trained on, if it is longer than the answer."""
    more: tuple[tuple[str, str], ...] = ()

    def record(self) -> dict:
        """The sample as one line of a LongBench file."""
        text = f"{self.task}\n{self.input}\n{self.context}"
        return {
            "input": self.input,
            "context": self.context,
            "answers": [self.answer],
            "length": len(self.context.split()),
            "dataset": self.task,
            "language": "en",
            "all_classes": list(lex.CLASSES) if self.task == "trec" else None,
            "_id": hashlib.sha256(text.encode()).hexdigest()[:24],
        }


class Writer:
    """Draws facts and filler of one split; a context has no name, kind or goods twice."""

    def __init__(self, rng: random.Random, split: str):
        self.rng = rng
        self.split = split

    def facts(self, count: int) -> list[Fact]:
        """`count` facts of this split with distinct names, kinds and goods."""
        rng, found, goods = self.rng, [], list(lex.GOODS)
        names, kinds = rng.sample(lex.NAMES, count), rng.sample(lex.KINDS, len(lex.KINDS))
        actions, places = self.words(lex.ACTIONS, count), self.words(lex.PLACES, count)
        while len(found) < count:
            name, kind = names[len(found)], kinds.pop()
            allowed = [word for word in goods if split_of(name, kind, word) == self.split]
            if allowed:
                goods.remove(word := rng.choice(allowed))
                found.append(Fact(name, actions[len(found)], kind, word, places[len(found)]))
        return found

    def words(self, kind: tuple[str, ...], count: int) -> list[str]:
        """`count` words of a kind, with as few repeats as possible."""
        return self.rng.sample(kind * -(-count // len(kind)), count)

    def filler(self) -> str:
        """A sentence that states no fact."""
        pick = self.rng.choice
        return (
            f"{pick(lex.OPENERS)} the {pick(lex.GROUPS)} {pick(lex.FILLER_VERBS)} "
            f"the {pick(lex.FILLER_NOUNS)} {pick(lex.FILLER_ENDS)}."
        )

    def paragraph(self, facts: list[Fact], fillers: int) -> str:
        """A filler sentence, then the facts and the other fillers in random order."""
        rest = [fact.sentence for fact in facts] + [self.filler() for _ in range(max(0, fillers - 1))]
        self.rng.shuffle(rest)
        return " ".join([self.filler(), *rest])


def document_qa(writer: Writer, size: int, task: str) -> Sample:
    """Paragraphs of facts and filler; one fact is asked for, the others only in training."""
    paragraphs = max(1, size // PARAGRAPH_TOKENS)
    spacing = writer.rng.uniform(*TOKENS_PER_FACT) if writer.split == "train" else max(TOKENS_PER_FACT)
    count = max(2, min(MAX_FACTS, round(size / spacing)))
    facts = writer.facts(count)
    fillers = max(paragraphs, (size - FACT_TOKENS * count - paragraphs) // FILLER_TOKENS)
    shares = [facts[i::paragraphs] for i in range(paragraphs)]
    texts = [
        writer.paragraph(share, fillers // paragraphs + (i < fillers % paragraphs)) for i, share in enumerate(shares)
    ]
    asked = writer.rng.sample(facts, count)
    more = tuple((fact.question, fact.answer) for fact in asked[1:])
    return Sample(task, asked[0].question, "\n".join(texts), asked[0].answer, more=more)


def few_shot_qa(writer: Writer, size: int, task: str) -> Sample:
    """Solved examples (passage, question, answer), then a passage with its question."""
    shots = max(1, round(size / SOLVED_PASSAGE_TOKENS))
    facts = writer.facts(3 * (shots + 1))
    blocks, answer = [], ""
    for i in range(shots + 1):
        group = facts[3 * i : 3 * i + 3]
        asked = writer.rng.choice(group)
        passage = writer.paragraph(group, 1)
        blocks.append(f"Passage:\n{passage}\nQuestion:\n{asked.question}\nAnswer:")
        answer = asked.answer
        if i < shots:
            blocks[-1] += f" {answer}"
    return Sample(task, blocks[-1], "\n".join(blocks[:-1]), answer)


def few_shot_classification(writer: Writer, size: int, task: str) -> Sample:
    """Questions with their types; the type depends on the place in the question, by a random mapping of the context.

    As in few-shot prompts with reasoning, the answer first names the place: "Type: Oslo Food".
    """
    rng = writer.rng
    shots = max(3, round(size / TYPED_QUESTION_TOKENS))
    places = rng.sample(lex.PLACES, min(10, max(2, shots // 3)))
    types = {place: rng.choice(lex.CLASSES) for place in places}

    def question(place: str) -> str:
        while True:
            kind, goods = rng.choice(lex.KINDS), rng.choice(lex.GOODS)
            if split_of(kind, goods, place, types[place]) == writer.split:
                return f"Question: What are the {kind} {goods} from {place}?\nType:"

    order = [*places, *rng.choices(places, k=max(0, shots - len(places)))]
    rng.shuffle(order)
    lines = [f"{question(place)} {place} {types[place]}" for place in order]
    place = rng.choice(places)
    return Sample(task, question(place), "\n".join(lines), types[place], response=f"{place} {types[place]}")


def _sections(writer: Writer, size: int) -> tuple[list[Fact], list[list[str]]]:
    """Key facts, one per section, and the filler sentences of each section."""
    most = max(2, min(MAX_SECTIONS, size // MIN_SECTION_TOKENS))
    count = most if size >= 300 and writer.rng.random() < 0.5 else writer.rng.randint(max(2, most - 1), most)
    fillers = max(count, (size - SECTION_OVERHEAD_TOKENS * count) // FILLER_TOKENS)
    shares = [[writer.filler() for _ in range(fillers // count + (i < fillers % count))] for i in range(count)]
    return writer.facts(count), shares


def report_summary(writer: Writer, size: int, task: str) -> Sample:
    """A report whose sections each end in a finding; the summary is the findings in order."""
    facts, fillers = _sections(writer, size)
    findings = [f"Finding {i}: {fact.sentence}" for i, fact in enumerate(facts, 1)]
    sections = [
        f"Section {i}\n{' '.join(text)}\n{finding}"
        for i, (text, finding) in enumerate(zip(fillers, findings, strict=True), 1)
    ]
    return Sample(task, "", "\n".join(sections), "\n".join(findings))


def news_summary(writer: Writer, size: int, task: str) -> Sample:
    """News passages that each open with a headline; the summary is the headlines in order."""
    facts, fillers = _sections(writer, size)
    headlines = [f"Headline {i}: {fact.sentence}" for i, fact in enumerate(facts, 1)]
    passages = [
        f"Passage {i}:\n{headline}\n{' '.join(text)}"
        for i, (headline, text) in enumerate(zip(headlines, fillers, strict=True), 1)
    ]
    return Sample(task, "", "\n".join(passages), "\n".join(headlines))


GENERATORS: dict[str, Callable[[Writer, int, str], Sample]] = {
    "multifieldqa_en": document_qa,
    "triviaqa": few_shot_qa,
    "trec": few_shot_classification,
    "gov_report": report_summary,
    "multi_news": news_summary,
    "qasper": document_qa,
}


def draw(task: str, split: str, size: int, rng: random.Random) -> Sample:
    """One sample of about `size` context tokens."""
    return GENERATORS[task](Writer(rng, split), size, task)


def stream(task: str, split: str, seed: int) -> Iterator[Sample]:
    """Endless full-size samples of a task."""
    if task not in GENERATORS:
        raise ValueError(f"unknown testbed task {task!r}; one of {', '.join(GENERATORS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; one of {', '.join(SPLITS)}")
    rng = random.Random(f"{task} {split} {seed}")
    while True:
        yield draw(task, split, rng.randint(*TEST_CONTEXT_TOKENS), rng)
