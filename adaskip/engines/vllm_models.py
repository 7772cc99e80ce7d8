"""vLLM's own models without the sublayers that a plan skips; the sets are in their `config.json`.

A decoder layer of vLLM passes on a pair: the output of the last sublayer and the residual stream without it; the next
norm adds them. Before the first sublayer there is no output yet, and the residual is None.
"""
# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

from torch import Tensor, nn
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.models.llama import LlamaDecoderLayer, LlamaForCausalLM
from vllm.model_executor.models.mistral import MistralDecoderLayer, MistralForCausalLM
from vllm.model_executor.models.qwen2 import Qwen2DecoderLayer, Qwen2Model
from vllm.model_executor.models.qwen3 import Qwen3DecoderLayer, Qwen3Model
from vllm.model_executor.models.utils import extract_layer_index


class LiveSublayers:
    """Before a decoder layer of vLLM in the bases of a class: the layer without what is skipped.

    A skipped attention has no KV cache layer: vLLM makes one for each attention in the forward context.
    """

    def __init__(self, *, prefix: str, **options):
        super().__init__(prefix=prefix, **options)
        vllm_config = get_current_vllm_config()
        layer, skipped = extract_layer_index(prefix), vllm_config.model_config.hf_config.adaskip
        self.has_attention, self.has_ffn = layer not in skipped["attention"], layer not in skipped["ffn"]
        if not self.has_attention:
            del self.self_attn, self.input_layernorm
            del vllm_config.compilation_config.static_forward_context[f"{prefix}.self_attn.attn"]
        if not self.has_ffn:
            del self.mlp, self.post_attention_layernorm

    def forward(
        self, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **options
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states, residual: [T, D] for the T tokens of a step, in and out."""
        if self.has_attention and self.has_ffn:
            return super().forward(positions, hidden_states, residual, **options)
        if self.has_attention:
            normed, residual = _add_and_norm(self.input_layernorm, hidden_states, residual)
            return self.self_attn(positions=positions, hidden_states=normed), residual
        if self.has_ffn:
            normed, residual = _add_and_norm(self.post_attention_layernorm, hidden_states, residual)
            return self.mlp(normed), residual
        return hidden_states, residual


def _add_and_norm(norm: nn.Module, hidden_states: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
    return (norm(hidden_states), hidden_states) if residual is None else norm(hidden_states, residual)


class LlamaLayer(LiveSublayers, LlamaDecoderLayer):
    """LLaMA's layer, and InternLM's and Vicuna's."""


class MistralLayer(LiveSublayers, MistralDecoderLayer):
    """Mistral's."""


class Qwen2Layer(LiveSublayers, Qwen2DecoderLayer):
    """Qwen2's."""


class Qwen3Layer(LiveSublayers, Qwen3DecoderLayer):
    """Qwen3's."""


class LiveQwen3Model(Qwen3Model):
    """Qwen3's decoder, which takes the class of its layers from here."""

    decoder_layer_type = Qwen3Layer


class LiveModel:
    """Before a causal LM of vLLM in the bases of a class: it has sublayers that do nothing, and no LoRA adapters."""

    has_noops = True
    layer_type: type[nn.Module]

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        if vllm_config.lora_config is not None:
            raise ValueError(
                f"{type(self).__name__} takes no LoRA adapters: they were trained for the full model, whose scales are "
                "folded into other weights here; merge the adapter into the model and export it again"
            )
        super().__init__(vllm_config=vllm_config, prefix=prefix, layer_type=self.layer_type)
        stage = range(self.model.start_layer, self.model.end_layer)
        if not any(self.model.layers[layer].has_attention for layer in stage):
            raise ValueError(
                f"all attentions of layers {stage.start}..{stage.stop - 1} are skipped, a pipeline stage of vLLM needs "
                "one: take fewer stages or another partition (VLLM_PP_LAYER_PARTITION)"
            )


class AdaSkipLlamaForCausalLM(LiveModel, LlamaForCausalLM):
    """LLaMA, InternLM, Vicuna."""

    layer_type = LlamaLayer


class AdaSkipMistralForCausalLM(LiveModel, MistralForCausalLM):
    """Mistral."""

    layer_type = MistralLayer


class AdaSkipQwen2ForCausalLM(LiveModel, LlamaForCausalLM):
    """Qwen2: its decoder under LLaMA's head, which takes the class of the layers."""

    layer_type = Qwen2Layer

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = Qwen2Layer):
        return Qwen2Model(vllm_config=vllm_config, prefix=prefix, decoder_layer_type=layer_type)


class AdaSkipQwen3ForCausalLM(LiveModel, LlamaForCausalLM):
    """Qwen3, likewise."""

    layer_type = Qwen3Layer

    def _init_model(self, vllm_config: VllmConfig, prefix: str = "", layer_type: type[nn.Module] = Qwen3Layer):
        return LiveQwen3Model(vllm_config=vllm_config, prefix=prefix)
