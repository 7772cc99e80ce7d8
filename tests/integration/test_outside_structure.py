"""A decoder layer with other names, from a module outside of the package: registered, and run from the command line."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

from transformers import LlamaForCausalLM

from adaskip import cli
from adaskip.common import plugins
from adaskip.common.plugins import PLUGINS
from adaskip.core import blocks
from tests.tiny_runs import cell, make_checkpoint, records

MODULE = "outside_layers"
SOURCE = '''
"""A Llama whose layers call their parts by other names."""

from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from adaskip import register_structure
from adaskip.core.blocks import BlockStructure, Sublayers


class RenamedConfig(LlamaConfig):
    model_type = "renamed_llama"


class RenamedLayer(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.mixer, self.widening = layer.self_attn, layer.mlp
        self.before, self.between = layer.input_layernorm, layer.post_attention_layernorm

    def forward(self, hidden_states, **kwargs):
        hidden_states = hidden_states + self.mixer(hidden_states=self.before(hidden_states), **kwargs)[0]
        return hidden_states + self.widening(self.between(hidden_states))


class RenamedForCausalLM(LlamaForCausalLM):
    config_class = RenamedConfig

    def __init__(self, config):
        super().__init__(config)
        self.model.layers = nn.ModuleList(map(RenamedLayer, self.model.layers))


AutoConfig.register("renamed_llama", RenamedConfig)
AutoModelForCausalLM.register(RenamedConfig, RenamedForCausalLM)
register_structure(
    BlockStructure("renamed", Sublayers("mixer", "before", None), Sublayers("widening", "between", None))
)
'''


def test_a_structure_from_outside_is_skipped_from_the_command_line(data_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "_structures", dict(blocks._structures))
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / f"{MODULE}.py").write_text(SOURCE, encoding="utf-8")
    monkeypatch.setenv(PLUGINS, MODULE)
    plugins._entry_points.cache_clear()
    plain = make_checkpoint(tmp_path / "plain")
    given = ["--data-dir", str(data_dir), "--device", "cpu", "--threads", "1", "--limit", "1", "--tasks", "trec"]
    argv = ["run", *cell("early_exit", "prefill", "2", str(plain)), *given]
    assert cli.main([*argv, "--output-dir", str(tmp_path / "plain_runs")]) == 0

    folder = write_renamed(plain, tmp_path / "renamed")
    argv = ["run", *cell("early_exit", "prefill", "2", str(folder)), *given]
    assert cli.main([*argv, "--output-dir", str(tmp_path / "runs")]) == 0
    (expected,) = records(tmp_path / "plain_runs/plain-EE-PREFILL/2-sublayers")["trec"]
    (made,) = records(tmp_path / "runs/renamed-EE-PREFILL/2-sublayers")["trec"]
    assert made["plan"]["prefill"] == {"attention": [2], "ffn": [2]}
    assert made == expected


def write_renamed(plain: Path, folder: Path) -> Path:
    """The weights and the tokenizer of `plain` under the names of the module outside."""
    outside = sys.modules[MODULE]
    shutil.copytree(plain, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json"))
    llama = LlamaForCausalLM.from_pretrained(plain)
    config = outside.RenamedConfig(**{**llama.config.to_dict(), "model_type": "renamed_llama"})
    names = {
        "self_attn": "mixer",
        "mlp": "widening",
        "input_layernorm": "before",
        "post_attention_layernorm": "between",
    }
    state = {
        ".".join(names.get(part, part) for part in name.split(".")): weight
        for name, weight in llama.state_dict().items()
    }
    renamed = outside.RenamedForCausalLM(config)
    renamed.load_state_dict(state)
    renamed.save_pretrained(folder)
    return folder
