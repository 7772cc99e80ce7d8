"""Train one testbed model from scratch: `python -m dev.testbed_training.train --family llama`.

Killed at any moment and started again, the same command continues from its last checkpoint and ends with the same
weights.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from adaskip.common.files import write_text_atomic
from adaskip.common.paths import default_path
from adaskip.testbed import FAMILIES
from dev.testbed_training.recipe import RECIPE
from dev.testbed_training.tokenizer import build_tokenizer
from dev.testbed_training.trainer import Trainer

SAVE_EVERY_S = 120
LOG_EVERY = 20
TRAINING_LOG = "training.jsonl"
"""The log's name beside a finished model."""


def train(trainer: Trainer, work_dir: Path, steps: int, save_every_s: float = SAVE_EVERY_S) -> None:
    """Run up to step `steps`, with a JSONL log and, at a line of the log, a checkpoint every couple of minutes."""
    work_dir.mkdir(parents=True, exist_ok=True)
    checkpoint, log = work_dir / "checkpoint.pt", work_dir / "log.jsonl"
    if checkpoint.exists():
        trainer.load(checkpoint)
    lines = [line for line in read_log(log) if line["step"] <= trainer.step]
    saved, window = time.monotonic(), []
    with tqdm(total=steps, initial=trainer.step, unit="step", desc=trainer.family, mininterval=1) as bar:
        while trainer.step < steps:
            window.append(trainer.train_step())
            bar.update()
            if trainer.step % LOG_EVERY and trainer.step < steps:
                continue
            lines.append(trainer.position() | _means(window))
            write_text_atomic(log, "".join(json.dumps(line) + "\n" for line in lines))
            bar.set_postfix(loss=lines[-1]["loss"], refresh=False)
            window = []
            if time.monotonic() - saved > save_every_s or trainer.step == steps:
                trainer.save(checkpoint)
                saved = time.monotonic()


def read_log(path: Path) -> list[dict[str, float]]:
    """The lines of a training log; none if there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _means(window: list[dict[str, float]]) -> dict[str, float]:
    keys = sorted({key for line in window for key in line})
    return {key: round(statistics.mean(line[key] for line in window if key in line), 4) for key in keys}


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="dev.testbed_training.train", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=RECIPE.steps, help="stop after this step (default: %(default)s, all)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's choice)")
    parser.add_argument("--work-dir", type=Path, help="checkpoint and log (default: checkpoints/testbed/FAMILY)")
    parser.add_argument("--output-dir", type=Path, help="the finished model (default: WORK_DIR/model)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Train, or continue, and export."""
    args = _arguments(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    if not 1 <= args.steps <= RECIPE.steps:
        raise ValueError(f"--steps is {args.steps}, allowed is 1 to {RECIPE.steps}")
    work_dir = args.work_dir or default_path("checkpoints/testbed") / args.family
    trainer = Trainer(args.family, RECIPE, args.seed, torch.device(args.device), build_tokenizer())
    train(trainer, work_dir, args.steps)
    output_dir = args.output_dir or work_dir / "model"
    trainer.export(output_dir)
    write_text_atomic(output_dir / TRAINING_LOG, (work_dir / "log.jsonl").read_text())


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
