"""Every private or undocumented name of torch, accelerate and transformers that the library uses.

Private names change without notice, so each is used only here, as a constant or in a small function, and
`tests/unit/test_hf_names*.py` fail if a release renames one or changes its behaviour. All of them exist in the
supported releases, torch 2.11 to 2.13 and transformers 5.17 to 5.24; "since" gives the first release known to have it.
"""

from __future__ import annotations

import copy
import inspect
import sys
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from transformers import CompileConfig, GenerationConfig, GenerationMixin, __version__, modeling_gguf_pytorch_utils
from transformers.cache_utils import Cache
from transformers.utils import logging

from adaskip.common.optional import UnsupportedReleaseError

__all__ = ["TorchDispatchMode", "is_traceable_wrapper_subclass"]  # re-exported; both since torch 2.1 in this module

# torch: modules

ORIGINAL_MODULE = "_orig_mod"
"""The attribute of a `torch.compile` wrapper that holds the module; also a part of its parameters' names.
Since torch 2.0."""
COMPILED_CALL = "_compiled_call_impl"
"""The attribute in which `module.compile()` stores the graph, else None. Since torch 2.1."""


def inside_compiled(model: Any) -> Any:
    """The module inside a `torch.compile` wrapper; None if `model` is not one."""
    return getattr(model, ORIGINAL_MODULE, None)


def is_compiled_in_place(module: nn.Module) -> bool:
    """Whether `module.compile()` was called."""
    return getattr(module, COMPILED_CALL, None) is not None


def has_unguarded_graphs() -> bool:
    """Whether this process has graphs that do not notice a replaced forward: any graph, on Python 3.13.0 alone.

    There the guards of a graph do not see a function that was put into a module's `__dict__`. `input_codes`, the code
    objects that were compiled: since torch 2.0.
    """
    convert = sys.modules.get("torch._dynamo.convert_frame")
    return sys.version_info[:3] == (3, 13, 0) and convert is not None and bool(convert.input_codes.seen)


def own_parameters(module: nn.Module) -> dict[str, Any]:
    """`_parameters`: parameters registered in the module itself, including those that are None."""
    return module._parameters


def own_buffers(module: nn.Module) -> dict[str, Any]:
    """`_buffers`: buffers registered in the module itself, including those that are None."""
    return module._buffers


def holders(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """The dictionaries that hold a module's attributes, buffers and children (`_modules`)."""
    return module.__dict__, module._buffers, module._modules


def non_persistent_buffers(module: nn.Module) -> set[str]:
    """`_non_persistent_buffers_set`: names of buffers that are not saved. Since torch 1.6."""
    return module._non_persistent_buffers_set


def hook_dictionaries(modules: Iterable[nn.Module]) -> Iterator[dict[int, Any]]:
    """The dictionaries (handle id -> hook) of forward hooks and pre-hooks: the global ones, then each module's."""
    yield nn.modules.module._global_forward_pre_hooks
    yield nn.modules.module._global_forward_hooks
    for module in modules:
        yield module._forward_pre_hooks
        yield module._forward_hooks


def saves_more(module: nn.Module) -> bool:
    """Whether the module's class has its own `_save_to_state_dict` or `get_extra_state`."""
    own_save = type(module)._save_to_state_dict is not nn.Module._save_to_state_dict
    return own_save or type(module).get_extra_state is not nn.Module.get_extra_state


def saved_state(module: nn.Module) -> dict[str, Any]:
    """The state-dict entries of the module itself, without its children (`_save_to_state_dict`)."""
    saved: dict[str, Any] = {}
    module._save_to_state_dict(saved, "", keep_vars=False)
    return saved


# torch: tensors and compilation


def without_torch_function() -> AbstractContextManager[Any]:
    """A context in which functions treat tensor subclasses as plain tensors (`torch._C`). Since torch 2.0."""
    return torch._C.DisableTorchFunctionSubclass()


def keep_address(tensor: Tensor) -> None:
    """Tell the compiler that the tensor keeps its address, so that CUDA graphs read it in place. Since torch 2.1."""
    torch._dynamo.mark_static_address(tensor)


def is_compiler_loaded() -> bool:
    """Whether anything may have been compiled in this process: `torch._dynamo` is imported at first use."""
    return "torch._dynamo" in sys.modules


# accelerate: attributes that `dispatch_model` sets on modules

DEVICE_HOOK = "_hf_hook"
"""The hook of a module that computes on another device than the one its weights are stored on; it has an
`execution_device`."""
STOCK_FORWARD = "_old_forward"
"""The module's own forward, which the hook's forward calls."""


def device_hooks(module: nn.Module) -> tuple[Any, ...]:
    """The accelerate hooks of a module, with a `SequentialHook` expanded; empty if accelerate did not dispatch it."""
    hook = getattr(module, DEVICE_HOOK, None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))


def forward_name(module: nn.Module) -> str:
    """The attribute that holds the module's own forward, also if an accelerate hook wraps it."""
    return STOCK_FORWARD if hasattr(module, STOCK_FORWARD) else "forward"


# transformers: models and caches


def attn_implementation(model: Any) -> str:
    """`config._attn_implementation`: the attention backend in use, e.g. sdpa. Since transformers 4.36."""
    return str(model.config._attn_implementation)


def new_cache_layer(cache: Cache) -> Any:
    """A new empty layer for a cache that grows (`layer_class_to_replicate`); None for a cache that does not grow.

    Since transformers 4.56.
    """
    kind: Any = cache.layer_class_to_replicate
    return None if kind is None else kind()


def keep_what_leaves_the_window(cache: Cache) -> None:
    """From now on sliding layers keep the K/V that leave their window, so that tokens can be removed again."""
    cache.activate_past_recording()


def stop_keeping(cache: Cache) -> None:
    """Undo `keep_what_leaves_the_window` (sets `record_past` of the layers that have it)."""
    for layer in cache.layers:
        if hasattr(layer, "record_past"):
            layer.record_past = False  # pyright: ignore[reportAttributeAccessIssue]


SLIDING_MASK = "create_sliding_window_causal_mask"
"""The mask function that every decoder with sliding windows imports into its own module."""


# transformers: GGUF files


@contextmanager
def quiet_gguf_bar() -> Iterator[None]:
    """Inside, `disable_progress_bar` also turns off the bar of GGUF tensors, which the module draws with tqdm itself.

    Since transformers 4.41.
    """
    module: Any = modeling_gguf_pytorch_utils
    stock, module.tqdm = module.tqdm, logging.tqdm
    try:
        yield
    finally:
        module.tqdm = stock


# transformers: generate

NEXT_STEP = "prepare_inputs_for_generation"
"""The model method that `generate` calls before each forward, with the keywords `CACHE`, `is_first_iteration` and
`next_sequence_length` (None if the whole input is read)."""
OLD_CACHE = "past_key_values"
_STEP_ARGUMENTS = inspect.signature(getattr(GenerationMixin, NEXT_STEP)).parameters
CACHE = next((name for name in ("cache", OLD_CACHE) if name in _STEP_ARGUMENTS), "")
"""The name of the KV cache in arguments and outputs of models: `cache` since 5.24, which still accepts the old name."""
if not CACHE:
    raise UnsupportedReleaseError(
        f"transformers {__version__} passes the KV cache in another argument than cache or {OLD_CACHE}; "
        "adaskip works with transformers 5.17 to 5.24"
    )


def with_cache_name(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a model in which the KV cache has its present name."""
    if CACHE == OLD_CACHE or OLD_CACHE not in kwargs:
        return kwargs
    return {CACHE if name == OLD_CACHE else name: value for name, value in kwargs.items()}


KV = ("keys", "values", "_quantized_keys", "_quantized_values")
"""The attributes of a cache's layer that hold K/V; a quantised layer has all, with those not yet quantised in the first
two."""

COMPILED_STEPS = "get_compiled_call"
"""The model method that returns the callable for compiled decode steps of `generate`. Since transformers 4.48."""
PREFILL = "_prefill"
"""The model method with which `generate` reads a prompt, whole or in chunks. Since transformers 5.0."""
CANDIDATES = "_get_candidate_generator"
"""The model method that assisted decoding calls first; no other decoding method calls it."""
STOPPING = "_get_stopping_criteria"
"""The model method that builds the stopping criteria; `stop_strings` needs its argument `tokenizer`."""
HEALING = "heal_tokens"
"""The model method that `generate` calls for `token_healing`; it needs its argument `tokenizer`."""
CONTINUOUS_BATCHING = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")
"""Model methods that serve many requests from one paged cache; not every release has all of them."""
GENERATE_LOCALS = frozenset({"streamer", "assistant_model", "synced_gpus", "generation_config", "kwargs"})
"""Local variables of `generate` that it does not pass on to a custom decoding method."""


def generate_arguments() -> dict[str, Any] | None:
    """Arguments and local variables of the innermost running `GenerationMixin.generate`; None if none is running."""
    mixin: Any = GenerationMixin
    code = inspect.unwrap(mixin.generate).__code__
    frame: FrameType | None = inspect.currentframe()
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return None if frame is None else dict(frame.f_locals)


def prefill(model: Any, input_ids: Tensor, config: GenerationConfig, kwargs: dict[str, Any]) -> Any:
    """`model._prefill`: the forwards over a prompt, in chunks if the config asks for it. Since transformers 5.0."""
    return model._prefill(input_ids, config, kwargs)


def pad_token_of(config: GenerationConfig) -> int:
    """The token that `generate` appends to finished rows (`_pad_token_tensor`, of a prepared config); 0 for none, which
    it has only where all rows end together. Since transformers 4.42."""
    pad: Tensor | None = config._pad_token_tensor  # pyright: ignore[reportAttributeAccessIssue]
    return 0 if pad is None else int(pad)


def changes_arguments(model: Any) -> bool:
    """Whether the model's class overrides `_update_model_kwargs_for_generation`, which runs after every token."""
    mixin: Any = GenerationMixin
    return type(model)._update_model_kwargs_for_generation is not mixin._update_model_kwargs_for_generation


def on_any_device(config: CompileConfig) -> CompileConfig:
    """A copy of `config` with which `generate` compiles on every device (`_compile_all_devices`)."""
    config = copy.copy(config)
    config._compile_all_devices = True  # pyright: ignore[reportAttributeAccessIssue]
    return config
