"""Online importance learning: what a request learns in its first tokens, and that it keeps it to itself."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from adaskip.calibration.measure import calibrate
from adaskip.core.context import skipping
from adaskip.core.plan import Budget, SkipPlan
from adaskip.core.request import LearningWindow
from adaskip.core.token_ids import left_padded
from adaskip.strategies import AdaSkip
from tests.families import random_model, random_prompts
from tests.profiles import profile_of
from tests.reference import ReferenceDecoder
from tests.unit.test_lossless_options import llava

WINDOW = 4


def low_threshold(phase="e2e", num_layers=4, window=WINDOW):
    """Attention 1 is skipped and and the FFNs of a random model lie on both sides of its similarity."""
    profile = profile_of(attention=[-0.9, 0.8, -0.9, -0.9], ffn=[-1.0] * num_layers, scale=1.05)
    return AdaSkip(
        num_layers=num_layers, budget=Budget(sublayers=1), phase=phase, profile=profile, learning_window=window
    )


def vision_language_model():
    model, generator = llava().eval(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(noise / parameter.shape[-1] ** 0.5 if parameter.dim() > 1 else 1.0 + 0.1 * noise)
    return model


class MeasuringReference(ReferenceDecoder):
    """The reference decoder, keeping cosine and norm ratio of each FFN it runs."""

    def __init__(self, model):
        super().__init__(model)
        self.measured = {}

    def _ffn_branch(self, layer, h):
        change = super()._ffn_branch(layer, h)
        i = next(i for i, other in enumerate(self.model.model.layers) if other is layer)
        a, b = h[0].double(), (h + change)[0].double()
        cosine = torch.nn.functional.cosine_similarity(a, b, dim=0).item()
        self.measured.setdefault(i, []).append((cosine, (b.norm() / a.norm()).item()))
        return change


def decode(model, session_cache, tokens):
    return [model(torch.tensor([[t]]), past_key_values=session_cache).logits[0, -1] for t in tokens]


@pytest.mark.parametrize("phase", ["decode", "e2e"])
def test_logits_follow_the_window_and_what_was_learnt_in_it(phase):
    model, strategy = random_model("llama"), low_threshold(phase)
    prompt, answer = random_prompts([9, 10])
    answer = answer.tolist()
    reference = MeasuringReference(model)
    reference.run(prompt.tolist(), SkipPlan() if phase == "decode" else strategy.skipped)
    reference.measured.clear()
    expected = [reference.step(token, strategy.skipped) for token in answer[:WINDOW]]
    means = {i: [sum(x) / WINDOW for x in zip(*pairs, strict=True)] for i, pairs in reference.measured.items()}
    learnt = {("ffn", i): scale for i, (similarity, scale) in means.items() if similarity > strategy.beta}
    assert 0 < len(learnt) < 4, "the case must tell FFNs that join from FFNs that do not"
    plan = strategy.skipped.union(SkipPlan(ffn=[i for _, i in learnt], scales=learnt))
    expected += [reference.step(token, plan) for token in answer[WINDOW:]]
    with skipping(model, strategy) as session, torch.no_grad():
        cache = model(prompt[None], use_cache=True).past_key_values
        got = decode(model, cache, answer)
        trace = session.last_request
    assert trace.online_ffns == tuple(sorted(i for _, i in learnt))
    assert trace.decode_plan == plan or trace.decode_plan.ffn == plan.ffn
    for i, (similarity, scale) in means.items():
        assert trace.window[i].similarity == pytest.approx(similarity, abs=1e-5)
        assert trace.window[i].scale == pytest.approx(scale, abs=1e-5)
    assert (torch.stack(got) - torch.stack(expected)).abs().max() < 1e-5


def test_a_new_request_starts_again_from_the_offline_set():
    """Defect of the artifact: the previous request's extra set leaks into the next prefill."""
    model, strategy = random_model("llama"), low_threshold()
    prompt, other, answer = random_prompts([9, 6, 8])

    def run(session, prompt):
        cache = model(prompt[None], use_cache=True).past_key_values
        assert session.last_request.online_ffns == ()
        assert session.last_request.prefill_plan == strategy.skipped
        return torch.stack(decode(model, cache, answer.tolist()))

    with skipping(model, strategy) as session, torch.no_grad():
        alone = run(session, prompt)
    with skipping(model, strategy) as session, torch.no_grad():
        run(session, other)
        assert session.last_request.online_ffns, "the first request must learn something that could leak"
        assert torch.equal(run(session, prompt), alone)


def test_interleaved_requests_learn_apart():
    model, strategy = random_model("llama"), low_threshold()
    prompts, answers = random_prompts([9, 6]), random_prompts([8, 8], seed=3)
    alone = []
    for prompt, answer in zip(prompts, answers, strict=True):
        with skipping(model, strategy), torch.no_grad():
            cache = model(prompt[None], use_cache=True).past_key_values
            alone.append(torch.stack(decode(model, cache, answer.tolist())))
    mixed = [[], []]
    with skipping(model, strategy), torch.no_grad():
        caches = [model(p[None], use_cache=True).past_key_values for p in prompts]
        for step in range(8):
            for i in (0, 1):
                mixed[i] += decode(model, caches[i], [int(answers[i][step])])
    assert all(torch.equal(torch.stack(x), y) for x, y in zip(mixed, alone, strict=True))


@pytest.mark.parametrize("phase", ["prefill", "decode", "e2e"])
def test_the_window_fires_in_generate_for_every_request(phase):
    """Defect of the artifact: it never fires for a real request."""
    model, strategy = random_model("llama"), low_threshold(phase)
    with skipping(model, strategy) as session:
        for prompt in random_prompts([9, 5, 7]):
            model.generate(prompt[None], max_new_tokens=10, min_new_tokens=10, do_sample=False, pad_token_id=0)
            assert bool(session.last_request.online_ffns) == (phase != "prefill")
            assert session.last_request.decode_steps == 9


def test_an_answer_shorter_than_the_window_learns_nothing():
    model, strategy = random_model("llama"), low_threshold(window=20)
    with skipping(model, strategy) as session:
        model.generate(random_prompts([5])[0][None], max_new_tokens=20, min_new_tokens=20, pad_token_id=0)
        assert session.last_request.decode_steps == 19
        assert session.last_request.online_ffns == ()


def test_beams_and_chunks_count_as_one_request():
    model, strategy = random_model("llama"), low_threshold()
    prompt = random_prompts([9])[0][None]
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
    with skipping(model, strategy) as session:
        model.generate(prompt, num_beams=3, **options)
        assert session.last_request.decode_steps == 7
        plain = model.generate(prompt, **options)
        cache = DynamicCache(config=model.config)
        chunked = model.generate(prompt, prefill_chunk_size=4, past_key_values=cache, **options)
        assert session.last_request.decode_steps == 7
    assert torch.equal(plain, chunked)


def test_in_a_batch_the_mean_is_over_the_tokens_of_live_rows():
    window = LearningWindow(3, frozenset({0}), eos_token_ids=(2,))
    a = torch.randn(3, 2, 1, 8)  # [steps, B, q, D]
    b = a + 0.5 * torch.randn(3, 2, 1, 8)
    ids = torch.tensor([[[5], [5]], [[5], [2]], [[5], [0]]])  # the second row ends at step 1 and is padded after it
    for step in range(3):
        window.add({0: (a[step], b[step])}, ids[step])
    live = [(0, 0), (0, 1), (1, 0), (2, 0)]
    cosine = torch.stack([torch.nn.functional.cosine_similarity(a[s, r, 0], b[s, r, 0], dim=0) for s, r in live])
    ratio = torch.stack([b[s, r, 0].norm() / a[s, r, 0].norm() for s, r in live])
    measured = window.close()[0]
    assert measured.similarity == pytest.approx(cosine.mean().item(), abs=1e-6)
    assert measured.scale == pytest.approx(ratio.mean().item(), abs=1e-6)


def tokens_in_window(session):
    """The number of tokens measured so far, the same for every FFN."""
    (count,) = set(session._last.window.sums[2].tolist())
    return count


@pytest.mark.parametrize("make", [lambda: random_model("llama"), vision_language_model], ids=["text", "vision"])
def test_a_row_that_has_ended_does_not_count_until_the_next_turn(make):
    """Models that read images pass embeddings to their decoder, not the token ids."""
    model, strategy = make(), low_threshold(window=20)
    ids = torch.stack(random_prompts([6, 6]))
    options = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 5}
    with skipping(model, strategy):
        answers = model.generate(ids, attention_mask=torch.ones_like(ids), min_new_tokens=5, **options)[:, 6:]
    end = int(answers[1, 0])
    assert end not in answers[0]
    cache = DynamicCache(config=model.config.get_text_config(decoder=True))
    options |= {"past_key_values": cache, "eos_token_id": end}
    with skipping(model, strategy, eos_token_id=end) as session:
        ids = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
        assert tokens_in_window(session) == 4
        ids = torch.cat([ids, torch.tensor([[5, 7], [8, 9]])], dim=1)
        mask = torch.ones_like(ids)
        mask[1, 7:11] = 0
        model.generate(ids, attention_mask=mask, min_new_tokens=5, **options)
        assert tokens_in_window(session) == 4 + 2 * 4


def test_a_step_that_fails_half_way_does_not_spoil_the_next_request():
    model, strategy = random_model("llama"), low_threshold()
    prompts = random_prompts([9, 6])
    mlp = model.model.layers[2].mlp
    with skipping(model, strategy) as session, torch.no_grad():
        cache = model(prompts[0].expand(2, -1), use_cache=True).past_key_values
        model(torch.tensor([[5], [6]]), past_key_values=cache)
        failing = mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("half-way")))
        with pytest.raises(RuntimeError, match="half-way"):
            model(torch.tensor([[5], [6]]), past_key_values=cache)
        failing.remove()
        cache = model(prompts[1][None], use_cache=True).past_key_values
        decode(model, cache, [3, 4, 5, 6, 7])
        assert session.last_request.online_ffns


def test_the_window_sends_nothing_to_the_device_and_asks_nothing_of_it(monkeypatch):
    window = LearningWindow(3, frozenset({0, 1}), eos_token_ids=(2,))
    io = {i: (torch.randn(2, 1, 8), torch.randn(2, 1, 8)) for i in (0, 1)}
    ids = torch.tensor([[5], [2]])

    def forbidden(*args, **kwargs):
        raise AssertionError("a transfer or synchronisation while measuring")

    with monkeypatch.context() as patch:
        for name in ("item", "cpu", "tolist", "__bool__", "__int__", "__float__"):
            patch.setattr(torch.Tensor, name, forbidden)
        patch.setattr(torch, "tensor", forbidden)
        window.add(io, ids)
        window.add(io, ids)
    assert set(window.close()) == {0, 1}


def test_a_batch_of_equal_rows_learns_what_one_row_learns():
    model, strategy = random_model("llama"), low_threshold()
    prompt = random_prompts([9])[0]
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    traces = []
    with skipping(model, strategy) as session:
        for rows in (1, 3):
            ids, mask = left_padded([prompt] * rows, 0, torch.device("cpu"))
            model.generate(ids, attention_mask=mask, **options)
            traces.append(session.last_request)
    assert traces[0].online_ffns == traces[1].online_ffns
    for i, measured in traces[0].window.items():
        assert measured.similarity == pytest.approx(traces[1].window[i].similarity, abs=1e-6)


def test_the_window_does_not_change_the_tokens_before_it_closes():
    model = random_model("llama")
    prompt = random_prompts([9])[0][None]
    options = {"max_new_tokens": WINDOW + 1, "min_new_tokens": WINDOW + 1, "do_sample": False, "pad_token_id": 0}
    options |= {"return_dict_in_generate": True, "output_logits": True}
    runs = []
    for window in (0, WINDOW):
        with skipping(model, low_threshold(window=window)):
            runs.append(model.generate(prompt, **options))
    assert all(torch.equal(x, y) for x, y in zip(runs[0].logits, runs[1].logits, strict=True))


def test_a_calibrated_model_runs_end_to_end():
    model = random_model("qwen3")
    profile = calibrate(model, random_prompts([12, 9]))
    strategy = AdaSkip(num_layers=4, budget=Budget(alpha=1.33), profile=profile)
    assert len(strategy.skipped) == 2
    assert all(profile.similarity_of(s) >= strategy.beta for s in strategy.skipped.scales)
    with skipping(model, strategy):
        out = model.generate(random_prompts([6])[0][None], max_new_tokens=5, min_new_tokens=5, pad_token_id=0)
    assert out.shape == (1, 11)
