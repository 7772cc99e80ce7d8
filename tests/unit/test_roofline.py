"""The roofline's counts against hand counts, torch's own counter and naive twins, and what must hold for any sizes."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, DynamicCache

from adaskip.core.blocks import UnsupportedModelError
from adaskip.core.context import skipping
from adaskip.core.plan import EMPTY_PLAN, Budget, SkipPlan
from adaskip.roofline import (
    Ceilings,
    ModelShape,
    Times,
    Work,
    attention_work,
    ceilings,
    ffn_work,
    forward_seconds,
    head_work,
    known_ceilings,
    known_devices,
    kv_bytes_per_token,
    measure_ceilings,
    predict,
    sublayer_seconds,
)
from adaskip.strategies import FixedPlan, SkipDecode
from tests.families import FAMILIES, WINDOW, random_model, random_prompts

DEVICE = Ceilings("unit", matmul_flops=1e12, bandwidth=1e11)


def shape_of(**options) -> ModelShape:
    """A shape small enough to count by hand: 4 heads and 2 key/value heads of 2, FFN of 12, 11 words, 3 layers."""
    sizes = {
        "model_type": "llama",
        "vocab_size": 11,
        "hidden_size": 8,
        "intermediate_size": 12,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    return ModelShape.of(AutoConfig.for_model(**{**sizes, **options}))


SMALL = shape_of()
LLAMA_8B = shape_of(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)


def test_attention_with_grouped_heads_counted_by_hand():
    # q and o 8 x 8, k and v 4 x 8: 192 entries, and the norm's 8. Two rows of 3 tokens that see 3, 4 and 5 positions.
    work = attention_work(SMALL, tokens=3, context=5, batch_size=2)
    projections, scores_and_values = 2 * 192 * 6, 2 * (2 * 2) * 8 * (3 + 4 + 5)
    weights, activations, queries_and_outputs, keys_and_values = 200, 6 * (16 + 12 + 12 + 16), 6 * 16, 2 * 5 * 2 * 4
    moved = 2 * (weights + activations + queries_and_outputs + keys_and_values)
    assert work == Work(projections + scores_and_values, moved)


def test_eager_attention_computes_the_masked_half_and_moves_the_scores():
    fused, eager = (attention_work(SMALL, tokens=5, context=5, attention=kind) for kind in ("fused", "eager"))
    assert eager.flops - fused.flops == 4 * 8 * (25 - 15)
    assert eager.bytes - fused.bytes == 4 * 25 * (8 * 2 + 8)  # 4 heads; 8 passes in bfloat16, 8 bytes of float32
    in_float32 = attention_work(SMALL, tokens=5, context=5, attention="eager", bytes_per_value=4)
    fused_float32 = attention_work(SMALL, tokens=5, context=5, bytes_per_value=4)
    assert in_float32.bytes - fused_float32.bytes == 4 * 25 * 8 * 4


def test_ffn_and_head_counted_by_hand():
    assert ffn_work(SMALL, tokens=3, batch_size=2) == Work(2 * 288 * 6, 2 * (288 + 8 + 6 * (20 + 20 + 20)))
    # embeddings read and written for all 6 tokens, logits for the last of each row
    assert head_work(SMALL, tokens=3, batch_size=2) == Work(2 * 88 * 2, 2 * (2 * 8 * 6 + 88 + 8 + 2 * 19))


def test_a_tied_head_is_stored_once_and_read_all_the_same():
    tied = shape_of(tie_word_embeddings=True)
    assert SMALL.num_parameters - tied.num_parameters == 88
    assert head_work(tied, tokens=3) == head_work(SMALL, tokens=3)


def test_parameters_of_llama_31_8b_are_the_published_number():
    assert LLAMA_8B.num_parameters == 8_030_261_248


def test_of_experts_only_the_visited_ones_are_multiplied_and_read():
    shape = ModelShape.of(
        random_model("mixtral").config
    )  # 4 experts of 3 x 16 x 24 entries, 2 per token; router 4 x 16
    expert, router, norm = 3 * 16 * 24, 64, 16
    one, many = ffn_work(shape, tokens=1), ffn_work(shape, tokens=1000)
    assert one.flops == 2 * (router + 2 * expert)
    assert many.flops == 1000 * one.flops
    activations = (16 + 4) + 2 * ((16 + 48) + (24 + 16))  # gate and up are one matrix
    assert one.bytes == 2 * (router + norm + 2 * expert + activations)
    assert many.bytes == pytest.approx(2 * (router + norm + 4 * expert + 1000 * activations))


@pytest.mark.parametrize(
    ("model_type", "message"),
    [
        ("cohere", "is not one attention and one FFN, one after the other"),
        ("deepseek_v2", "does not say how many experts a token visits"),
        ("minicpm3", "the four projections of"),
        ("gpt2", "has no list of decoder layers"),
    ],
)
def test_models_that_cannot_be_counted_are_refused_in_one_line(model_type, message):
    with pytest.raises(UnsupportedModelError, match=message) as error:
        ModelShape.of(AutoConfig.for_model(model_type))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("family", FAMILIES)
def test_flops_agree_with_torchs_counter_in_prefill_and_decode(family):
    model = random_model(family, num_layers=2)
    model.set_attn_implementation("eager")  # torch counts the whole of a fused causal attention, masked half included
    if family == "mixtral":
        model.set_experts_implementation("eager")  # and nothing of a grouped matmul
    shape, cache = ModelShape.of(model.config), DynamicCache(config=model.config)
    for tokens, context in ((WINDOW + 4, WINDOW + 4), (1, WINDOW + 5)):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            ids = torch.stack(random_prompts([tokens, tokens]))
            model(input_ids=ids, past_key_values=cache, logits_to_keep=1)
        layers = [
            attention_work(shape, tokens=tokens, context=context, batch_size=2, layer=layer, attention="eager")
            + ffn_work(shape, tokens=tokens, batch_size=2, layer=layer)
            for layer in range(2)
        ]
        expected = sum((work.flops for work in layers), head_work(shape, tokens=tokens, batch_size=2).flops)
        # transformers 5.17 multiplies frequencies and positions as matrices
        rope = [sum(ops.values()) for name, ops in counter.get_flop_counts().items() if name.endswith("rotary_emb")]
        assert counter.get_total_flops() - sum(rope) == expected


@given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 14) | st.none())
def test_query_key_pairs_equal_a_naive_count(tokens, before, window):
    sublayer = dataclasses.replace(SMALL.attention[0], window=window)
    shape = dataclasses.replace(SMALL, attention=(sublayer,) * 3)
    context = before + tokens
    pairs = sum(
        key <= query and (window is None or query - key < window)
        for query in range(before, context)
        for key in range(context)
    )
    work = attention_work(shape, tokens=tokens, context=context)
    assert work.flops == 2 * 192 * tokens + 4 * 8 * pairs


SIZES = {"tokens": st.integers(1, 5000), "before": st.integers(0, 50000), "batch_size": st.integers(1, 64)}


@given(**SIZES, kind=st.sampled_from(["attention", "ffn"]), attention=st.sampled_from(["fused", "eager"]))
def test_more_work_never_takes_less_time(tokens, before, batch_size, kind, attention):
    def seconds(tokens: int, context: int, batch_size: int, device: Ceilings = DEVICE) -> float:
        sizes = {"tokens": tokens, "context": context, "batch_size": batch_size, "attention": attention}
        return sublayer_seconds(LLAMA_8B, kind, **sizes, ceilings=device)

    least = seconds(tokens, before + tokens, batch_size)
    assert least > 0
    assert least <= seconds(tokens + 1, before + tokens + 1, batch_size)
    assert least <= seconds(tokens, before + tokens + 1, batch_size)
    assert least <= seconds(tokens, before + tokens, batch_size + 1)
    faster = Ceilings("twice", 2 * DEVICE.matmul_flops, 2 * DEVICE.bandwidth)
    assert seconds(tokens, before + tokens, batch_size, faster) == pytest.approx(least / 2)


LAYERS = st.frozensets(st.integers(0, 31), max_size=31)


@given(LAYERS, LAYERS, st.integers(0, 31), st.integers(1, 40000), st.integers(1, 4))
def test_skipping_one_more_ffn_saves_exactly_its_time(attention, ffn, layer, prompt_tokens, new_tokens):
    def times(ffn: frozenset[int]) -> Times:
        plan = SkipPlan(attention, ffn)
        sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens}
        return predict(LLAMA_8B, prefill_plan=plan, decode_plan=plan, **sizes, ceilings=DEVICE)

    more, less = times(ffn - {layer}), times(ffn | {layer})
    assert more.ttft_s - less.ttft_s == pytest.approx(ffn_work(LLAMA_8B, tokens=prompt_tokens).seconds(DEVICE))
    if more.tpot_s is None or less.tpot_s is None:
        assert new_tokens == 1
    else:
        assert more.tpot_s - less.tpot_s == pytest.approx(ffn_work(LLAMA_8B, tokens=1).seconds(DEVICE))


def test_prediction_equals_the_sum_over_steps_and_keeps_the_prompts_attention_skipped():
    strategy = SkipDecode(num_layers=32, budget=Budget(layers=4), max_decode_steps=8)
    prompt = SkipPlan(attention=frozenset({9}), ffn=frozenset({10}))
    sizes = {"prompt_tokens": 100, "new_tokens": 9}
    times = predict(LLAMA_8B, prefill_plan=prompt, decode_plan=strategy.decode_plan, **sizes, ceilings=DEVICE)
    steps = []
    for step in range(1, 9):
        skipped = min(4, math.ceil(step / 8 * 3) + 1)
        plan = SkipPlan(attention=frozenset({9, *range(1, skipped + 1)}), ffn=frozenset(range(1, skipped + 1)))
        steps.append(forward_seconds(LLAMA_8B, plan, tokens=1, context=100 + step, ceilings=DEVICE))
    assert times.tpot_s == pytest.approx(sum(steps) / 8)
    assert times.ttft_s == forward_seconds(LLAMA_8B, prompt, tokens=100, context=100, ceilings=DEVICE)


def test_layers_of_different_windows_are_summed_one_by_one():
    shape = ModelShape.of(random_model("gemma3").config)
    assert [sublayer.window for sublayer in shape.attention] == [WINDOW, None, WINDOW, None]
    plan = SkipPlan(attention=frozenset({1}))
    naive = head_work(shape, tokens=1).seconds(DEVICE)
    for layer in range(4):
        naive += ffn_work(shape, tokens=1, layer=layer).seconds(DEVICE)
        if layer != 1:
            naive += attention_work(shape, tokens=1, context=90, layer=layer).seconds(DEVICE)
    assert forward_seconds(shape, plan, tokens=1, context=90, ceilings=DEVICE) == pytest.approx(naive)


@pytest.mark.parametrize("plan", [EMPTY_PLAN, SkipPlan(attention=frozenset({0, 2}), ffn=frozenset({1}))])
def test_kv_bytes_are_those_of_a_real_cache(plan):
    model, cache = random_model("llama"), DynamicCache()
    with skipping(model, FixedPlan(num_layers=4, plan=plan)), torch.no_grad():
        model(input_ids=random_prompts([7])[0][None], past_key_values=cache)
    held = [layer for layer in cache.layers if layer.is_initialized and layer.keys is not None]
    stored = sum(layer.keys.nbytes + layer.values.nbytes for layer in held)
    assert stored == 7 * kv_bytes_per_token(ModelShape.of(model.config), plan, bytes_per_value=4)


def test_impossible_sizes_and_plans_are_refused():
    with pytest.raises(ValueError, match="got 5 tokens, 1 rows, context 4"):
        attention_work(SMALL, tokens=5, context=4)
    with pytest.raises(ValueError, match="new_tokens must be at least 1; got 0"):
        predict(SMALL, prefill_plan=EMPTY_PLAN, decode_plan=EMPTY_PLAN, prompt_tokens=4, new_tokens=0, ceilings=DEVICE)
    with pytest.raises(ValueError, match=r"plan skips layers \[3\]"):
        forward_seconds(SMALL, SkipPlan(ffn=frozenset({3})), tokens=1, context=1, ceilings=DEVICE)
    with pytest.raises(ValueError, match="unknown attention 'flash'; allowed: fused, eager"):
        attention_work(SMALL, tokens=1, context=1, attention="flash")  # pyright: ignore[reportArgumentType]


def test_the_data_sheets_say_what_nvidia_prints():
    printed = {"L20": (119.5, 864), "A100": (312, 2039), "H100": (989.4, 3350), "H200": (989.4, 4800)}
    printed["RTX 4090"] = (165.2, 1008)
    assert set(known_devices()) == set(printed)
    for name, (tflops, gb_s) in printed.items():
        device = known_ceilings(name)
        assert (device.matmul_flops, device.bandwidth) == (pytest.approx(tflops * 1e12), pytest.approx(gb_s * 1e9))


def test_an_unknown_device_is_one_line_that_says_which_there_are():
    with pytest.raises(ValueError, match=r"unknown device 'h100'\. Did you mean 'H100'") as error:
        known_ceilings("h100")
    assert str(error.value).endswith("Available: L20, A100, H100, H200, RTX 4090")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("device", ["meta", *([] if torch.cuda.is_available() else ["cuda"])])
def test_a_device_that_is_not_there_cannot_be_measured(device):
    with pytest.raises(ValueError, match=f"cannot measure device '{device}'; present here: .*cpu"):
        measure_ceilings(device, torch.float32)


def test_ceilings_are_bytes_and_operations_over_the_median_time(monkeypatch):
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 1000})
    monkeypatch.setattr(ceilings, "MATMUL_SIZES", {"cpu": (4, 8)})
    monkeypatch.setattr(ceilings, "_median_s", lambda statement, **tensors: 0.5)
    measured = measure_ceilings("cpu", torch.bfloat16)
    assert measured.bandwidth == 2 * 1000 / 0.5
    assert measured.matmul_flops == 2 * 8**3 / 0.5
    assert (measured.name, measured.source) == ("CPU", f"measured, bfloat16, threads: {torch.get_num_threads()}")


def test_ceilings_of_this_cpu_are_measured(monkeypatch):
    monkeypatch.setattr(ceilings, "COPY_BYTES", {"cpu": 2**24})
    monkeypatch.setattr(ceilings, "MATMUL_SIZES", {"cpu": (256,)})
    monkeypatch.setattr(ceilings, "MEASURE_SECONDS", 0.05)
    measured = measure_ceilings("cpu", torch.float32)
    assert 1e8 < measured.bandwidth < 1e13
    assert 1e8 < measured.matmul_flops < 1e14


@pytest.mark.gpu
def test_this_gpu_copies_no_faster_than_its_memory_is_clocked():
    """Data sheets will not do: one name stands for several memories, as H100 does for SXM, PCIe and NVL."""
    properties = torch.cuda.get_device_properties("cuda")
    clocked = 2 * 1000 * properties.memory_clock_rate * properties.memory_bus_width / 8  # kHz, two values a beat
    if not clocked:
        pytest.skip("the driver does not tell the memory's clock")
    assert 0.5 * clocked < measure_ceilings("cuda", torch.bfloat16).bandwidth < 1.05 * clocked


@pytest.mark.gpu
@pytest.mark.parametrize("name", known_devices())
def test_this_gpu_multiplies_no_faster_than_the_fastest_of_its_name(name):
    """The data sheets are of the fastest; a PCIe card of less power reaches a good half of that."""
    if name.replace("RTX ", "") not in torch.cuda.get_device_name():
        pytest.skip(f"this is no {name}")
    sheet, measured = known_ceilings(name), measure_ceilings("cuda", torch.bfloat16)
    assert 0.25 * sheet.matmul_flops < measured.matmul_flops < 1.05 * sheet.matmul_flops
