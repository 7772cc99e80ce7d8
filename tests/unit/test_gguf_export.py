"""`export_to("gguf", ...)`: from a checkpoint and from a GGUF file, refusals, and files that are whole or not there."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf.quants import dequantize
from transformers import AutoTokenizer, LlamaForCausalLM

from adaskip.cli import main
from adaskip.core.context import skipping
from adaskip.core.plan import EMPTY_PLAN, SkipPlan, Sublayer
from adaskip.engines import gguf_export
from adaskip.engines.checkpoint import Checkpoint
from adaskip.engines.errors import ExportError
from adaskip.engines.export import export_to
from adaskip.engines.gguf_file import compare_file, read_file
from adaskip.engines.gguf_identity import gguf_identity
from adaskip.engines.gguf_layers import smaller
from adaskip.engines.registry import Export
from adaskip.models.source import read_architecture
from adaskip.strategies import AdaSkip, Budget, FixedPlan
from tests.checkpoints import write_family
from tests.families import random_model
from tests.gguf_decoder import GGUFDecoder
from tests.profiles import profile_of

PLAN = SkipPlan.of_sublayers({Sublayer("attention", 1): 1.3, Sublayer("ffn", 0): 1.2, Sublayer("ffn", 2): 0.8})
CONFIG = random_model("llama").config
TOKENS = torch.randint(3, 61, (20,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(autouse=True)
def _without_llama_cpp(monkeypatch):
    """Here files are read by the package gguf alone."""
    monkeypatch.setattr(gguf_export, "HAS_LLAMA_CPP", False)


def export_of(folder: Path, plan: SkipPlan = PLAN, **options) -> Export:
    model = random_model("llama", hidden_size=32, intermediate_size=64)
    model.save_pretrained(folder)
    return Export(FixedPlan(num_layers=4, plan=plan), Checkpoint(folder, model.config), **options)


def whole_file(folder: Path, weights_type: str = "f32") -> Path:
    file = folder / "whole.gguf"
    export_to("gguf", export_of(folder / "model", EMPTY_PLAN, weights_type=weights_type), file)
    return file


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("weights_type", ["f32", "f16", "bf16", "q8_0", None])
def test_a_checkpoint_becomes_one_file(weights_type, tmp_path):
    export = export_of(tmp_path / "model", weights_type=weights_type)
    report = export_to("gguf", export, tmp_path / "out" / "small.gguf")
    assert listed(tmp_path / "out") == ["small.gguf"]
    kind = gguf.GGMLQuantizationType[(weights_type or "f32").upper()]
    found = gguf.GGUFReader(tmp_path / "out" / "small.gguf")
    assert {
        tensor.tensor_type for tensor in found.tensors if len(tensor.shape) > 1 and "blk.0.attn" in tensor.name
    } == {kind}
    assert {tensor.tensor_type for tensor in found.tensors if len(tensor.shape) == 1} == {gguf.GGMLQuantizationType.F32}
    assert report["skipped"] == {"attention": [1], "ffn": [0, 2]}
    assert 0 < report["verified"]["largest_error"] < {"q8_0": 0.01, "bf16": 4e-3, "f16": 1e-3}.get(weights_type, 1e-6)


def test_a_gguf_file_keeps_every_number_but_the_scales(tmp_path):
    """Blocks of live sublayers are copied; of the outputs after a skipped one only the scales change."""
    whole = whole_file(tmp_path, "q8_0")
    export = Export(FixedPlan(num_layers=4, plan=PLAN), Checkpoint(tmp_path, CONFIG), gguf_file=whole)
    export_to("gguf", export, tmp_path / "small.gguf")
    old, new = ({t.name: t for t in gguf.GGUFReader(file).tensors} for file in (whole, tmp_path / "small.gguf"))
    # live: A0, F1 (in a layer with A0), A2, A3 + F3
    names = {"blk.0.attn_q": "blk.0.attn_q", "blk.0.attn_output": "blk.0.attn_output", "blk.0.ffn_up": "blk.1.ffn_up"}
    for name, source in names.items():
        assert np.array_equal(new[f"{name}.weight"].data, old[f"{source}.weight"].data)
    for name, source, divisor in (
        ("blk.0.ffn_down", "blk.1.ffn_down", 1.2 * 1.3),
        ("blk.1.attn_output", "blk.2.attn_output", 1.2 * 1.3),
        ("blk.2.attn_output", "blk.3.attn_output", 1.2 * 1.3 * 0.8),
    ):
        found, was = new[f"{name}.weight"], old[f"{source}.weight"]
        blocks = [tensor.data.reshape(-1, 34) for tensor in (found, was)]
        assert np.array_equal(blocks[0][:, 2:], blocks[1][:, 2:])
        wanted = dequantize(was.data, was.tensor_type) / divisor
        assert np.allclose(dequantize(found.data, found.tensor_type), wanted, rtol=2**-10, atol=0)


def test_tokenizer_and_other_fields_go_along(tmp_path):
    folder = write_family("llama", tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.backend_tokenizer.pre_tokenizer.add_prefix_space = False
    export = Export(
        FixedPlan(num_layers=2, plan=EMPTY_PLAN), Checkpoint(folder, read_architecture(folder)), tokenizer=tokenizer
    )
    export_to("gguf", export, tmp_path / "whole.gguf")
    again = Export(FixedPlan(num_layers=2, plan=SkipPlan(ffn={1})), export.source, gguf_file=tmp_path / "whole.gguf")
    export_to("gguf", again, tmp_path / "small.gguf")
    first, second = (read_file(tmp_path / name) for name in ("whole.gguf", "small.gguf"))
    kept = {key for key in first.fields if key.startswith(("tokenizer.", "general."))}
    assert len(kept) > 10
    assert {key: first.fields[key] for key in kept} == {key: second.fields[key] for key in kept}
    assert second.fields["tokenizer.ggml.pre"].value == "gpt-2"
    assert second.fields["tokenizer.ggml.eot_token_id"].value == tokenizer.convert_tokens_to_ids("<|end_of_text|>")


def test_a_file_is_known_by_the_weights_that_transformers_loads_of_it(tmp_path):
    for name, options in (("tied", {"tie_word_embeddings": True}), ("biased", {"attention_bias": True})):
        random_model("llama", **options).save_pretrained(tmp_path / name)
        config = read_architecture(tmp_path / name)
        export = Export(FixedPlan(num_layers=4, plan=EMPTY_PLAN), Checkpoint(tmp_path / name, config))
        file = tmp_path / f"{name}.gguf"
        export_to("gguf", export, file)
        assert gguf_identity(file, config)["weights_fingerprint"] == export.source.identity["weights_fingerprint"]


def test_the_command_writes_a_file_of_a_folder_and_of_a_file(tmp_path, capsys):
    folder = write_family("vicuna", tmp_path / "vicuna")
    for file in folder.glob("pytorch_model*"):
        file.unlink()
    LlamaForCausalLM(read_architecture(folder)).save_pretrained(folder)
    plan = str(SkipPlan(attention=frozenset({1})).save(tmp_path / "plan.json"))
    whole, small = tmp_path / "vicuna.gguf", tmp_path / "again.gguf"
    nothing = str(EMPTY_PLAN.save(tmp_path / "nothing.json"))
    to = ["--to", "gguf", "--output"]
    assert main(["export", nothing, *to, str(whole), "--model", str(folder), "--weights", "f16"]) == 0
    assert main(["export", plan, *to, str(small), "--model", str(whole)]) == 0
    assert "1 sublayers left out; in" in capsys.readouterr().out
    found = read_file(small)
    assert (found.architecture, found.fields["tokenizer.ggml.model"].value) == ("deci", "llama")
    assert found.number("rope.scaling.factor") == 4.0
    assert main(["export", plan, *to, str(tmp_path / "c.gguf"), "--model", str(folder), "--no-tokenizer"]) == 0
    assert read_file(tmp_path / "c.gguf").fields["tokenizer.ggml.model"].value == "none"
    capsys.readouterr()
    assert main(["export", plan, *to, str(tmp_path / "d.gguf"), "--model", str(whole), "--weights", "f16"]) == 2
    assert "keep their types; f16 takes a checkpoint folder" in capsys.readouterr().err
    assert main(["export", plan, *to, str(tmp_path / "e.gguf"), "--model", str(whole), "--no-tokenizer"]) == 2
    assert "--no-tokenizer is for folders" in capsys.readouterr().err
    assert not (tmp_path / "e.gguf").exists()
    assert main(["export", plan, "--to", "hf", "--output", "x", "--model", str(folder), "--weights", "f16"]) == 2
    assert "--weights and --no-tokenizer apply to GGUF files only, not to hf" in capsys.readouterr().err


def test_internlms_and_vicunas_folders_are_llamas(tmp_path):
    from adaskip.models.internlm import InternLMTokenizer
    from tests.internlm_reference import random_weights, train_tokenizer, write_checkpoint

    folder = write_checkpoint(tmp_path / "internlm", random_weights(), layout="safetensors")
    train_tokenizer(folder / "tokenizer.model", remove_extra_whitespaces=False, normalization_rule_name="identity")
    config = read_architecture(folder)
    tokenizer = InternLMTokenizer.from_pretrained(folder)
    plan = SkipPlan.of_sublayers({Sublayer("attention", 1): 1.1})
    layers = config.num_hidden_layers
    export = Export(FixedPlan(num_layers=layers, plan=plan), Checkpoint(folder, config), tokenizer=tokenizer)
    export_to("gguf", export, tmp_path / "internlm.gguf")
    decoder = GGUFDecoder(tmp_path / "internlm.gguf")
    model = gguf_export.load_source(export.source)
    with torch.no_grad(), skipping(model, export.strategy):
        wanted = model(input_ids=TOKENS[None, :14]).logits[0]
    assert "blk.0.attn_output.bias" in decoder.weights
    assert torch.allclose(decoder.logits(TOKENS[:14]).float(), wanted, atol=1e-4)


def in_float64(source: Checkpoint) -> Checkpoint:
    LlamaForCausalLM.from_pretrained(source.folder).double().save_pretrained(source.folder)
    return source


REFUSED = {
    "a plan that changes": (
        lambda export: Export(
            AdaSkip(num_layers=4, budget=Budget(sublayers=1), profile=profile_of([0.9] * 4, [0.8] * 4), phase="decode"),
            export.source,
        ),
        "changes its plan",
    ),
    "another number of layers": (
        lambda export: Export(FixedPlan(num_layers=3, plan=EMPTY_PLAN), export.source),
        "has 4 layers, the plan is for 3",
    ),
    "float64": (
        lambda export: Export(export.strategy, in_float64(export.source)),
        r"weights in torch\.float64; allowed: torch\.float32, torch\.float16, torch\.bfloat16",
    ),
    "a GGUF file that is to be requantised": (
        lambda export: Export(export.strategy, export.source, gguf_file=Path("a.gguf"), weights_type="f16"),
        "keep their types; f16 takes a checkpoint folder",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_exported_is_refused_before_anything_is_written(name, tmp_path):
    change, message = REFUSED[name]
    export = change(export_of(tmp_path / "model"))
    with pytest.raises(ValueError, match=message):
        export_to("gguf", export, tmp_path / "out" / "small.gguf")
    assert listed(tmp_path / "out") == []


def test_the_name_must_be_a_new_one_of_a_gguf_file(tmp_path):
    export = export_of(tmp_path / "model")
    with pytest.raises(ValueError, match=r"one file; allowed: names in .gguf"):
        export_to("gguf", export, tmp_path / "out")
    (tmp_path / "old.gguf").write_text("old")
    with pytest.raises(ValueError, match="exists; give the name of a new file"):
        export_to("gguf", export, tmp_path / "old.gguf")
    assert (tmp_path / "old.gguf").read_text() == "old"


@pytest.mark.parametrize("damage", ["cut", "other", "header"])
def test_a_damaged_gguf_file_is_one_line(damage, tmp_path):
    whole = whole_file(tmp_path)
    content = whole.read_bytes()
    whole.write_bytes(
        {"cut": content[: len(content) // 2], "other": b"PK" + content[2:], "header": content[:40]}[damage]
    )
    export = Export(FixedPlan(num_layers=4, plan=PLAN), Checkpoint(tmp_path, CONFIG), gguf_file=whole)
    with pytest.raises(ExportError, match="is damaged or no GGUF file") as caught:
        export_to("gguf", export, tmp_path / "small.gguf")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "small.gguf").exists()


def test_a_file_that_is_not_what_was_meant_is_noticed(tmp_path):
    whole = whole_file(tmp_path)
    export = Export(FixedPlan(num_layers=4, plan=PLAN), Checkpoint(tmp_path, CONFIG), gguf_file=whole)
    export_to("gguf", export, tmp_path / "small.gguf")
    meant = smaller(read_file(whole), export.folded)
    content = bytearray((tmp_path / "small.gguf").read_bytes())
    content[-40] ^= 0x41
    (tmp_path / "small.gguf").write_bytes(content)
    with pytest.raises(ExportError, match="errs by"):
        compare_file(meant, tmp_path / "small.gguf")
    with pytest.raises(ExportError, match="its fields are not those"):
        compare_file(read_file(whole), tmp_path / "small.gguf")


def test_scales_that_half_precision_cannot_hold_leave_no_file(tmp_path):
    whole = whole_file(tmp_path, "q8_0")
    for factor, message in ((1e7, "scales are too small"), (1e-8, "too large for their format")):
        plan = SkipPlan.of_sublayers({Sublayer("attention", 1): factor})
        export = Export(FixedPlan(num_layers=4, plan=plan), Checkpoint(tmp_path, CONFIG), gguf_file=whole)
        with pytest.raises(ExportError, match=message):
            export_to("gguf", export, tmp_path / "out" / "small.gguf")
        assert listed(tmp_path / "out") == []


@pytest.mark.parametrize("missing_bytes", [20_000, 100])
def test_a_full_disk_is_one_line_and_leaves_nothing(missing_bytes, tmp_path):
    """The limit on the size of a file stands for the end of the disk, which may come with the last tensor."""
    export = export_of(tmp_path / "model", EMPTY_PLAN, weights_type="q8_0")
    export_to("gguf", export, tmp_path / "whole.gguf", verify=False)
    limit = (tmp_path / "whole.gguf").stat().st_size - missing_bytes
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"small\.gguf cannot be written: File too large"):
            export_to("gguf", export, tmp_path / "out" / "small.gguf", verify=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert listed(tmp_path / "out") == []


def test_a_killed_export_leaves_no_file_of_that_name_and_the_next_one_cleans_up(tmp_path, monkeypatch):
    export = export_of(tmp_path / "model")
    target = tmp_path / "out" / "small.gguf"
    write = gguf_export.write

    def half(export, path):
        write(export, path)
        time.sleep(60)

    monkeypatch.setattr(gguf_export, "write", half)
    child = os.fork()
    if child == 0:
        export_to("gguf", export, target)
        os._exit(0)
    deadline = time.monotonic() + 30
    while not any(path.stat().st_size > 40_000 for path in tmp_path.glob("out/.small.gguf.*.tmp/small.gguf")):
        assert time.monotonic() < deadline, "nothing is written"
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert not target.exists()
    monkeypatch.setattr(gguf_export, "write", write)
    export_to("gguf", export, target)
    assert listed(tmp_path / "out") == ["small.gguf"]
