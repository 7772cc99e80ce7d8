"""Which tensors of a checkpoint belong to a sublayer and which of them are divided, by model type, as data.

The parts of a layer are those of `adaskip.core.blocks`; a family adds the projections that write to the residual
stream. With norms behind the sublayers (Gemma) the factor goes into their weights; a residual multiplier (Granite)
stands behind the projection and changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from adaskip.core.blocks import BlockStructure, known_structures
from adaskip.core.plan import Sublayer, SublayerKind
from adaskip.engines.errors import ExportError
from adaskip.engines.fold import Folded

LAYER_TENSOR = re.compile(r"model\.layers\.(\d+)\.(.+)")
"""A tensor of a decoder layer: its index and the name below it."""
MOST_ERROR = 1e-2
"""Largest error of a divided tensor, as a fraction of its size: bfloat16 rounds by 0.002, float16 by less unless its
numbers are so small that they lose digits."""
SMALLEST = torch.finfo(torch.float64).tiny
QUANTISED_SCALES = ("scales", "weight_scale", "weight_scale_inv")
"""Tensors beside a quantised weight that multiply it (GPTQ and AWQ; compressed-tensors; fp8)."""


@dataclass(frozen=True)
class Family:
    """How the checkpoints of one model type are laid out.

    structure: name of the `BlockStructure`. attention_output, ffn_output: the projection that writes to the residual
    stream, below the layer. norm_adds_one: norms multiply by 1 + weight (Gemma).
    """

    structure: str
    attention_output: str = "self_attn.o_proj"
    ffn_output: str = "mlp.down_proj"
    norm_adds_one: bool = False

    @property
    def block(self) -> BlockStructure:
        """The structure itself."""
        return next(known for known in known_structures() if known.name == self.structure)

    def kind_of(self, part: str) -> SublayerKind | None:
        """The sublayer that a tensor below a layer, as self_attn.o_proj.weight, belongs to."""
        owner = part.partition(".")[0]
        for kind in ("attention", "ffn"):
            if owner in getattr(self.block, kind).names():
                return kind
        return None


PRE_NORM = Family("pre-norm")
SANDWICH = Family("sandwich-norm", norm_adds_one=True)
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "granite", "phi3", "smollm3"), PRE_NORM),
    **dict.fromkeys(("gemma2", "gemma3_text"), SANDWICH),
    "glm4": Family("sandwich-norm (GLM)"),
    **dict.fromkeys(("olmo2", "olmo3"), Family("post-norm")),
}
"""By `model_type`. InternLM and Vicuna are llama."""


def family_of(model_type: str, allowed: Collection[str] = tuple(FAMILIES)) -> Family:
    """The family of a model type. Raises ExportError for one that is not among `allowed`, an engine's own."""
    if model_type not in FAMILIES or model_type not in allowed:
        raise ExportError(f"models of type {model_type!r} cannot be exported; allowed: {', '.join(sorted(allowed))}")
    return FAMILIES[model_type]


class Edit:
    """Which tensors of a checkpoint stay, and their new content.

    Args:
        folded: the plan's folding.
        family: the checkpoint's.
        names: all tensors of the checkpoint.

    Raises:
        ExportError: a factor cannot be folded into this family or into weights quantised so, the layers of the
            checkpoint are not those of the plan, or a tensor of a layer is unknown.
    """

    def __init__(self, folded: Folded, family: Family, names: Collection[str]):
        self.folded, self.family, self.names = folded, family, frozenset(names)
        if folded.is_scaled and family.structure == "post-norm":
            raise ExportError(
                "the scales of the plan cannot be folded: sublayers of this model have no norm in front, which would "
                "remove the factor; allowed: plans without scales (all 1)"
            )
        self._check_layers()
        self.divided = {
            name: divisor
            for sublayer, divisor in folded.divisors.items()
            if divisor != 1.0
            for name in self._output_of(sublayer)
        }

    def keeps(self, name: str) -> bool:
        """Whether the tensor is part of the smaller model."""
        owner = self.owner(name)
        return owner is None or owner in self.folded.divisors

    def tensor(self, name: str, tensor: Tensor) -> Tensor:
        """The new content of a tensor that is kept, in its own dtype. Raises ExportError where that cannot hold it."""
        divisor = self.divided.get(name)
        if divisor is None:
            return tensor
        one = 1.0 if self.family.norm_adds_one else 0.0  # such norms are the only tensors of these families to change
        wanted = (tensor.double() + one) / divisor
        found = (wanted - one).to(tensor.dtype)
        error = (found.double() + one - wanted).norm() / wanted.norm().clamp(min=SMALLEST)
        if not error <= MOST_ERROR:  # not a number, where one became infinite
            raise ExportError(
                f"{name}, divided by {divisor:g}, errs by {error:.1e} of its size in {tensor.dtype}; allowed: "
                f"{MOST_ERROR:g}, as of a plan with other scales, or of weights in float32"
            )
        return found

    def owner(self, name: str) -> Sublayer | None:
        """The sublayer that a tensor belongs to; None outside of the layers."""
        match = LAYER_TENSOR.fullmatch(name)
        if match is None:
            return None
        kind = self.family.kind_of(match[2])
        if kind is None:
            raise ExportError(f"tensor {name} belongs to neither attention nor FFN of a {self.family.structure} block")
        return Sublayer(kind, int(match[1]))

    def _check_layers(self) -> None:
        found = {owner.layer for name in self.names if (owner := self.owner(name)) is not None}
        if found != set(range(self.folded.num_layers)):
            raise ExportError(
                f"the checkpoint has weights of {len(found)} layers, the plan is for layers 0.."
                f"{self.folded.num_layers - 1}; allowed: the checkpoint that the plan was made for"
            )

    def _output_of(self, sublayer: Sublayer) -> list[str]:
        """The tensors by which a sublayer's output is divided."""
        layer = f"model.layers.{sublayer.layer}."
        if (norm := getattr(self.family.block, sublayer.kind).post_norm) is not None:
            return [f"{layer}{norm}.weight"]
        output = self.family.attention_output if sublayer.kind == "attention" else self.family.ffn_output
        parts = {name.rpartition(".")[2] for name in self.names if name.startswith(f"{layer}{output}.")}
        scales = parts.intersection(QUANTISED_SCALES)
        factors = scales or parts & {"weight"}
        if not factors or (not scales and parts - {"weight", "bias"}):
            raise ExportError(
                f"the scales of the plan cannot be folded into {layer}{output}, which has {', '.join(sorted(parts))}; "
                f"allowed: weight, or a quantised weight with {' or '.join(QUANTISED_SCALES)}, and bias"
            )
        return [f"{layer}{output}.{part}" for part in sorted(factors | parts & {"bias"})]
