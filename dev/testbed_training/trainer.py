"""One training run: the model, its optimizers, its position, and the checkpoint that holds exactly these."""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from dev.testbed_training import attention
from dev.testbed_training.curriculum import IGNORED, batch
from dev.testbed_training.families import model_config
from dev.testbed_training.muon import Muon
from dev.testbed_training.recipe import Recipe

GRADIENT_NORM = 1.0


def new_model(family: str, vocab_size: int, recipe: Recipe, seed: int) -> LlamaForCausalLM:
    """A fresh model whose key projections start equal to its query projections.

    A token then attends to earlier copies of itself from the start, which is half of an induction head. With default
    initialisation copying had not appeared after twice the steps (compare: Trockman and Kolter, mimetic
    initialisation, 2023).
    """
    torch.manual_seed(seed)
    config = model_config(family, vocab_size)
    config._attn_implementation = attention.register()
    model: Any = LlamaForCausalLM(config)
    with torch.no_grad():
        for layer in model.model.layers:
            query, key = layer.self_attn.q_proj.weight, layer.self_attn.k_proj.weight
            torch.nn.init.normal_(key, std=recipe.query_key_std)
            heads = key.view(-1, layer.self_attn.head_dim, config.hidden_size)
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
    """A run that can be saved and continued between any two steps."""

    family: str
    recipe: Recipe
    seed: int
    device: torch.device
    tokenizer: PreTrainedTokenizerFast
    step: int = 0
    tokens: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        model: Any = new_model(self.family, len(self.tokenizer), self.recipe, self.seed)
        self.model: LlamaForCausalLM = model.to(self.device)
        self.optimizers = new_optimizers(self.model, self.recipe)

    def position(self) -> dict[str, float]:
        """How far the run is: steps, tokens, and seconds of training."""
        return {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 1)}

    def run_id(self) -> str:
        """What must agree between a checkpoint and the run that continues it."""
        recipe = hashlib.sha256(json.dumps(asdict(self.recipe)).encode()).hexdigest()[:12]
        return f"family {self.family}, seed {self.seed}, recipe {recipe}"

    def save(self, path: Path) -> None:
        """Write the checkpoint whole or not at all."""
        temporary = path.with_name(f".{path.name}.tmp")
        position = {"step": self.step, "tokens": self.tokens, "seconds": self.seconds}
        optimizers = [optimizer.state_dict() for optimizer in self.optimizers]
        state = {"run": self.run_id(), "model": self.model.state_dict(), "optimizers": optimizers}
        torch.save(state | position, temporary)
        temporary.replace(path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint; ValueError if it is another run's."""
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["run"] != self.run_id():
            raise ValueError(
                f"{path} is of {state['run']}, not of {self.run_id()}: remove it or give another --work-dir"
            )
        self.step, self.tokens, self.seconds = state["step"], state["tokens"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns the loss, and per task the accuracy on the learnt tokens."""
        start = time.perf_counter()
        self._set_learning_rates()
        ids, labels, tasks = batch(self.recipe, self.step, self.seed, self.tokenizer)
        logits, targets = self._learnt_logits(ids, labels)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), GRADIENT_NORM)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.tokens += ids.numel()
        self.seconds += time.perf_counter() - start
        correct = (logits.argmax(-1) == targets).float().cpu()
        return {"loss": loss.item()} | _accuracy_by_task(correct, labels, tasks)

    def _set_learning_rates(self) -> None:
        scale = self.recipe.lr_scale(self.step)
        for optimizer, lr in zip(self.optimizers, (self.recipe.muon_lr, self.recipe.adamw_lr), strict=True):
            for group in optimizer.param_groups:
                group["lr"] = lr * scale

    def _learnt_logits(self, ids: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Logits `[N, vocabulary]` in float32 and target ids `[N]` of the N tokens to be learnt."""
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(input_ids=ids.to(self.device), use_cache=False).logits
        targets = labels[:, 1:].to(self.device)
        learnt = targets != IGNORED
        return logits[:, :-1][learnt].float(), targets[learnt]

    def export(self, folder: Path) -> None:
        """Save the model in half precision, with its tokenizer, as a Hugging Face checkpoint."""
        model: Any = LlamaForCausalLM(model_config(self.family, len(self.tokenizer)))
        model.load_state_dict(self.model.state_dict())
        model.to(torch.float16).save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def _accuracy_by_task(correct: Tensor, labels: Tensor, tasks: list[str]) -> dict[str, float]:
    """`correct` `[N]` holds the learnt tokens of all rows of `labels` in order; `tasks` names each row's task."""
    by_row = correct.split((labels[:, 1:] != IGNORED).sum(1).tolist())
    names = sorted(set(tasks))
    return {
        name: torch.cat([row for row, task in zip(by_row, tasks, strict=True) if task == name]).mean().item()
        for name in names
    }
