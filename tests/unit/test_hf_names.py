"""Each private name of torch, accelerate and transformers' models does what the library takes it to do."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from adaskip.core import hf
from adaskip.core.kv_cache import SkippedLayer
from tests.families import random_model


def tiny(family: str = "llama", num_layers: int = 1) -> Any:
    return random_model(family, num_layers=num_layers)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny(num_layers=2)


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


def test_decoders_with_windows_import_the_function_of_their_masks():
    for family, slides in (("llama", False), ("olmo2", False), ("mistral", True), ("qwen2", True), ("gemma3", True)):
        module = sys.modules[type(tiny(family).model).__module__]
        assert hasattr(module, hf.SLIDING_MASK) == slides, family
