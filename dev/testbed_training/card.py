"""The model card of a trained testbed model: `python -m dev.testbed_training.card --family llama` scores it.

README.md says how the model was made and what it scores; curve.svg shows how it learnt.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import transformers

from adaskip.common.files import write_text_atomic
from adaskip.testbed import FAMILIES, checkpoint_dir
from dev.testbed_training.curriculum import MAX_MORE_QUESTIONS
from dev.testbed_training.evaluate import EVALUATED, evaluate
from dev.testbed_training.recipe import RECIPE
from dev.testbed_training.train import TRAINING_LOG, read_log

CARD = """# The testbed's `{family}` model

A `LlamaForCausalLM` of {layers} layers and {parameters:.1f}M parameters (width {width}, {heads} heads,
{kv_heads} key/value heads, {feature}), trained from scratch on generated texts to
measure what skipping sublayers costs. It knows no language beyond those texts.

## Data

Six tasks in LongBench's record format and prompt templates, over a closed vocabulary of {vocab} tokens
(`adaskip/testbed/tasks.py`). Every text states facts such as "Ada sells red boats to Oslo." and asks for some of them.
Training, calibration and test sets are disjoint by construction: the split of a fact is a hash of its words, so that no
fact of the test set is ever stated in a training or calibration text. Test contexts have 518 to 639 tokens.

## Training

`python -m dev.testbed_training.train --family {family} --threads 1`, seed {seed}, AdamW and Muon, bfloat16 autocast,
{steps} steps, {tokens:.1f}M tokens, {minutes:.0f} minutes on one CPU core (the two other models trained beside it).
The weights are stored as float16. All three families share one recipe:

| steps | tokens per step | context tokens | prompts without instructions | learning rate | mixture |
|---|---|---|---|---|---|
{phases}

Peak learning rates are {muon_lr} (Muon, hidden matrices) and {adamw_lr} (AdamW, the rest), times the factor above,
with {warmup} steps of warm-up and a linear decay to 2 % over the last {decay:.0%} of the steps. Key and query
projections start equal. Only answers carry loss; a document comes with up to {questions} questions. The log is `{log}`.

![Training curve](curve.svg)

## Scores

Full model, greedy, float32, {limit} test records per task, LongBench's metrics:

```
python -m dev.testbed_training.evaluate --family {family} --limit {limit}
```

| {task_names} |
|{rules}|
| {scores} |

torch {torch}, transformers {transformers}.

Architecture, data, recipe and seed were chosen by the full models' scores only, never by how a skipping strategy looks
on them.
"""
FEATURES = {
    "llama": "grouped-query attention, llama3 rope scaling",
    "internlm": "biases in the attention projections, dynamic-NTK rope that acts beyond 1280 tokens",
    "vicuna": "linear rope scaling",
}


def phase_rows() -> str:
    """The recipe as rows of a Markdown table."""
    rows, start = [], 0
    for phase in RECIPE.phases:
        mixture = ", ".join(f"{task} {weight:g}" for task, weight in phase.weights.items())
        low, high = phase.context_tokens
        end = start + phase.steps
        cells = (f"{start} to {end}", phase.tokens, f"{low} to {high}", f"{phase.bare:.0%}", f"{phase.lr:g}", mixture)
        rows.append(f"| {' | '.join(map(str, cells))} |")
        start = end
    return "\n".join(rows)


def draw_curve(lines: list[dict[str, float]], path: Path) -> None:
    """Loss, and accuracy on the learnt tokens of each task, against training tokens."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.4), layout="constrained")
    left.plot([line["tokens"] / 1e6 for line in lines], [line["loss"] for line in lines], color="black", linewidth=1)
    left.set(yscale="log", xlabel="training tokens (millions)", ylabel="loss")
    for task in EVALUATED:
        points = [(line["tokens"] / 1e6, 100 * line[task]) for line in lines if task in line]
        right.plot(*zip(*points, strict=True), label=task, linewidth=1)
    right.set(xlabel="training tokens (millions)", ylabel="accuracy on answer tokens (%)")
    right.legend(fontsize="small", frameon=False)
    plt.rcParams["svg.hashsalt"] = "adaskip"
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def card(family: str, folder: Path, limit: int, seed: int) -> str:
    """The text of README.md; evaluates the model."""
    config = json.loads((folder / "config.json").read_text())
    last = read_log(folder / TRAINING_LOG)[-1]
    scores = evaluate(folder, limit)
    return CARD.format(
        family=family,
        layers=config["num_hidden_layers"],
        parameters=(folder / "model.safetensors").stat().st_size / 2 / 1e6,
        width=config["hidden_size"],
        heads=config["num_attention_heads"],
        kv_heads=config["num_key_value_heads"],
        feature=FEATURES[family],
        vocab=config["vocab_size"],
        seed=seed,
        steps=last["step"],
        tokens=last["tokens"] / 1e6,
        minutes=last["seconds"] / 60,
        phases=phase_rows(),
        muon_lr=RECIPE.muon_lr,
        adamw_lr=RECIPE.adamw_lr,
        warmup=RECIPE.warmup,
        decay=RECIPE.decay,
        questions=1 + MAX_MORE_QUESTIONS,
        log=TRAINING_LOG,
        limit=limit,
        task_names=" | ".join(EVALUATED),
        rules="---|" * (len(EVALUATED) - 1) + "---",
        scores=" | ".join(f"{scores[task]:.2f}" for task in EVALUATED),
        torch=torch.__version__.split("+")[0],
        transformers=transformers.__version__,
    )


def main(argv: list[str] | None = None) -> None:
    """Write README.md and curve.svg beside a trained model."""
    parser = argparse.ArgumentParser(prog="dev.testbed_training.card", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--limit", type=int, default=200, help="test records per task (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="the seed it was trained with")
    parser.add_argument("--threads", type=int)
    args = parser.parse_args(argv)
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    folder = checkpoint_dir(args.family)
    draw_curve(read_log(folder / TRAINING_LOG), folder / "curve.svg")
    write_text_atomic(folder / "README.md", card(args.family, folder, args.limit, args.seed))


if __name__ == "__main__":
    main()
