"""Train one testbed model from scratch: `python -m adaskip.testbed.train --family llama`.

Killed at any moment and started again, the same command continues from the last checkpoint and ends with the same weights.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import AttentionInterface, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from adaskip.files import write_text_atomic
from adaskip.testbed import FAMILIES
from adaskip.testbed.curriculum import IGNORED, RECIPE, Recipe, batch
from adaskip.testbed.families import model_config
from adaskip.testbed.muon import Muon
from adaskip.testbed.tokenizer import build_tokenizer

logger = logging.getLogger(__name__)
BLOCK = 128


def causal_blocks(module, query, key, value, attention_mask, scaling, **unused):
    """Causal attention in blocks of queries that see only the keys before them; twice as fast as SDPA on a CPU.

    Args are those of transformers' attention interface, `query` `[B, H, S, D]`; right-padded batches need no mask.
    """
    rows, heads, length, width = query.shape
    key, value = (x.repeat_interleave(module.num_key_value_groups, 1) for x in (key, value))
    query, key, value = ((x).reshape(rows * heads, length, width) for x in (query * scaling, key, value))
    outputs = []
    for start in range(0, length, BLOCK):
        end = min(length, start + BLOCK)
        mask = torch.full((end - start, end), float("-inf"), dtype=query.dtype, device=query.device).triu(start + 1)
        scores = torch.baddbmm(mask, query[:, start:end], key[:, :end].mT)
        outputs.append(torch.bmm(scores.softmax(-1, dtype=scores.dtype), value[:, :end]))
    output = torch.cat(outputs, 1).view(rows, heads, length, width)
    return output.transpose(1, 2).contiguous(), None


AttentionInterface.register("causal_blocks", causal_blocks)


def new_model(family: str, vocab_size: int, recipe: Recipe, seed: int) -> LlamaForCausalLM:
    """A freshly initialised model whose key projections start equal to the query projections.

    A token then attends to earlier copies of itself from the start, half of an induction head; without this, copying
    needs several times as many steps to appear (mimetic initialisation, Trockman and Kolter 2023).
    """
    torch.manual_seed(seed)
    config = model_config(family, vocab_size)
    config._attn_implementation = "causal_blocks"
    model = LlamaForCausalLM(config)
    width = config.head_dim or config.hidden_size // config.num_attention_heads
    with torch.no_grad():
        for layer in model.model.layers:
            query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
            torch.nn.init.normal_(key, std=recipe.query_key_std)
            heads = key.view(-1, width, config.hidden_size)
            query.copy_(heads.repeat_interleave(query.shape[0] // key.shape[0], 0).view_as(query))
    return model


def new_optimizers(model: LlamaForCausalLM, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon for the hidden matrices, AdamW for embeddings, norms and biases."""
    matrices = {name: p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name}
    others = [p for name, p in model.named_parameters() if name not in matrices]
    return [
        Muon(matrices.values(), lr=recipe.muon_lr),
        torch.optim.AdamW(others, lr=recipe.adamw_lr, betas=(0.9, 0.98), weight_decay=0.0),
    ]


@dataclass
class Trainer:
    """Model, optimizers and position of one run; a checkpoint is exactly this."""

    family: str
    recipe: Recipe
    seed: int
    device: torch.device
    tokenizer: PreTrainedTokenizerFast
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self):
        self.model = new_model(self.family, len(self.tokenizer), self.recipe, self.seed).to(self.device)
        self.optimizers = new_optimizers(self.model, self.recipe)

    def save(self, path: Path) -> None:
        """Write the checkpoint whole or not at all."""
        temporary = path.with_suffix(".tmp")
        state = {
            "run": self.run_id(),
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
        }
        torch.save(state, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint of the same run; raises ValueError for another run's."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["run"] != self.run_id():
            raise ValueError(
                f"{path} belongs to another run (other family, seed or recipe); remove it or pass --work-dir"
            )
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def position(self) -> dict[str, float]:
        """How far the run is: steps, tokens, and seconds of training."""
        return {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 1)}

    def run_id(self) -> str:
        """What must agree between a checkpoint and the run that continues it."""
        return json.dumps({"family": self.family, "seed": self.seed})

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns loss and accuracy over the learnt tokens."""
        start = time.perf_counter()
        scale = self.recipe.lr_scale(self.step)
        for optimizer, lr in zip(self.optimizers, (self.recipe.muon_lr, self.recipe.adamw_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale
        ids, labels, tasks = batch(self.recipe, self.step, self.seed, self.tokenizer)
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(input_ids=ids.to(self.device), use_cache=False).logits
        targets = labels[:, 1:].to(self.device)
        learnt = targets != IGNORED
        logits, targets = logits[:, :-1][learnt].float(), targets[learnt]
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += ids.numel()
        self.seconds += time.perf_counter() - start
        rows = torch.arange(len(tasks)).repeat_interleave((labels[:, 1:] != IGNORED).sum(1))
        correct = (logits.argmax(-1) == targets).float().cpu()
        return {"loss": loss.item()} | {
            task: correct[[tasks[r] == task for r in rows.tolist()]].mean().item() for task in set(tasks)
        }


def train(trainer: Trainer, work_dir: Path, steps: int, save_every_s: float = 120, log_every: int = 20) -> None:
    """Run up to step `steps`, with a JSONL log and, at a line of the log, a checkpoint every couple of minutes."""
    work_dir.mkdir(parents=True, exist_ok=True)
    checkpoint, log = work_dir / "checkpoint.pt", work_dir / "log.jsonl"
    if checkpoint.exists():
        trainer.load(checkpoint)
    lines = [line for line in _read_lines(log) if line["step"] <= trainer.step]
    last_save, window = time.monotonic(), []
    with tqdm(total=steps, initial=trainer.step, unit="step", desc=trainer.family, mininterval=5) as bar:
        while trainer.step < steps:
            window.append(trainer.train_step())
            bar.update()
            if trainer.step % log_every and trainer.step < steps:
                continue
            lines.append(trainer.position() | _means(window))
            write_text_atomic(log, "".join(json.dumps(line) + "\n" for line in lines))
            bar.set_postfix(loss=lines[-1]["loss"], refresh=False)
            window = []
            if time.monotonic() - last_save > save_every_s or trainer.step == steps:
                trainer.save(checkpoint)
                last_save = time.monotonic()


def _read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def _means(window: list[dict[str, float]]) -> dict[str, float]:
    keys = sorted({key for line in window for key in line})
    return {key: round(statistics.mean(line[key] for line in window if key in line), 4) for key in keys}


def export(trainer: Trainer, folder: Path) -> None:
    """Save the model in half precision, with its tokenizer, as a Hugging Face checkpoint."""
    model = LlamaForCausalLM(model_config(trainer.family, len(trainer.tokenizer)))
    model.load_state_dict(trainer.model.state_dict())
    model.to(torch.bfloat16).save_pretrained(folder)
    trainer.tokenizer.save_pretrained(folder)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--family", choices=FAMILIES, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--steps", type=int, default=None, help="stop after this many steps (default: the whole recipe)"
    )
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=None)
    parser.add_argument(
        "--work-dir", type=Path, default=None, help="checkpoint and log (default: checkpoints/testbed/FAMILY)"
    )
    parser.add_argument("--output-dir", type=Path, default=None, help="where the finished model goes")
    args = parser.parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    work_dir = args.work_dir or Path("checkpoints/testbed") / args.family
    trainer = Trainer(args.family, RECIPE, args.seed, torch.device(args.device), build_tokenizer())
    steps = RECIPE.steps if args.steps is None else args.steps
    train(trainer, work_dir, steps)
    export(trainer, args.output_dir or work_dir / "model")


if __name__ == "__main__":
    main()
