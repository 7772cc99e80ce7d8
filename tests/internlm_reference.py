"""InternLM (version 1) in plain torch, written from its published architecture, and checkpoints in its own layout.

Nothing here comes from transformers or from adaskip: it is what the native loading is compared with. The published code
caches keys before rotation and rotates all of them in every step with the base of the current length.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from sentencepiece import SentencePieceTrainer
from torch import Tensor

LAYERS, WIDTH, HEADS, FFN, LIMIT, VOCAB = 2, 32, 4, 48, 16, 320
EOA, EOH = "<eoa>", "<eoh>"

CONFIG: dict[str, Any] = {
    "architectures": ["InternLMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_internlm.InternLMConfig",
        "AutoModelForCausalLM": "modeling_internlm.InternLMForCausalLM",
    },
    "bias": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": FFN,
    "max_position_embeddings": LIMIT,
    "model_type": "internlm",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "pad_token_id": 2,
    "rms_norm_eps": 1e-06,
    "rotary": {"base": 10000, "type": "dynamic", "scaling_factor": 1.0},
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.33.2",
    "use_cache": True,
    "vocab_size": VOCAB,
}
TOKENIZER_CONFIG = {
    "add_bos_token": True,
    "add_eos_token": False,
    "auto_map": {"AutoTokenizer": ["tokenization_internlm.InternLMTokenizer", None]},
    "bos_token": "<s>",
    "clean_up_tokenization_spaces": False,
    "eos_token": "</s>",
    "model_max_length": 1000000000000000019884624838656,
    "pad_token": "</s>",
    "tokenizer_class": "InternLMTokenizer",
    "unk_token": "<unk>",
}


def random_weights(seed: int = 0, bias: bool = True) -> dict[str, Tensor]:
    """Weights under InternLM's names, large enough that every part shows in the logits."""
    generator = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) / math.sqrt(columns)

    def vector(size: int, mean: float) -> Tensor:
        return mean + 0.3 * torch.randn(size, generator=generator)

    weights = {"model.embed_tokens.weight": torch.randn(VOCAB, WIDTH, generator=generator)}
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        for projection in "qkvo":
            weights[f"{name}.self_attn.{projection}_proj.weight"] = 2 * matrix(WIDTH, WIDTH)
            if bias:
                weights[f"{name}.self_attn.{projection}_proj.bias"] = vector(WIDTH, 0.0)
        weights[f"{name}.mlp.gate_proj.weight"] = matrix(FFN, WIDTH)
        weights[f"{name}.mlp.up_proj.weight"] = matrix(FFN, WIDTH)
        weights[f"{name}.mlp.down_proj.weight"] = matrix(WIDTH, FFN)
        weights[f"{name}.input_layernorm.weight"] = vector(WIDTH, 1.0)
        weights[f"{name}.post_attention_layernorm.weight"] = vector(WIDTH, 1.0)
    return weights | {"model.norm.weight": vector(WIDTH, 1.0), "lm_head.weight": matrix(VOCAB, WIDTH)}


def train_tokenizer(path: Path, **options: Any) -> None:
    """A small SentencePiece BPE model with byte fallback and InternLM's two chat pieces."""
    lines = [
        "The quick brown fox jumps over the lazy dog.",
        "你好，世界。",  # noqa: RUF001
        "<|User|>:Hello",
        "<|Bot|>:World  two",
    ] * 20
    SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_prefix=str(path.with_suffix("")),
        vocab_size=VOCAB,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        user_defined_symbols=[EOH, EOA],
        minloglevel=2,
        **options,
    )


def clean_up(text: str) -> str:
    """What the published tokenizer does with every decoded text, whatever its settings say."""
    text = text.replace(" .", ".").replace(" ?", "?").replace(" !", "!").replace(" ,", ",").replace(" ' ", "'")
    text = text.replace(" n't", "n't").replace(" 'm", "'m").replace(" 's", "'s")
    return text.replace(" 've", "'ve").replace(" 're", "'re")


def write_checkpoint(
    folder: Path, weights: dict[str, Tensor], *, layout: str, config: dict[str, Any] | None = None
) -> Path:
    """A folder as InternLM publishes it; layout: "safetensors", or "bin" for two shards with rotary buffers inside."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))
    (folder / "generation_config.json").write_text(json.dumps({"bos_token_id": 1, "eos_token_id": 2}))
    train_tokenizer(folder / "tokenizer.model")
    if layout == "safetensors":
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    size = WIDTH // HEADS
    inv_freq = 1.0 / (10000.0 ** (torch.arange(0, size, 2).float() / size))
    rotary = {f"model.layers.{layer}.self_attn.rotary_emb.inv_freq": inv_freq for layer in range(LAYERS)}
    names, weight_map = sorted(weights | rotary), {}
    for number, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
        file = f"pytorch_model-{number:05}-of-00002.bin"
        torch.save({name: (weights | rotary)[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


class Reference:
    """One request on the plain model: call it with token ids [S]; it returns logits [S, V] and keeps its own cache.

    `fixed_length` rotates with the base of that length throughout; None: of the current length, as published.
    """

    def __init__(self, weights: dict[str, Tensor], config: dict[str, Any], fixed_length: int | None = None):
        self.weights, self.config, self.fixed_length = weights, {**CONFIG, **config}, fixed_length
        self.layers, self.heads = self.config["num_hidden_layers"], self.config["num_attention_heads"]
        self.head_dim = self.config["hidden_size"] // self.heads
        self.kv_heads = self.config.get("num_key_value_heads", self.heads)
        self.keys: list[Tensor] = [torch.empty(self.kv_heads, 0, self.head_dim)] * self.layers
        self.values = list(self.keys)

    def __call__(self, ids: Tensor) -> Tensor:
        hidden = self.weights["model.embed_tokens.weight"][ids]
        for layer in range(self.layers):
            name = f"model.layers.{layer}"
            hidden = hidden + self.attention(layer, self.norm(hidden, f"{name}.input_layernorm"))
            normed = self.norm(hidden, f"{name}.post_attention_layernorm")
            gate = F.silu(self.linear(normed, f"{name}.mlp.gate_proj"))
            hidden = hidden + self.linear(gate * self.linear(normed, f"{name}.mlp.up_proj"), f"{name}.mlp.down_proj")
        return self.linear(self.norm(hidden, "model.norm"), "lm_head")

    def linear(self, x: Tensor, name: str) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights.get(f"{name}.bias"))

    def norm(self, x: Tensor, name: str) -> Tensor:
        return (
            self.weights[f"{name}.weight"] * x / (x.pow(2).mean(-1, keepdim=True) + self.config["rms_norm_eps"]).sqrt()
        )

    def attention(self, layer: int, x: Tensor) -> Tensor:
        name = f"model.layers.{layer}.self_attn"
        q, k, v = (
            self.linear(x, f"{name}.{part}_proj").view(len(x), -1, self.head_dim).transpose(0, 1) for part in "qkv"
        )
        self.keys[layer] = torch.cat((self.keys[layer], k), dim=1)
        self.values[layer] = torch.cat((self.values[layer], v), dim=1)
        total = self.keys[layer].shape[1]
        positions, queries = torch.arange(total), torch.arange(total - len(x), total)
        frequencies = self.frequencies(self.fixed_length or total)
        group = self.heads // self.kv_heads
        keys = rotate(self.keys[layer], positions, frequencies).repeat_interleave(group, dim=0)
        scores = rotate(q, queries, frequencies) @ keys.transpose(1, 2) / math.sqrt(self.head_dim)
        scores = scores.masked_fill(positions > queries[:, None], -torch.inf)
        mixed = (scores.softmax(-1) @ self.values[layer].repeat_interleave(group, dim=0)).transpose(0, 1).flatten(1)
        return self.linear(mixed, f"{name}.o_proj")

    def frequencies(self, length: int) -> Tensor:
        """[head_dim / 2]: of a sequence of `length` tokens."""
        size, rotary, limit = self.head_dim, self.config["rotary"], self.config["max_position_embeddings"]
        base = float(rotary["base"])
        if rotary["type"] == "dynamic" and length > limit:
            factor = rotary.get("scaling_factor", 1.0)
            base *= (factor * length / limit - (factor - 1)) ** (size / (size - 2))
        return 1.0 / base ** (torch.arange(0, size, 2).float() / size)


def rotate(x: Tensor, positions: Tensor, frequencies: Tensor) -> Tensor:
    """x [H, S, head_dim] turned by its positions; the two halves of the head are the two coordinates."""
    angles = positions[:, None] * frequencies
    first, second = x.chunk(2, dim=-1)
    return torch.cat(
        (first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()), dim=-1
    )
