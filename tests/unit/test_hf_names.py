"""Each private name of torch, accelerate and transformers is there and does what the library takes it to do.

A release that renames or changes one fails here, in the name's own test, before anything is silently wrong. And no such
name stands anywhere but in `adaskip/core/hf.py`.
"""

from __future__ import annotations

import ast
import copy
import importlib.util
import inspect
import re
import sys
from functools import cache
from itertools import chain
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import CompileConfig, DynamicCache, GenerationConfig, GenerationMixin, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from adaskip.common.optional import UnsupportedReleaseError
from adaskip.core import hf
from adaskip.core.decoding import OwnGenerationConfig
from adaskip.core.kv_cache import SkippedLayer
from tests.families import random_model, random_prompts

PACKAGE = Path(__file__).parents[2] / "adaskip"
FOREIGN = ("torch", "transformers", "accelerate")


def tiny(family: str = "llama", num_layers: int = 1) -> Any:
    return random_model(family, num_layers=num_layers)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(num_layers=2)


def parameters_of(owner, name: str) -> list[str]:
    return list(inspect.signature(getattr(owner, name)).parameters)


# torch


def test_torch_compile_keeps_the_module_it_wraps():
    module = nn.Linear(2, 2)
    wrapper = torch.compile(module)
    assert hf.inside_compiled(wrapper) is module
    assert hf.inside_compiled(module) is None
    assert set(wrapper.state_dict()) == {f"{hf.ORIGINAL_MODULE}.{name}" for name in module.state_dict()}


def test_compile_in_place_leaves_a_graph_in_the_module():
    module = nn.Linear(2, 2)
    assert hasattr(module, hf.COMPILED_CALL)
    assert not hf.is_compiled_in_place(module)
    module.compile()
    assert hf.is_compiled_in_place(module)


def test_the_compiler_keeps_the_code_that_it_compiled(monkeypatch):
    def unguarded(*version: int) -> bool:
        with monkeypatch.context() as patched:
            patched.setattr("sys.version_info", version)
            return hf.has_unguarded_graphs()

    torch.compiler.reset()
    assert not unguarded(3, 13, 0)
    torch.compile(lambda x: x + 1, backend="eager")(torch.zeros(1))
    assert unguarded(3, 13, 0)
    assert not unguarded(3, 13, 1)


def test_a_module_holds_its_own_parameters_buffers_children_and_attributes_in_dictionaries():
    module: Any = nn.Module()
    module.weight, module.absent = nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))
    module.register_parameter("none", None)
    module.register_buffer("kept", torch.ones(1))
    module.register_buffer("dropped", torch.ones(1), persistent=False)
    module.child, module.word = nn.Linear(1, 1), "word"
    assert set(hf.own_parameters(module)) == {"weight", "absent", "none"}
    assert set(hf.own_buffers(module)) == {"kept", "dropped"}
    assert hf.non_persistent_buffers(module) == {"dropped"}
    attributes, buffers, children = hf.holders(module)
    assert (attributes["word"], list(buffers), list(children)) == ("word", ["kept", "dropped"], ["child"])
    del hf.own_parameters(module)["absent"], buffers["kept"], children["child"]  # the dictionaries themselves
    assert not any(hasattr(module, name) for name in ("absent", "kept", "child"))


def test_hooks_are_in_the_dictionaries_by_the_ids_of_their_handles():
    module, called = nn.Linear(1, 1), []
    handles = [
        nn.modules.module.register_module_forward_pre_hook(lambda *_: called.append("global before")),
        nn.modules.module.register_module_forward_hook(lambda *_: called.append("global after")),
        module.register_forward_pre_hook(lambda *_: called.append("before")),
        module.register_forward_hook(lambda *_: called.append("after")),
    ]
    try:
        found = list(hf.hook_dictionaries([module]))
        assert [handle.id in hooks for handle, hooks in zip(handles, found, strict=True)] == [True] * 4
        module(torch.ones(1))
        assert called == ["global before", "before", "global after", "after"]
        for handle, hooks in zip(handles, found, strict=True):
            del hooks[handle.id]
        called.clear()
        module(torch.ones(1))
        assert called == []
    finally:
        for handle in handles:
            handle.remove()


def test_what_a_module_saves_besides_is_told_by_its_class():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"packed": torch.ones(1)}

    class Own(nn.Linear):
        def _save_to_state_dict(self, destination, prefix, keep_vars):
            super()._save_to_state_dict(destination, prefix, keep_vars)
            destination[prefix + "packed"] = torch.ones(1)

    assert [hf.saves_more(cls(1, 1)) for cls in (nn.Linear, Extra, Own)] == [False, True, True]
    assert set(hf.saved_state(nn.Linear(1, 1))) == {"weight", "bias"}
    assert set(hf.saved_state(Extra(1, 1))) == {"weight", "bias", "_extra_state"}
    assert set(hf.saved_state(Own(1, 1))) == {"weight", "bias", "packed"}


class _Loud(torch.Tensor):
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        raise AssertionError("the subclass was asked")


def test_inside_without_torch_function_subclasses_are_plain():
    tensor = torch.ones(2).as_subclass(_Loud)
    with pytest.raises(AssertionError, match="was asked"):
        tensor.mul(2)
    with hf.without_torch_function():
        assert tensor.mul(2).as_subclass(torch.Tensor).tolist() == [2.0, 2.0]


def test_a_wrapper_subclass_is_one_that_flattens():
    class Wrapper(torch.Tensor):
        def __tensor_flatten__(self):
            return [], None

        @staticmethod
        def __tensor_unflatten__(inner, metadata, outer_size, outer_stride):
            raise NotImplementedError

    assert hf.is_traceable_wrapper_subclass(torch.ones(1).as_subclass(Wrapper))
    assert not hf.is_traceable_wrapper_subclass(torch.ones(1))


def test_a_dispatch_mode_sees_every_operator():
    class Mode(hf.TorchDispatchMode):
        seen = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen += 1
            return func(*args, **(kwargs or {}))

    with Mode() as mode:
        torch.ones(2).mul(2)
    assert mode.seen == 2


def test_a_tensor_of_fixed_address_is_marked_for_the_compiler():
    tensor = torch.ones(1)
    before = set(vars(tensor))
    hf.keep_address(tensor)
    assert "_dynamo_static_input_type" in set(vars(tensor)) - before
    assert hf.is_compiler_loaded()


# accelerate


def test_accelerate_leaves_its_hook_and_the_stock_forward():
    module = nn.Linear(2, 2)
    assert hf.device_hooks(module) == ()
    assert hf.forward_name(module) == "forward"
    stock = module.forward
    hook = AlignDevicesHook(execution_device="cpu")
    add_hook_to_module(module, hook)
    assert hf.device_hooks(module) == (hook,)
    assert getattr(module, hf.forward_name(module)) == stock
    assert hf.forward_name(module) == hf.STOCK_FORWARD
    assert {"execution_device", "weights_map"} <= vars(hook).keys()
    add_hook_to_module(module, other := ModelHook(), append=True)
    assert isinstance(getattr(module, hf.DEVICE_HOOK), SequentialHook)
    assert hf.device_hooks(module) == (hook, other)
    remove_hook_from_module(module)
    assert (hf.device_hooks(module), hf.forward_name(module)) == ((), "forward")


# transformers: models and caches


def test_a_model_tells_its_attention_backend():
    assert hf.attn_implementation(tiny()) == "sdpa"
    assert hf.attn_implementation(tiny("gemma2")) == "eager"


def test_a_cache_without_a_config_grows_by_the_layer_it_replicates(model):
    cache = DynamicCache()
    assert type(hf.new_cache_layer(cache)) is DynamicLayer
    assert cache.layers == []
    assert hf.new_cache_layer(DynamicCache(config=model.config)) is None
    assert hf.new_cache_layer(StaticCache(config=model.config, max_cache_len=8)) is None


def test_a_recording_cache_can_take_back_what_left_the_window():
    config = tiny("mistral").config
    cache = DynamicCache(config=config)
    (layer,) = cache.layers
    assert type(layer) is DynamicSlidingWindowLayer
    assert layer.sliding_window == 5
    tokens = torch.arange(12.0).view(1, 1, 12, 1)
    cache.update(tokens[:, :, :4], tokens[:, :, :4], 0)
    hf.keep_what_leaves_the_window(cache)
    cache.update(tokens[:, :, 4:], tokens[:, :, 4:], 0)
    cache.crop(-7)
    assert cache.get_seq_length() == 5
    assert layer.keys is not None
    assert layer.keys.flatten().tolist()[-4:] == [1.0, 2.0, 3.0, 4.0]
    assert layer.record_past
    hf.stop_keeping(cache)
    assert not layer.record_past


def test_what_stands_in_for_a_cache_layer_answers_all_that_one_can_be_asked():
    asked = {name for name, value in vars(CacheLayerMixin).items() if callable(value) and not name.startswith("__")}
    asked -= {"get_max_cache_shape"}  # before 5.23; asks get_max_length
    assert asked <= vars(SkippedLayer).keys() | {"__init__"}
    assert CacheLayerMixin.__abstractmethods__ <= vars(SkippedLayer).keys()


def test_caches_and_their_layers_have_what_the_library_reads(model):
    cache = DynamicCache(config=model.config)
    assert isinstance(cache, Cache)
    assert cache.offloading is False
    layers: list[Any] = [*cache.layers, *StaticCache(config=model.config, max_cache_len=8).layers]
    for layer in layers:
        assert isinstance(layer.is_sliding, bool)
        assert isinstance(layer.is_compileable, bool)
        assert layer.is_initialized is False
        assert layer.keys is layer.values is None


# transformers: generate


def test_generate_takes_its_steps_by_the_methods_that_are_replaced():
    given = {
        hf.NEXT_STEP: ["input_ids", "next_sequence_length", hf.CACHE, "is_first_iteration"],
        hf.COMPILED_STEPS: ["compile_config"],
        hf.CANDIDATES: ["generation_config", "assistant_model"],
        hf.STOPPING: ["generation_config", "stopping_criteria", "tokenizer"],
        hf.HEALING: ["input_ids", "tokenizer"],
    }
    for name, needed in given.items():
        assert set(needed) <= set(parameters_of(tiny(), name)), name


def test_a_release_that_passes_the_cache_in_another_argument_is_refused(monkeypatch):
    monkeypatch.setattr(GenerationMixin, hf.NEXT_STEP, lambda self, input_ids, memory=None: None)
    spec = importlib.util.spec_from_file_location("another_hf", hf.__file__)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(UnsupportedReleaseError, match=r"passes the KV cache in another argument.*works with"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_the_cache_may_be_given_by_its_old_name():
    model, cache = tiny(), DynamicCache()
    ids = torch.tensor([[3, 4]])
    model(ids, **{hf.OLD_CACHE: cache}, use_cache=True)
    assert cache.get_seq_length() == 2, "models of this release still accept it"
    assert hf.with_cache_name({hf.OLD_CACHE: cache, "use_cache": True}) == {hf.CACHE: cache, "use_cache": True}
    assert hf.with_cache_name({"use_cache": True}) == {"use_cache": True}


def test_generate_reads_a_prompt_by_one_method(monkeypatch):
    model = tiny()
    calls = noted(model, monkeypatch, hf.PREFILL)
    (ids,) = random_prompts([5])
    model.generate(ids[None], max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert len(calls) == 1


def test_decoders_with_windows_import_the_function_of_their_masks():
    for family, slides in (("llama", False), ("olmo2", False), ("mistral", True), ("qwen2", True), ("gemma3", True)):
        module = sys.modules[type(tiny(family).model).__module__]
        assert hasattr(module, hf.SLIDING_MASK) == slides, family


def test_some_method_serves_many_requests_from_one_cache(model):
    assert any(hasattr(model, name) for name in hf.CONTINUOUS_BATCHING)


def noted(model, monkeypatch, name: str) -> list[dict]:
    """The keywords of each call of a method of the model."""
    stock, calls = getattr(model, name), []

    def note(*args, **kwargs):
        calls.append(dict(inspect.signature(stock).bind(*args, **kwargs).arguments))
        return stock(*args, **kwargs)

    monkeypatch.setitem(model.__dict__, name, note)
    return calls


def test_generate_prepares_each_step_and_says_which_reads_the_prompt(monkeypatch):
    model = tiny()
    calls = noted(model, monkeypatch, hf.NEXT_STEP)
    (ids,) = random_prompts([5])
    model.generate(ids[None], max_new_tokens=3, do_sample=False, eos_token_id=None)
    reads = [call.get("is_first_iteration") or call.get("next_sequence_length") is None for call in calls]
    assert reads == [True, False, False]
    assert all(isinstance(call[hf.CACHE], Cache) for call in calls)


def test_assisted_decoding_alone_begins_with_its_candidates(monkeypatch):
    model = tiny()
    calls = noted(model, monkeypatch, hf.CANDIDATES)
    (ids,) = random_prompts([5])
    model.generate(ids[None], max_new_tokens=3, do_sample=False)
    assert calls == []
    model.generate(ids[None], max_new_tokens=3, do_sample=False, prompt_lookup_num_tokens=2)
    assert len(calls) == 1
    assert isinstance(calls[0]["generation_config"], GenerationConfig)


def test_a_static_cache_is_decoded_by_the_compiled_call_on_any_device_if_asked(monkeypatch):
    model, calls = tiny(), []
    monkeypatch.setitem(model.__dict__, hf.COMPILED_STEPS, lambda config: calls.append(config) or model.__call__)
    (ids,) = random_prompts([5])
    config = CompileConfig()
    options = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": "static", "eos_token_id": None}
    model.generate(ids[None], **options, compile_config=config)
    assert len(calls) == torch.cuda.is_available()
    calls.clear()
    ours = hf.on_any_device(config)
    model.generate(ids[None], **options, compile_config=ours)
    assert calls
    assert ours is not config
    assert not config._compile_all_devices
    assert "_compile_all_devices" not in ours.to_dict()  # torch.compile would not take it


def test_the_prefill_reads_the_whole_prompt_into_the_cache():
    model = tiny()
    assert parameters_of(model, "_prefill")[:3] == ["input_ids", "generation_config", "model_kwargs"]
    (ids,) = random_prompts([5])
    for chunk in (None, 2):
        cache = DynamicCache(config=model.config)
        kwargs = {hf.CACHE: cache, "use_cache": True, "attention_mask": torch.ones(1, 5, dtype=torch.long)}
        config = GenerationConfig(prefill_chunk_size=chunk)
        with torch.no_grad():
            output = hf.prefill(model, ids[None], config, kwargs)
            expected = model(ids[None]).logits[:, -1]
        assert cache.get_seq_length() == 5
        torch.testing.assert_close(output.logits[:, -1], expected)


def test_a_model_that_changes_its_arguments_itself_is_told_by_its_class(model):
    class Own(type(model)):
        def _update_model_kwargs_for_generation(self, outputs, model_kwargs, **kwargs):
            raise AssertionError("called after every token")

    assert not hf.changes_arguments(model)
    own = Own(model.config).eval()
    assert hf.changes_arguments(own)
    (ids,) = random_prompts([5])
    with pytest.raises(AssertionError, match="called after every token"):
        own.generate(ids[None], max_new_tokens=2)


@pytest.mark.parametrize(
    ("options", "pad"), [({"pad_token_id": 5}, 5), ({"pad_token_id": None, "eos_token_id": [7, 8]}, 7)]
)
def test_the_pad_token_of_a_prepared_config_is_the_one_that_generate_appends(model, options, pad):
    found = []

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        found.append(hf.pad_token_of(generation_config))
        return input_ids

    (ids,) = random_prompts([5])
    model.generate(ids[None], max_new_tokens=2, custom_generate=decode, **options)
    assert found == [pad]


def test_stopping_criteria_are_made_with_the_tokenizer_and_tokens_healed_by_it():
    mixin: Any = GenerationMixin
    source = inspect.getsource(inspect.unwrap(mixin.generate))
    assert f"self.{hf.HEALING}(" in source
    assert f"self.{hf.STOPPING}(" in source


def test_a_custom_decoding_method_finds_what_generate_keeps_from_it(model):
    found: list[dict] = []
    streamer = SimpleNamespace(put=lambda value: None, end=lambda: None)

    def decode(model, input_ids, logits_processor, stopping_criteria, generation_config, **kwargs):
        found.append(hf.generate_arguments() or {})
        return input_ids

    (ids,) = random_prompts([5])
    model.generate(ids[None], max_new_tokens=2, custom_generate=decode, streamer=streamer)
    assert found[0].keys() >= hf.GENERATE_LOCALS
    assert found[0]["streamer"] is streamer
    assert found[0]["assistant_model"] is None
    assert hf.generate_arguments() is None


def test_generate_merges_the_models_config_by_the_one_update_that_allows_custom_entries(model):
    assert {"defaults_only", "allow_custom_entries"} <= set(parameters_of(GenerationConfig, "update"))
    sampling = copy.deepcopy(model.generation_config)
    sampling.do_sample, sampling.temperature, sampling.top_k = True, 2.5, 7
    before, model.generation_config = model.generation_config, sampling
    try:
        merged, _ = model._prepare_generation_config(GenerationConfig(max_new_tokens=2))
        ours, _ = model._prepare_generation_config(OwnGenerationConfig(max_new_tokens=2))
    finally:
        model.generation_config = before
    assert (merged.temperature, merged.top_k) == (2.5, 7)
    assert (ours.temperature, ours.top_k) != (2.5, 7)


# Nowhere else


def private(name: str) -> bool:
    return re.fullmatch(r"_[a-zA-Z]\w*", name) is not None


PATHS = list(PACKAGE.rglob("*.py"))


@cache
def tree_of(path: Path) -> ast.AST:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def own_names() -> set[str]:
    """What the package itself defines somewhere."""
    found = set()
    for node in chain.from_iterable(ast.walk(tree_of(path)) for path in PATHS):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
    return found


NOT_FOREIGN = {"_exit", "_id", "_e", "_replace", "_low", "_high"}
"""`os._exit`, a named tuple's `_replace`, LongBench's own names, and ends of our columns' names."""


def names_in(tree: ast.AST) -> set[str]:
    """Private attributes and imports of a module, and texts that are one name, as `getattr` takes them."""
    found = set()
    in_texts = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            found.add(node.attr)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in in_texts:
            found.add(node.value)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in FOREIGN:
            found |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    return {name for name in found if private(name) and not name.startswith("_adaskip")}


@pytest.mark.parametrize("path", [p for p in PATHS if p.name != "hf.py"], ids=lambda p: str(p.relative_to(PACKAGE)))
def test_no_private_name_of_another_library_stands_outside_hf(path):
    assert names_in(tree_of(path)) - own_names() - NOT_FOREIGN == set()


def test_a_private_name_outside_would_be_found():
    code = "from torch._a import _b\nmodel._c\ngetattr(model, '_d')\nf'x{1}_e'\n'a sentence on _f'"
    assert names_in(ast.parse(code)) == {"_a", "_b", "_c", "_d"}
