"""What llama.cpp's architectures `llama` and `deci` compute of a GGUF file, written out in torch from its source."""

from __future__ import annotations

from pathlib import Path

import torch
from gguf import GGUFReader
from gguf.quants import dequantize
from torch import Tensor


class GGUFDecoder:
    """A file's weights in float64 and its fields."""

    def __init__(self, path: Path):
        reader = GGUFReader(path)
        self.fields = {key: field.contents() for key, field in reader.fields.items()}
        self.architecture = self.fields["general.architecture"]
        self.weights = {
            tensor.name: torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy()).double()
            for tensor in reader.tensors
        }
        self.layers = self.field("block_count")

    def field(self, name: str, default=None):
        return self.fields.get(f"{self.architecture}.{name}", default)

    def of_layer(self, name: str, layer: int) -> int:
        value = self.field(name)
        return value[layer] if isinstance(value, list) else value

    @torch.no_grad()
    def logits(self, tokens: Tensor) -> Tensor:
        """Of a whole sequence, [S] -> [S, V]."""
        h = self.weights["token_embd.weight"][tokens]
        assert self.of_layer("attention.head_count", 0) > 0, "llama.cpp takes the size of heads from the first layer"
        for layer in range(self.layers):
            heads, kv_heads = (self.of_layer(f"attention.head_count{end}", layer) for end in ("", "_kv"))
            if heads:
                x = self.norm(h, f"blk.{layer}.attn_norm.weight")
                mixed = self.attention(x, layer, heads, kv_heads) if kv_heads else x
                out = self.linear(mixed, f"blk.{layer}.attn_output")
            if self.of_layer("feed_forward_length", layer) == 0:
                continue  # llama.cpp goes on with h as it was: the attention's output is lost
            h = h + out if heads else h
            x = self.norm(h, f"blk.{layer}.ffn_norm.weight")
            gated = torch.nn.functional.silu(self.linear(x, f"blk.{layer}.ffn_gate"))
            h = h + self.linear(gated * self.linear(x, f"blk.{layer}.ffn_up"), f"blk.{layer}.ffn_down")
        output = self.weights.get("output.weight", self.weights["token_embd.weight"])
        return self.norm(h, "output_norm.weight") @ output.T

    def norm(self, h: Tensor, name: str) -> Tensor:
        epsilon = self.field("attention.layer_norm_rms_epsilon")
        return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + epsilon) * self.weights[name]

    def linear(self, x: Tensor, name: str) -> Tensor:
        return x @ self.weights[f"{name}.weight"].T + self.weights.get(f"{name}.bias", torch.zeros(()))

    def attention(self, x: Tensor, layer: int, heads: int, kv_heads: int) -> Tensor:
        length, width = len(x), self.field("attention.key_length") or x.shape[1] // heads
        q, k, v = (
            self.linear(x, f"blk.{layer}.attn_{part}").view(length, count, width).transpose(0, 1)
            for part, count in (("q", heads), ("k", kv_heads), ("v", kv_heads))
        )
        q, k = self.rotate(q), self.rotate(k).repeat_interleave(heads // kv_heads, 0)
        scores = q @ k.transpose(1, 2) / width**0.5
        scores = scores.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
        out = scores.softmax(-1) @ v.repeat_interleave(heads // kv_heads, 0)
        return out.transpose(0, 1).reshape(length, heads * width)

    def rotate(self, x: Tensor) -> Tensor:
        """Neighbours (2i, 2i + 1) are a pair, [H, S, W]."""
        width = x.shape[-1]
        frequency = self.field("rope.freq_base") ** -(torch.arange(0, width, 2).double() / width)
        frequency = frequency / self.weights.get("rope_freqs.weight", torch.ones(()))
        frequency = frequency / self.field("rope.scaling.factor", 1.0)
        angle = torch.arange(x.shape[1]).double()[:, None] * frequency
        first, second = x[..., 0::2], x[..., 1::2]
        turned = (first * angle.cos() - second * angle.sin(), first * angle.sin() + second * angle.cos())
        return torch.stack(turned, -1).flatten(-2)
