"""Plans to export, the export of a model in memory, and its greedy tokens."""

from __future__ import annotations

from adaskip.core.plan import SkipPlan, Sublayer
from adaskip.engines.checkpoint import save_in_memory
from adaskip.engines.registry import Export
from adaskip.strategies import FixedPlan

PLANS = {
    "attention": SkipPlan.of_sublayers({Sublayer("attention", 1): 1.3, Sublayer("attention", 2): 0.9}),
    "ffn": SkipPlan.of_sublayers({Sublayer("ffn", 0): 2.5, Sublayer("ffn", 3): 0.8}),
    "both": SkipPlan.of_sublayers({Sublayer("attention", 2): 1.1, Sublayer("ffn", 1): 1.2, Sublayer("ffn", 2): 0.9}),
    "layer 0": SkipPlan.of_sublayers({Sublayer("attention", 0): 1.4}),
    "no scales": SkipPlan(frozenset({0, 3}), frozenset({1})),
    "whole layers": SkipPlan.of_layers([0, 2]),
    "whole layers, scaled": SkipPlan.of_sublayers({Sublayer("attention", 1): 1.3, Sublayer("ffn", 1): 1.1}),
}


def export_of(model, plan, folder, phase="e2e") -> Export:
    source = save_in_memory(model, None, folder)
    return Export(FixedPlan(num_layers=model.config.num_hidden_layers, plan=plan, phase=phase), source)


def tokens(model, prompt):
    options = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    return model.generate(prompt, **options)[0].tolist()
