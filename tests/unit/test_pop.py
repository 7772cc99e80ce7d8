"""Prompts read under plans that keep the K/V, as by strategy pop, against a decoder that does it token by token."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
import torch

from adaskip import POP, Budget, SkipPlan, skipping
from adaskip.calibration.divergence import OutputDivergence
from adaskip.core.plan import Sublayer
from adaskip.core.reference_loss import reference_loss
from adaskip.core.token_ids import left_padded
from adaskip.roofline import Ceilings, ModelShape, Work, attention_work, ffn_work, kv_bytes_per_token, predict
from adaskip.strategies import FixedPlan
from tests.families import FAMILIES, random_model, random_prompts
from tests.reference import ReferenceDecoder, read_by_hand

TOLERANCE = 1e-5
NEW_TOKENS = 5
PROMPTS = random_prompts([9, 3, 6])
model_of = functools.cache(random_model)
POP_HALF = POP(num_layers=4, budget=Budget(layers=2), phase="prefill")
MIDDLE = FixedPlan(
    num_layers=4,
    phase="prefill",
    plan=replace(
        SkipPlan.of_sublayers({Sublayer("attention", 1): 1.1, Sublayer("ffn", 1): 0.8, Sublayer("attention", 2): 0.9}),
        keeps_kv=True,
    ),
)
STRATEGIES = {"pop": POP_HALF, "attentions of the middle": MIDDLE}


def assert_kv(cache, decoder) -> None:
    for i, layer in enumerate(cache.layers):
        held = layer.keys.shape[-2]  # in a sliding layer, the window less one
        assert held == min(decoder.position, decoder._window(i) - 1)
        for kept, expected in ((layer.keys, decoder.keys[i]), (layer.values, decoder.values[i])):
            assert (kept[0] - torch.stack(expected[-held:], dim=1)).abs().max() < TOLERANCE, f"layer {i}"


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_logits_and_the_kv_of_every_layer_are_those_of_a_prompt_read_by_hand(family, strategy):
    model, strategy = model_of(family), STRATEGIES[strategy]
    for prompt in PROMPTS:
        decoder, expected = read_by_hand(model, prompt, strategy.skipped)
        with skipping(model, strategy) as session:
            output = model(prompt[None], use_cache=True)
            assert (output.logits[0] - expected).abs().max() < TOLERANCE
            assert_kv(output.past_key_values, decoder)
            step = model(torch.tensor([[7]]), past_key_values=output.past_key_values)
            assert (step.logits[0, -1] - decoder.step(7)).abs().max() < TOLERANCE
            assert session.last_request.prefill_plan == strategy.skipped
            assert session.last_request.decode_plan == SkipPlan()
        assert_kv(output.past_key_values, decoder)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3", "olmo2"])
def test_answers_of_padded_batches_are_those_of_each_prompt_by_hand(family):
    model = model_of(family)
    ids, mask = left_padded(PROMPTS, 0, torch.device("cpu"))
    with skipping(model, POP_HALF):
        options = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS, "do_sample": False}
        answers = model.generate(input_ids=ids, attention_mask=mask, **options)[:, ids.shape[1] :]
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        decoder, logits = read_by_hand(model, prompt, POP_HALF.skipped)
        logits, expected = logits[-1], []
        for _ in range(NEW_TOKENS):
            logits[2] = -torch.inf  # min_new_tokens
            expected.append(int(logits.argmax()))
            logits = decoder.step(expected[-1])
        assert answer.tolist() == expected


@torch.no_grad()
def test_the_first_token_is_chosen_by_all_layers_over_prompts_that_were_not():
    model, ids = model_of("llama"), PROMPTS[0][None]
    full = model(ids).logits
    early = FixedPlan(num_layers=4, phase="prefill", plan=replace(POP_HALF.skipped, keeps_kv=False))
    with skipping(model, early):
        skipped = model(ids).logits
    with skipping(model, POP_HALF):
        kept = model(ids).logits
    assert torch.equal(kept[:, :-1], skipped[:, :-1])
    assert (kept[:, -1] - skipped[:, -1]).abs().max() > 0.1
    assert (kept[:, -1] - full[:, -1]).abs().max() > 0.1


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_without_the_last_layer_the_answer_is_the_full_models(family):
    """Of its outputs in the prompt only the last token's is used, and its K/V come from the layer below."""
    model, ids = model_of(family), PROMPTS[0][None]
    full = model(ids, use_cache=True)
    with skipping(model, POP(num_layers=4, budget=Budget(layers=1), phase="prefill")):
        kept = model(ids, use_cache=True)
    assert (kept.logits[:, -1] - full.logits[:, -1]).abs().max() < TOLERANCE
    assert (kept.logits[:, 0] - full.logits[:, 0]).abs().max() > 100 * TOLERANCE
    for ours, theirs in zip(kept.past_key_values.layers, full.past_key_values.layers, strict=True):
        assert (ours.keys - theirs.keys).abs().max() < TOLERANCE
        assert (ours.values - theirs.values).abs().max() < TOLERANCE


@torch.no_grad()
def test_a_kept_attention_computes_neither_scores_nor_output():
    model, calls = random_model("llama"), []
    for layer in model.model.layers:
        layer.self_attn.o_proj.register_forward_hook(lambda module, args, output: calls.append(args[0].shape[1]))
    with skipping(model, POP_HALF):
        model(PROMPTS[0][None])
    assert calls == [8, 8, 1, 1, 1, 1]


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_an_empty_set_and_a_prompt_of_one_token_are_the_full_model(family):
    model = model_of(family)
    nothing = POP(num_layers=4, budget=Budget(layers=0), phase="prefill")
    for strategy, ids in ((nothing, PROMPTS[0][None]), (POP_HALF, PROMPTS[0][None, :1])):
        expected = model(ids, use_cache=True)
        with skipping(model, strategy):
            assert torch.equal(model(ids, use_cache=True).logits, expected.logits)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
@torch.no_grad()
def test_the_last_token_of_each_turn_and_chunk_runs_in_the_full_model(family):
    model, prompt = model_of(family), PROMPTS[0]
    decoder = ReferenceDecoder(model)
    for position, token in enumerate(prompt.tolist()):  # chunks of 4, 4 and 1
        expected = decoder.step(token, SkipPlan() if position in (3, 7, 8) else POP_HALF.skipped)
    with skipping(model, POP_HALF) as session:
        turn = model(prompt[None, :4], use_cache=True)
        turn = model(prompt[None, 4:8], past_key_values=turn.past_key_values)
        turn = model(prompt[None, 8:], past_key_values=turn.past_key_values)
        assert (turn.logits[0, -1] - expected).abs().max() < TOLERANCE
        assert_kv(turn.past_key_values, decoder)
        assert session.last_request.decode_steps == 1
        options = {"max_new_tokens": 1, "output_logits": True, "return_dict_in_generate": True}
        chunked = model.generate(prompt[None], prefill_chunk_size=4, **options)
        assert session.last_request.decode_steps == 0
    assert (chunked.logits[0][0] - expected).abs().max() < TOLERANCE


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_in_padded_batches_that_are_read_in_chunks_a_row_may_begin_after_the_first_chunk(family):
    model = model_of(family)
    ids, mask = left_padded(PROMPTS, 0, torch.device("cpu"))
    with skipping(model, POP_HALF):  # chunks of 4, 4 and 1; the second row is 3 tokens long
        output = model.generate(
            input_ids=ids,
            attention_mask=mask,
            prefill_chunk_size=4,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
    for row, prompt in enumerate(PROMPTS):
        decoder = ReferenceDecoder(model)
        for position, token in enumerate(prompt.tolist(), start=9 - len(prompt)):
            expected = decoder.step(token, SkipPlan() if position in (3, 7, 8) else POP_HALF.skipped)
        for step, token in enumerate(output.sequences[row, 9:].tolist()):
            assert (output.logits[step][row] - expected).abs().max() < TOLERANCE
            expected = decoder.step(token)


@torch.no_grad()
def test_embeddings_masks_and_positions_are_split_too():
    model = model_of("llama")
    ids, mask = left_padded(PROMPTS, 0, torch.device("cpu"))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    given = {"attention_mask": mask, "position_ids": positions}
    with skipping(model, POP_HALF):
        by_ids = model(ids, **given).logits
        by_embeddings = model(inputs_embeds=model.get_input_embeddings()(ids), **given).logits
        assert torch.equal(by_ids, by_embeddings)
    for row, prompt in zip(by_ids, PROMPTS, strict=True):
        expected = read_by_hand(model, prompt, POP_HALF.skipped)[1]
        assert (row[-len(prompt) :] - expected).abs().max() < TOLERANCE


def test_a_reference_loss_follows_the_prompt_read_by_hand():
    model, prompt, answer = model_of("qwen3"), PROMPTS[0], PROMPTS[2]
    decoder, logits = read_by_hand(model, prompt, POP_HALF.skipped)
    rows = torch.stack([logits[-1], *(decoder.step(token) for token in answer[:-1].tolist())])
    expected = torch.nn.functional.cross_entropy(rows, answer)
    assert reference_loss(model, POP_HALF, prompt, answer) == pytest.approx(float(expected), abs=1e-5)


@torch.no_grad()
def test_the_model_and_its_next_context_are_as_before_also_after_a_failure():
    model, ids = random_model("llama"), PROMPTS[0][None]
    before, state = model(ids).logits, [dict(layer.__dict__) for layer in model.model.layers]
    handle = model.model.layers[3].self_attn.v_proj.register_forward_hook(_stop)
    with skipping(model, POP_HALF), pytest.raises(RuntimeError, match="stop"):
        model(ids)
    handle.remove()
    assert [dict(layer.__dict__) for layer in model.model.layers] == state
    assert torch.equal(model(ids).logits, before)
    with skipping(model, POP_HALF):
        assert (model(ids).logits[0] - read_by_hand(model, PROMPTS[0], POP_HALF.skipped)[1]).abs().max() < TOLERANCE


def _stop(module, args, output):
    raise RuntimeError("stop")


def test_the_cache_can_be_used_outside_of_the_context():
    model, prompt = model_of("llama"), PROMPTS[0]
    with torch.no_grad():
        with skipping(model, POP_HALF):
            cache = model(prompt[None], use_cache=True).past_key_values
        logits = model(torch.tensor([[7]]), past_key_values=cache).logits
    decoder, _ = read_by_hand(model, prompt, POP_HALF.skipped)
    assert (logits[0, -1] - decoder.step(7)).abs().max() < TOLERANCE


def test_the_predicted_time_has_the_projections_to_kv_and_one_step_of_the_full_model():
    shape, ceilings = ModelShape.of(model_of("llama").config), Ceilings("made up", 1e12, 1e11)
    running = {"ceilings": ceilings, "bytes_per_value": 4, "batch_size": 2}
    sizes = {"bytes_per_value": 4, "batch_size": 2, "tokens": 99}
    live = attention_work(shape, context=99, **sizes).seconds(ceilings) + ffn_work(shape, **sizes).seconds(ceilings)
    kept = Work(2 * 198 * 16 * (16 + 8 + 8), 4 * (16 * 32 + 198 * (3 * 16 + 32))).seconds(ceilings)
    embeddings = Work(0, 4 * 2 * 16 * 198).seconds(ceilings)
    step = predict(
        shape, prefill_plan=SkipPlan(), decode_plan=SkipPlan(), prompt_tokens=99, new_tokens=2, **running
    ).tpot_s
    times = predict(
        shape,
        prefill_plan=POP_HALF.prefill_plan,
        decode_plan=POP_HALF.decode_plan,
        prompt_tokens=100,
        new_tokens=2,
        **running,
    )
    assert times.ttft_s == pytest.approx(embeddings + 2 * (live + kept) + step)
    assert times.tpot_s > step
    assert kv_bytes_per_token(shape, POP_HALF.skipped) == kv_bytes_per_token(shape, SkipPlan())


def test_the_divergence_is_that_of_the_prompt_under_the_plan_and_of_the_answer_over_its_kv():
    model, prompt, answer = model_of("gemma3"), PROMPTS[0], PROMPTS[2].tolist()
    divergence = OutputDivergence(model, [prompt], "prefill", eos_token_ids=[2], pad_token_id=0, answers=[answer])
    decoder, logits = read_by_hand(model, prompt, MIDDLE.skipped)
    log_q = torch.stack([*logits, *(decoder.step(token) for token in answer)]).log_softmax(-1)
    with torch.no_grad():
        log_p = model(torch.cat([prompt, torch.tensor(answer)])[None]).logits[0].log_softmax(-1)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1)
    expected = (kl[:8].mean() + kl[8:].mean()) / 2  # the prompt and the answer get half each
    early = divergence(replace(MIDDLE.skipped, keeps_kv=False))
    assert divergence(MIDDLE.skipped) == [pytest.approx(float(expected), abs=1e-5)]
    assert divergence(replace(MIDDLE.skipped, keeps_kv=False)) == early != divergence(MIDDLE.skipped)
    other = OutputDivergence(model, [prompt], "e2e", eos_token_ids=[2], pad_token_id=0, answers=[answer])
    with pytest.raises(ValueError, match="a plan that keeps the K/V is measured in phase 'prefill', not in 'e2e'"):
        other(MIDDLE.skipped)
