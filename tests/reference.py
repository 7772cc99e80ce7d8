"""A decoder that truly lacks the skipped sublayers: one token at a time, K/V in Python lists, no cache, no masks.

It takes the weights from a stock model's projections, norms and MLPs; attention, rotary embedding, windows, residual
streams and the order of things are written out here.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adaskip.core.plan import EMPTY_PLAN, Affine, Compensation, SkipPlan


def compensated(h: Tensor, scale: Compensation) -> Tensor:
    """What stands in for a skipped sublayer, [..., D]."""
    if isinstance(scale, Affine):
        return h * torch.tensor(scale.scale) + torch.tensor(scale.shift)
    return h * scale


class ReferenceDecoder:
    """Logits of one sequence, fed token by token, each with its own plan."""

    def __init__(self, model):
        self.model, self.config = model, model.config
        self.kind = model.config.model_type
        self.num_layers = len(model.model.layers)
        self.keys: list[list[Tensor]] = [[] for _ in range(self.num_layers)]
        self.values: list[list[Tensor]] = [[] for _ in range(self.num_layers)]
        self.position = 0

    @torch.no_grad()
    def step(self, token: int, plan: SkipPlan = EMPTY_PLAN) -> Tensor:
        """Logits [V] after `token`."""
        h = self.model.model.embed_tokens(torch.tensor([[token]]))[0]  # [1, D]
        h = h * getattr(self.config, "embedding_multiplier", 1.0)
        for i, layer in enumerate(self.model.model.layers):
            multiplier = getattr(self.config, "residual_multiplier", 1.0)
            if i in plan.attention:
                if plan.keeps_kv:
                    self._attention_branch(i, layer, h)  # appends its K/V
                h = compensated(h, plan.scale("attention", i))
            else:
                h = h + multiplier * self._attention_branch(i, layer, h)
            if i in plan.ffn:  # noqa: SIM108
                h = compensated(h, plan.scale("ffn", i))
            else:
                h = h + multiplier * self._ffn_branch(layer, h)
        self.position += 1
        logits = self.model.lm_head(self.model.model.norm(h))[0] / getattr(self.config, "logits_scaling", 1.0)
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def run(self, tokens: list[int], plan: SkipPlan = EMPTY_PLAN) -> Tensor:
        """Logits [T, V] after each of `tokens`."""
        return torch.stack([self.step(token, plan) for token in tokens])

    def drop(self, layers) -> None:
        """Forget the K/V of some layers."""
        for i in layers:
            self.keys[i], self.values[i] = [], []

    def _attention_branch(self, i, layer, h):
        if self.kind == "olmo2":
            return layer.post_attention_layernorm(self._attention(i, layer.self_attn, h))
        out = self._attention(i, layer.self_attn, layer.input_layernorm(h))
        return layer.post_attention_layernorm(out) if self.kind.startswith("gemma") else out

    def _ffn_branch(self, layer, h):
        if self.kind == "olmo2":
            return layer.post_feedforward_layernorm(layer.mlp(h))
        if self.kind.startswith("gemma"):
            return layer.post_feedforward_layernorm(layer.mlp(layer.pre_feedforward_layernorm(h)))
        x = layer.post_attention_layernorm(h)
        return self._experts(layer.mlp, x) if self.kind == "mixtral" else layer.mlp(x)

    def _experts(self, moe, x):
        """The two best experts, weighted by their renormalised router probabilities."""
        router = torch.softmax(x @ moe.gate.weight.T, dim=-1)[0]
        weights, chosen = router.topk(self.config.num_experts_per_tok)
        out = torch.zeros_like(x)
        for weight, expert in zip(weights / weights.sum(), chosen, strict=True):
            gate, up = (x @ moe.experts.gate_up_proj[expert].T).chunk(2, dim=-1)
            out = out + weight * ((torch.nn.functional.silu(gate) * up) @ moe.experts.down_proj[expert].T)
        return out

    def _attention(self, i, attn, x):
        heads, kv_heads = self.config.num_attention_heads, self.config.num_key_value_heads
        q, k, v = self._project(attn, x)
        width = q.numel() // heads
        q, k, v = q.view(heads, width), k.view(kv_heads, width), v.view(kv_heads, width)
        if self.kind in ("qwen3", "gemma3_text"):
            q, k = attn.q_norm(q), attn.k_norm(k)
        q, k = self._rotate(i, q), self._rotate(i, k)
        self.keys[i].append(k)
        self.values[i].append(v)
        window = self._window(i)
        keys, values = torch.stack(self.keys[i][-window:]), torch.stack(self.values[i][-window:])  # [T, KV, W]
        out = []
        for head in range(heads):
            group = head * kv_heads // heads
            scores = keys[:, group] @ q[head] * attn.scaling
            cap = getattr(self.config, "attn_logit_softcapping", None)
            scores = scores if cap is None else cap * torch.tanh(scores / cap)
            out.append(torch.softmax(scores, dim=0) @ values[:, group])
        return attn.o_proj(torch.cat(out))[None]

    def _project(self, attn, x):
        if self.kind == "phi3":
            width = self.config.hidden_size // self.config.num_attention_heads
            kv = self.config.num_key_value_heads * width
            return attn.qkv_proj(x).split([self.config.hidden_size, kv, kv], dim=-1)
        q, k, v = attn.q_proj(x), attn.k_proj(x), attn.v_proj(x)
        return (attn.q_norm(q), attn.k_norm(k), v) if self.kind == "olmo2" else (q, k, v)

    def _rotate(self, i, x):
        rotary = self.model.model.rotary_emb
        name = f"{self.config.layer_types[i]}_inv_freq" if self.kind == "gemma3_text" else "inv_freq"
        angle = self.position * getattr(rotary, name)
        cos, sin = angle.cos(), angle.sin()
        first, second = x.chunk(2, dim=-1)
        return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)

    def _window(self, i):
        types = getattr(self.config, "layer_types", None)
        sliding = getattr(self.config, "sliding_window", None)
        if sliding is None or (types is not None and types[i] != "sliding_attention"):
            return 10**9
        return sliding


def read_by_hand(model, prompt: Tensor, plan: SkipPlan) -> tuple[ReferenceDecoder, Tensor]:
    """All tokens but the last under the plan, with every layer's K/V, the last in the full model. Logits [T, V]."""
    decoder = ReferenceDecoder(model)
    logits = [decoder.step(token, plan) for token in prompt[:-1].tolist()]
    return decoder, torch.stack([*logits, decoder.step(int(prompt[-1]))])
