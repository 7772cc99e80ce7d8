"""The structure probe is unobserved: no hook of the user's fires, and nothing that it does outlives it."""

from __future__ import annotations

import functools
import random

import numpy as np
import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from adaskip.core.blocks import UnsupportedModelError, find_structure, probe_layers
from adaskip.core.quiet import computes, quiet, without_user_hooks
from adaskip.models.rope import fix_dynamic_rope
from tests.families import random_model, random_prompts


class Observer:
    """Hooks of every kind that a user may register."""

    def __init__(self):
        self.seen = []

    def method(self, *args):
        self.seen.append("method")

    def __call__(self, *args):
        self.seen.append("object")


def kinds_of_hooks(observer):
    return [observer.method, observer, lambda *args: observer.seen.append("lambda"),
            functools.partial(observer.method, None), torch.no_grad()(observer.method)]  # fmt: skip


PLACES = ["", "layers.0", "layers.3", "layers.1.self_attn", "layers.2.mlp", "embed_tokens", "norm"]


@pytest.mark.parametrize("where", PLACES)
def test_no_hook_of_the_user_fires_and_all_fire_afterwards(where):
    model, observer = random_model("llama"), Observer()
    module = model.model.get_submodule(where)
    for hook in kinds_of_hooks(observer):
        module.register_forward_hook(hook)
        module.register_forward_hook(lambda *args, hook=hook: hook(), with_kwargs=True)
        module.register_forward_pre_hook(hook)
    before = [list(module._forward_hooks.items()), list(module._forward_pre_hooks.items())]
    find_structure(model)
    assert observer.seen == []
    assert [list(module._forward_hooks.items()), list(module._forward_pre_hooks.items())] == before
    model(random_prompts([4])[0][None])
    assert len(observer.seen) == 15


def test_no_global_hook_of_the_user_fires():
    model, observer = random_model("llama"), Observer()
    handles = [register_module_forward_hook(observer.method), register_module_forward_pre_hook(observer.method)]
    try:
        find_structure(model)
        assert observer.seen == []
        model(random_prompts([4])[0][None])
        assert len(observer.seen) > 20
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_hooks_come_back_after_a_failure_and_their_handles_still_remove_them(error):
    model, observer = random_model("llama"), Observer()
    layer = model.model.layers[0]
    handle = layer.register_forward_hook(observer.method)

    def fails(*args, **kwargs):
        raise error

    model.model.layers[2].mlp.forward = fails
    with pytest.raises(UnsupportedModelError if error is RuntimeError else error):
        find_structure(model)
    assert list(layer._forward_hooks.values()) == [observer.method]
    handle.remove()
    assert not layer._forward_hooks


def test_hooks_keep_their_order():
    module, order = nn.Linear(2, 2), []
    module.register_forward_hook(lambda *args: order.append(0))
    module.register_forward_hook(functools.partial(torch.nn.functional.dropout, training=False))
    module.register_forward_hook(lambda *args: order.append(1))
    module.register_forward_hook(lambda *args: order.append(2), prepend=True)
    before = list(module._forward_hooks.items())
    with without_user_hooks(module):
        assert len(module._forward_hooks) == 1
    assert list(module._forward_hooks.items()) == before


def test_hooks_of_the_libraries_that_compute_stay():
    model = random_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    assert fix_dynamic_rope(model)
    recall, *_ = model.model._forward_pre_hooks.values()
    assert computes(recall)
    assert computes(torch.nn.functional.relu)
    assert computes(functools.partial(torch.nn.functional.relu, inplace=False))
    assert not computes(Observer())
    assert not computes(Observer().method)
    assert not computes(print)
    with quiet(model):
        assert list(model.model._forward_pre_hooks.values()) == [recall]
    assert find_structure(model).name == "pre-norm"


def test_layers_under_the_hooks_of_accelerate_are_proved():
    model = random_model("llama")
    for layer in model.model.layers:
        add_hook_to_module(layer, AlignDevicesHook(execution_device=torch.device("cpu"), io_same_device=True))
    assert find_structure(model).name == "pre-norm"


def test_random_numbers_go_on_as_if_nothing_had_run():
    model = random_model("llama")

    def noisy(*args, stock=model.model.norm.forward):
        random.random(), np.random.rand(), torch.rand(3)
        return stock(*args)

    model.model.norm.forward = noisy
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    expected = random.random(), np.random.rand(), torch.rand(()).item()
    for seed in (random.seed, np.random.seed, torch.manual_seed):
        seed(3)
    find_structure(model)
    assert (random.random(), np.random.rand(), torch.rand(()).item()) == expected


def test_what_a_model_notes_on_itself_is_forgotten():
    model = random_model("llama", rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4})
    model(torch.randint(3, 60, (1, 200)))  # beyond 128 positions: the rotary base is raised and stays so
    rope = model.model.rotary_emb
    raised, limit = rope.inv_freq, rope.max_seq_len_cached
    assert limit == 200
    attention = model.model.layers[1].self_attn

    def noting(*args, stock=attention.forward, **kwargs):
        attention.last = args
        return stock(*args, **kwargs)

    attention.forward = noting
    find_structure(model)
    assert not hasattr(attention, "last")
    assert rope.inv_freq is raised
    assert rope.max_seq_len_cached == 200


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast_of_the_caller_changes_no_proof(dtype):
    model = random_model("llama").to(dtype)
    seen = []
    model.model.norm.forward = lambda h, stock=model.model.norm.forward: (
        seen.append(torch.is_autocast_enabled("cpu")) or stock(h)
    )
    proved = probe_layers(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert probe_layers(model) == proved
        assert torch.is_autocast_enabled("cpu")
    assert not any(seen)
    assert proved.stream_dtypes == (dtype,) * 4


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.enable_grad, torch.no_grad])
def test_the_gradient_mode_of_the_caller_stays(mode):
    model = random_model("llama")
    with mode():
        before = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        find_structure(model)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == before
    assert all(parameter.grad is None for parameter in model.parameters())


def test_default_dtype_and_device_of_the_caller_are_no_matter():
    model = random_model("llama")
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            assert probe_layers(model).stream_dtypes == (torch.float32,) * 4
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.slow
def test_compiled_layers_are_proved_without_compiling():
    model, compiled = random_model("llama"), []

    def backend(graph, inputs):
        compiled.append(graph)
        return graph

    for layer in model.model.layers:
        layer.compile(backend=backend)
    assert find_structure(model).name == "pre-norm"
    assert not compiled
    model(random_prompts([4])[0][None])
    assert compiled
