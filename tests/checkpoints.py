"""Small random checkpoints of the three families, with the files and config fields of their Hub repositories."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from tests.internlm_reference import VOCAB, random_weights, train_tokenizer, write_checkpoint

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}<|start_header_id|>{{ message['role'] }}<|end_header_id|>\n\n"
    "{{ message['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
LLAMA_SPECIALS = [
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
]
LINES = ["The quick brown fox jumps over the lazy dog.", "Question: who? Answer: she.\n\n"] * 10


def write_family(family: str, folder: Path) -> Path:
    """A snapshot folder of `llama`, `internlm` or `vicuna`."""
    folder.mkdir(parents=True, exist_ok=True)
    {"llama": _llama, "internlm": _internlm, "vicuna": _vicuna}[family](folder)
    return folder


def write_hub_cache(family: str, cache: Path, repo: str, revision: str) -> Path:
    """The same inside a Hub cache, `models--org--name/snapshots/<revision>`; returns the repository's cache folder."""
    repo_folder = cache / f"models--{repo.replace('/', '--')}"
    write_family(family, repo_folder / "snapshots" / revision)
    (repo_folder / "refs").mkdir()
    (repo_folder / "refs" / "main").write_text(revision)
    return repo_folder


def _llama(folder: Path) -> None:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB, special_tokens=LLAMA_SPECIALS, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(LINES, trainer)
    bos = ("<|begin_of_text|>", tokenizer.token_to_id("<|begin_of_text|>"))
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{bos[0]} $A", special_tokens=[bos])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=bos[0], eos_token="<|eot_id|>")
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    ends = [tokenizer.token_to_id(token) for token in ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>")]
    config = {
        **{"num_key_value_heads": 2, "max_position_embeddings": 131072, "rope_theta": 500000.0, "rms_norm_eps": 1e-05},
        **{"attention_bias": False, "mlp_bias": False, "bos_token_id": bos[1], "eos_token_id": ends},
        "rope_scaling": {
            **{"factor": 8.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0},
            **{"original_max_position_embeddings": 8192, "rope_type": "llama3"},
        },
    }
    _write_model(folder, config, layout="safetensors")
    sampling = {"do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (folder / "generation_config.json").write_text(
        json.dumps({"bos_token_id": bos[1], "eos_token_id": ends, **sampling})
    )


def _internlm(folder: Path) -> None:
    write_checkpoint(folder, random_weights(), layout="bin")


def _vicuna(folder: Path) -> None:
    train_tokenizer(folder / "tokenizer.model", remove_extra_whitespaces=False, normalization_rule_name="identity")
    tokenizer_config = {
        **{"add_bos_token": True, "add_eos_token": False, "bos_token": "<s>", "eos_token": "</s>", "legacy": False},
        **{"pad_token": "<unk>", "tokenizer_class": "LlamaTokenizer", "unk_token": "<unk>", "model_max_length": 16384},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    config = {
        **{"max_position_embeddings": 4096, "max_sequence_length": 16384, "rms_norm_eps": 1e-05, "pad_token_id": 0},
        **{"bos_token_id": 1, "eos_token_id": 2, "rope_scaling": {"factor": 4.0, "type": "linear"}},
    }
    _write_model(folder, config, layout="bin")
    sampling = {"max_length": 4096, "temperature": 0.9, "top_p": 0.6}
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "pad_token_id": 0, **sampling}))


def _write_model(folder: Path, config: dict[str, Any], layout: str) -> None:
    """Two shards of random weights, and a config.json as older transformers wrote it."""
    torch.manual_seed(0)
    fields = {**SMALL, "vocab_size": VOCAB, "tie_word_embeddings": False, **config}
    model = LlamaForCausalLM(LlamaConfig(**fields))
    if layout == "safetensors":
        model.save_pretrained(folder, max_shard_size="100KB")
    else:
        weights = model.state_dict()
        names, weight_map = sorted(weights), {}
        for number, part in enumerate((names[::2], names[1::2]), start=1):
            file = f"pytorch_model-{number:05}-of-00002.bin"
            torch.save({name: weights[name] for name in part}, folder / file)
            weight_map |= dict.fromkeys(part, file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    header = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "float16", "use_cache": True}
    (folder / "config.json").write_text(json.dumps({**header, **fields}))
