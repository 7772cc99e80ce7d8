"""Lossless mode against the full model, side by side: differing tokens, acceptance, speedup, and where it breaks even.

    python speed/lossless.py [--model all] [--prompts 51] [--threads 1] [--output speed/results/cpu]

Each prompt is answered greedily by stock `generate` and with every draft, in turns, the first one changing from prompt
to prompt, so that a drifting machine hits all alike. One JSON file a model, written after every prompt: a stopped run
continues, a finished one says so. `lossless.md` is rendered from whatever files there are.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.benchmark import timer
from transformers import StoppingCriteria, StoppingCriteriaList

from adaskip import testbed
from adaskip.blocks import decoder_layers
from adaskip.calibration import calibrate
from adaskip.files import write_text_atomic
from adaskip.longbench import build_prompt_ids, get_task
from adaskip.models import LoadedModel, load_model
from adaskip.plan import Budget
from adaskip.results.intervals import ratio_estimate
from adaskip.results.markdown import pipe_table
from adaskip.runs.manifest import describe_model
from adaskip.speculative import LosslessDecoder, lossless
from adaskip.speculative.draft_length import break_even_acceptance, expected_speedup
from adaskip.speculative.statistics import DraftStatistics
from adaskip.strategies import Strategy, build

ROOT = Path(__file__).resolve().parents[1]
STORIES = Path(os.environ.get("ADASKIP_REAL", ROOT.parent / "shared" / "real")) / "stories260K"
MODELS = (*testbed.FAMILIES, "stories260K")
CALIBRATION_PROMPTS = 8
STORY_TOKENS = (20, 60)  # lengths of the beginnings of stories that are the prompts of stories260K


@dataclass(frozen=True)
class Draft:
    """A way to draft. share: of all sublayers, skipped. gamma: draft length, None for the adaptive one."""

    strategy: str
    share: float
    gamma: int | None

    def __str__(self) -> str:
        return f"{self.strategy} {self.share:.1%} {'adaptive' if self.gamma is None else f'gamma {self.gamma}'}"


DRAFTS = (
    Draft("adaskip", 0.125, 4),
    Draft("adaskip", 0.25, 4),
    Draft("adaskip", 0.25, None),
    Draft("early_exit", 0.25, 4),
    Draft("unified", 0.25, 4),
)


class FirstToken(StoppingCriteria):
    """Stops nothing; notes when the first token is there."""

    def __init__(self) -> None:
        self.time_s: float | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:  # pyright: ignore
        if self.time_s is None:
            self.time_s = timer()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def load(name: str) -> LoadedModel:
    """A testbed model, or stories260K."""
    if name in testbed.FAMILIES:
        return load_model(name, checkpoint=testbed.checkpoint_dir(name), chat="none")
    return load_model(None, checkpoint=STORIES)


def prompts_of(name: str, loaded: LoadedModel, split: str, count: int) -> Iterator[tuple[Tensor, int]]:
    """Token ids of prompts, and the limits of their answers: all tasks of the testbed, or beginnings of stories."""
    if name in testbed.FAMILIES:
        per_task = -(-count // len(testbed.TASKS))
        records = {task: testbed.records(task, split, per_task) for task in testbed.TASKS}
        for i in range(count):
            task = testbed.TASKS[i % len(testbed.TASKS)]
            ids = build_prompt_ids(
                records[task][i // len(testbed.TASKS)], get_task(task), loaded.tokenizer, loaded.spec.max_prompt_tokens
            )
            yield torch.tensor(ids, device=loaded.model.device), 64
    else:
        torch.manual_seed(testbed.SPLITS.index(split))
        start = torch.tensor([[loaded.tokenizer.bos_token_id]], device=loaded.model.device)
        shortest, longest = STORY_TOKENS
        for i in range(count):
            length = shortest + i % (longest - shortest + 1)
            story: Any = generate(loaded, start[0], length, do_sample=True, min_new_tokens=length)
            yield story[0], 64


def generate(loaded: LoadedModel, prompt: Tensor, max_new_tokens: int, **options: Any) -> Tensor:
    stock: Any = loaded.model.generate
    options = {"do_sample": False, "max_new_tokens": max_new_tokens, **options}
    return stock(prompt[None], attention_mask=torch.ones_like(prompt[None]), **options)


def strategies_for(name: str, loaded: LoadedModel) -> dict[Draft, Strategy]:
    """The drafts as strategies of this model, AdaSkip's calibrated on prompts of another split."""
    depth = len(decoder_layers(loaded.model))
    prompts = [ids for ids, _ in prompts_of(name, loaded, "calibration", CALIBRATION_PROMPTS)]
    profile = calibrate(loaded.model, prompts)
    made = {}
    for draft in DRAFTS:
        whole = 2 if draft.strategy in ("early_exit", "unified") else 1
        budget = Budget(sublayers=whole * round(2 * depth * draft.share / whole))
        strategy = build(draft.strategy, phase="decode", budget=budget, num_layers=depth, profile=profile)
        assert strategy is not None
        made[draft] = strategy
    return made


def answer(loaded: LoadedModel, prompt: Tensor, limit: int, decoder: LosslessDecoder | None) -> dict[str, Any]:
    """One greedy answer: its tokens, the seconds after the first one, and what drafting took."""
    first = FirstToken()
    options = {} if decoder is None else {"custom_generate": decoder}
    output = generate(loaded, prompt, limit, stopping_criteria=StoppingCriteriaList([first]), **options)
    end_s = timer()
    assert first.time_s is not None
    record = {"tokens": output[0, len(prompt) :].tolist(), "decode_s": end_s - first.time_s}
    return record if decoder is None else {**record, **asdict(decoder.last_request)}


def run(name: str, count: int, path: Path) -> None:
    """Answer `count` prompts, going on with those that the file has already."""
    loaded = load(name)
    settings = {"model": name, "prompts": count, "drafts": [str(draft) for draft in DRAFTS], **describe_model(loaded)}
    settings["checkpoint"] = Path(loaded.spec.checkpoint).name  # the folder, wherever it lies
    saved = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    same = ("model", "prompts", "drafts", "weights_fingerprint", "device_name", "threads", "versions")
    if saved is not None and any(saved["manifest"][key] != settings[key] for key in same):
        raise ValueError(f"{path} is of another run; move it away or give another --output")
    records: list[dict[str, Any]] = [] if saved is None else saved["records"]
    if len(records) == count:
        print(f"{path} is finished")
        return
    strategies = strategies_for(name, loaded)
    decoders: dict[str, LosslessDecoder | None] = {"full": None}
    decoders |= {str(d): lossless(loaded.model, strategy, gamma=d.gamma) for d, strategy in strategies.items()}
    plans = {str(d): strategy.skipped.to_dict() for d, strategy in strategies.items()}
    prompts = list(prompts_of(name, loaded, "test", count))
    for decoder in decoders.values():  # warm up
        answer(loaded, *prompts[0], decoder)
    for i in range(len(records), count):
        names = list(decoders)
        turn = names[i % len(names) :] + names[: i % len(names)]
        answers = {way: answer(loaded, *prompts[i], decoders[way]) for way in turn}
        records.append({"prompt_tokens": len(prompts[i][0]), "answers": {way: answers[way] for way in names}})
        whole = {"manifest": settings | {"plans": plans}, "records": records}
        write_text_atomic(path, json.dumps(whole) + "\n")


def rows(path: Path) -> Iterator[list[str]]:
    """One line of the table per draft of a saved file."""
    saved = json.loads(path.read_text(encoding="utf-8"))
    answers = [record["answers"] for record in saved["records"]]
    full_s = [each["full"]["decode_s"] for each in answers]
    steps = sum(len(each["full"]["tokens"]) - 1 for each in answers)
    step_s = sum(full_s) / steps
    for draft in saved["manifest"]["drafts"]:
        mine = [each[draft] for each in answers]
        seen = DraftStatistics()
        for each in mine:
            seen += DraftStatistics(**{field.name: each[field.name] for field in fields(DraftStatistics)})
        differing = sum(each[draft]["tokens"] != each["full"]["tokens"] for each in answers)
        plan = saved["manifest"]["plans"][draft]
        speedup = ratio_estimate(full_s, [each["decode_s"] for each in mine])
        assert speedup is not None
        yield [
            saved["manifest"]["model"],
            draft,
            f"{len(plan['attention'])} + {len(plan['ffn'])}",
            str(len(mine)),
            str(differing),
            *_costs(seen, step_s),
            f"{speedup.value:.3f} [{speedup.low:.3f}, {speedup.high:.3f}]",
        ]


def _costs(seen: DraftStatistics, step_s: float) -> list[str]:
    """Acceptance, tokens per verification, cost of a drafted token, break-even acceptance, expected speedup."""
    if not seen.draft_forwards or seen.acceptance_rate is None or seen.tokens_per_verify is None:
        return ["n/a"] * 5
    drafted = seen.draft_forwards / seen.verify_forwards
    cost = (seen.draft_s + seen.verify_s - seen.verify_forwards * step_s) / seen.draft_forwards / step_s
    length = max(1, round(drafted))
    even = break_even_acceptance(cost, length)
    return [
        f"{seen.acceptance_rate:.3f}",
        f"{seen.tokens_per_verify:.2f}",
        f"{cost:.3f}",
        "none" if even is None else f"{even:.3f}",
        f"{expected_speedup(seen.acceptance_rate, length, cost):.3f}",
    ]


HEADER = ("model", "draft", "attention + FFN skipped", "answers", "differing", "acceptance a",
          "tokens per verification", "cost c of a drafted token", "break-even a", "speedup expected from a and c",
          "speedup measured")  # fmt: skip
NOTES = """# Lossless mode against the full model

Greedy answers, decode time after the first token, full model / lossless, ratio of means with a 95 % bootstrap interval
over prompts. c: what drafting and verifying a token takes beyond one decode step of the full model a round, in such
steps, host time included. A round of g drafted tokens yields (1 - a^(g+1)) / (1 - a) tokens in the time of 1 + g c
steps; below break-even it is slower than the full model.
"""


def render(folder: Path) -> str:
    """The table of all saved files as Markdown."""
    files = [path for name in MODELS if (path := folder / f"lossless-{name}.json").is_file()]
    lines = [line for path in files for line in rows(path)]
    compared, differing = (sum(int(line[i]) for line in lines) for i in (3, 4))
    total = f"{compared} answers compared with stock `generate`, {differing} differing."
    return "\n\n".join([NOTES.strip(), total, pipe_table(list(HEADER), lines)]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description="Lossless mode against the full model, side by side.")
    parser.add_argument("--model", default="all", choices=["all", *MODELS])
    parser.add_argument("--prompts", type=int, default=51, help="per model; each is answered with every draft")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default=str(ROOT / "speed" / "results" / "cpu"), help="folder")
    arguments = parser.parse_args()
    if arguments.prompts < 2:
        parser.error(f"--prompts must be at least 2; got {arguments.prompts}")
    torch.set_num_threads(arguments.threads)
    folder = Path(arguments.output)
    for name in MODELS if arguments.model == "all" else (arguments.model,):
        if name == "stories260K" and not STORIES.is_dir():
            print(f"{name} is not at hand and left out; ADASKIP_REAL names its parent folder")
            continue
        try:
            run(name, arguments.prompts, folder / f"lossless-{name}.json")
        except ValueError as error:
            parser.error(str(error))
    text = render(folder)
    write_text_atomic(folder / "lossless.md", text)
    print(text)


if __name__ == "__main__":
    main()
