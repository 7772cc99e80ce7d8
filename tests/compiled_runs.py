"""Generations on a static cache, eager and compiled, and a strategy of each kind to run them with."""

from __future__ import annotations

import torch
from transformers import CompileConfig

from adaskip.core.plan import Affine, Budget, SkipPlan, Sublayer
from adaskip.core.token_ids import left_padded
from adaskip.strategies import AdaSkip, EarlyExit, FixedPlan, SkipDecode, UnifiedSkipping
from tests.families import WIDTH
from tests.profiles import profile_of

NEW_TOKENS = 9


class CountedGraphs(list):
    """The graphs that were compiled, and a `CompileConfig` that runs them as they were traced, on any device."""

    def config(self, **options) -> CompileConfig:
        def backend(graph, example_inputs):
            self.append(graph)
            return graph.forward

        config = CompileConfig(**{"backend": backend, "fullgraph": True, "mode": None, **options})
        config._compile_all_devices = True
        return config


def run(model, prompts, *, compile_config=None, **options):
    ids, mask = left_padded(prompts, 0, model.device)
    settings = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False, "pad_token_id": 0}
    settings |= {"cache_implementation": "static", "disable_compile": compile_config is None}
    return model.generate(
        input_ids=ids,
        attention_mask=mask,
        compile_config=compile_config,
        return_dict_in_generate=True,
        output_logits=True,
        **settings | options,
    )


def assert_same(ours, expected, tolerance=1e-5):
    assert torch.equal(ours.sequences, expected.sequences)
    assert (torch.stack(ours.logits) - torch.stack(expected.logits)).abs().max() < tolerance


def affine(slope: float) -> Affine:
    return Affine(scale=[1.0 + slope * i for i in range(WIDTH)], shift=[slope * (8 - i) for i in range(WIDTH)])


def fixed(*sublayers, phase, scale) -> FixedPlan:
    plan = SkipPlan.of_sublayers({Sublayer(kind, layer): scale for kind, layer in sublayers})
    return FixedPlan(num_layers=4, phase=phase, plan=plan)


def early_exit(phase, factor):
    return EarlyExit(num_layers=4, budget=Budget(layers=1), phase=phase)


def unified(phase, factor):
    return UnifiedSkipping(num_layers=4, budget=Budget(layers=2), phase=phase)


def skip_decode(phase, factor):
    return SkipDecode(num_layers=4, budget=Budget(layers=3), phase=phase, max_decode_steps=6)


def ada_skip(phase, factor):
    """Attention 1 is skipped and the FFNs of a random model lie on both sides of its similarity."""
    profile = profile_of(attention=[-0.9, 0.8, -0.9, -0.9], ffn=[-1.0] * 4, scale=factor)
    return AdaSkip(num_layers=4, budget=Budget(sublayers=1), phase=phase, profile=profile, learning_window=3)


def scaled(phase, factor):
    return fixed(("attention", 0), ("ffn", 1), ("attention", 2), phase=phase, scale=factor)


def affine_plan(phase, factor):
    return fixed(("ffn", 0), ("attention", 2), phase=phase, scale=affine(0.02 * factor))
