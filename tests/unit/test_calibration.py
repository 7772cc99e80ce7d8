"""Offline importance learning against straightforward measuring on a copy of the residual stream."""

from __future__ import annotations

import pytest
import torch

from adaskip.calibration.measure import calibrate, measure
from adaskip.profiles.importance import ImportanceProfile
from tests.families import FAMILIES, random_model, random_prompts


def residual_stream(model, prompt):
    """Inputs and outputs of every sublayer, from hooks on stock modules: [(layer input, after attention, output)]."""
    states, handles = [], []
    for layer in model.model.layers:
        entry = {}

        def keep_input(module, args, kwargs, entry=entry):
            entry["input"] = args[0] if args else kwargs["hidden_states"]

        def keep_output(module, args, output, entry=entry):
            entry["output"] = output

        def keep_norm_input(module, args, entry=entry):
            entry["middle"] = args[0]

        handles += [
            layer.register_forward_pre_hook(keep_input, with_kwargs=True),
            layer.register_forward_hook(keep_output),
            layer.post_attention_layernorm.register_forward_pre_hook(keep_norm_input),
        ]
        states.append(entry)
    with torch.no_grad():
        model(prompt[None])
    for handle in handles:
        handle.remove()
    return [tuple(entry[key][0].double() for key in ("input", "middle", "output")) for entry in states]


def token_means(model, prompts):
    """Equations 2 and 3 in float64: {unit: [layers][similarity, scale]}."""
    units = {"attention": (0, 1), "ffn": (1, 2), "layer": (0, 2)}
    cosines = {unit: [[] for _ in model.model.layers] for unit in units}
    ratios = {unit: [[] for _ in model.model.layers] for unit in units}
    for prompt in prompts:
        for i, states in enumerate(residual_stream(model, prompt)):
            for unit, (start, end) in units.items():
                a, b = states[start], states[end]
                cosines[unit][i] += torch.nn.functional.cosine_similarity(a, b, dim=-1).tolist()
                ratios[unit][i] += (b.norm(dim=-1) / a.norm(dim=-1)).tolist()
    mean = {unit: [sum(x) / len(x) for x in cosines[unit]] for unit in units}
    return mean, {unit: [sum(x) / len(x) for x in ratios[unit]] for unit in units}


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_means_are_over_tokens_and_pads_do_not_count(family, batch_size):
    model = random_model(family)
    prompts = random_prompts([30, 2, 11])  # so unequal that a mean over prompts would differ
    profile = calibrate(model, prompts, batch_size=batch_size, dataset="random", data_ids=["a", "b", "c"])
    similarity, scale = token_means(model, prompts)
    for unit in ("attention", "ffn", "layer"):
        assert getattr(profile, unit).similarity == pytest.approx(similarity[unit], abs=2e-6)
        assert getattr(profile, unit).scale == pytest.approx(scale[unit], abs=2e-6)
    assert profile.tokens == 43


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_can_be_calibrated_in_both_phases(family):
    model = random_model(family)
    model.generation_config.eos_token_id = None
    for phase in ("prefill", "decode"):
        profile = calibrate(model, random_prompts([7, 4]), batch_size=2, phase=phase, max_new_tokens=5)
        assert profile.tokens == (11 if phase == "prefill" else 2 * 4)  # the last new token is never an input
        assert len(set(profile.attention.similarity)) == 4


def test_decode_measures_the_answers_tokens_only():
    model = random_model("llama")
    model.generation_config.eos_token_id = None
    prompt = random_prompts([9])[0]
    answer = model.generate(prompt[None], max_new_tokens=6, do_sample=False, eos_token_id=None, pad_token_id=0)[0]
    full = residual_stream(model, answer[:-1])
    profile = calibrate(model, [prompt], phase="decode", max_new_tokens=6)
    for i, (a, b, _) in enumerate(full):
        expected = torch.nn.functional.cosine_similarity(a[9:], b[9:], dim=-1).mean().item()
        assert profile.attention.similarity[i] == pytest.approx(expected, abs=1e-5)
    assert profile.tokens == 5


def test_a_token_counts_once_where_the_model_reads_all_again():
    """Phi-3 with long rope drops its cache at the switch of factors and reads the sequence anew in one forward."""
    rope = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16}
    factors = {"short_factor": [1.0] * 2, "long_factor": [4.0] * 2}
    model = random_model("phi3", original_max_position_embeddings=16, rope_parameters={**rope, **factors})
    prompt, new_tokens = random_prompts([12])[0], 9
    cosines, lengths = last_tokens_cosines(model, prompt, new_tokens)
    assert set(lengths[1:]) <= {1, 17}  # transformers 5.17 goes on with the last token alone
    profile = calibrate(model, [prompt], phase="decode", max_new_tokens=new_tokens, eos_token_ids=[60])
    assert profile.tokens == new_tokens - 1
    for measured, expected in zip(profile.attention.similarity, cosines, strict=True):
        assert measured == pytest.approx(sum(expected[1:]) / (new_tokens - 1), abs=1e-5)


def last_tokens_cosines(model, prompt, new_tokens):
    """By layer, the cosine over its attention of the last token of each forward of stock generation; their lengths."""
    inputs, cosines, lengths, handles = {}, [[] for _ in model.model.layers], [], []
    for i, layer in enumerate(model.model.layers):

        def keep_input(module, args, kwargs, i=i):
            inputs[i] = args[0] if args else kwargs["hidden_states"]

        def keep_cosine(module, args, i=i):
            a, b = inputs[i][0, -1].double(), args[0][0, -1].double()
            cosines[i].append(torch.nn.functional.cosine_similarity(a, b, dim=-1).item())

        handles += [
            layer.register_forward_pre_hook(keep_input, with_kwargs=True),
            layer.post_attention_layernorm.register_forward_pre_hook(keep_cosine),
        ]
    count = model.model.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(inputs[0].shape[1]))
    options = {"max_new_tokens": new_tokens, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
    model.generate(prompt[None], **options)
    for handle in [*handles, count]:
        handle.remove()
    return cosines, lengths


def test_rows_that_have_ended_do_not_count_in_decode():
    model = random_model("llama")
    prompts = random_prompts([9, 5])
    answers = [
        model.generate(p[None], max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)[0, len(p) :]
        for p in prompts
    ]
    end = int(answers[0][2])
    assert end not in answers[0][:2], "the first row must end at its third token"
    lengths = [next((i for i, t in enumerate(a.tolist()) if t == end), 7) for a in answers]
    options = {"phase": "decode", "max_new_tokens": 8, "eos_token_ids": [end]}
    model.generation_config.eos_token_id = end
    by_default = calibrate(model, prompts, batch_size=2, phase="decode", max_new_tokens=8)
    together = calibrate(model, prompts, batch_size=2, **options)
    assert by_default.tokens == together.tokens
    alone = calibrate(model, prompts, batch_size=1, **options)
    assert together.tokens == alone.tokens == sum(lengths)
    assert together.ffn.similarity == pytest.approx(alone.ffn.similarity, abs=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_answer_that_ends_at_once_has_a_measurement_of_no_token(batch_size):
    model, (prompt, other) = random_model("llama"), random_prompts([9, 5])
    end, others = (
        int(model.generate(p[None], max_new_tokens=1, do_sample=False, pad_token_id=0)[0, -1]) for p in (prompt, other)
    )
    assert end != others
    options = {"phase": "decode", "max_new_tokens": 4, "eos_token_ids": [end], "windows": [2]}
    measured = list(measure(model, [prompt, other, prompt], batch_size=batch_size, **options))
    assert [int(m.tokens) for m in measured] == [0, int(measured[1].tokens), 0]
    assert measured[1].tokens
    for m in (measured[0], measured[2]):
        assert not m.sums.any()
        assert m.sums.shape == measured[1].sums.shape
        assert m.sums.dtype == measured[1].sums.dtype
        assert not m.windows[2].tokens
    (alone,) = measure(model, [prompt], **options)
    assert not alone.tokens
    with pytest.raises(ValueError, match="no generated tokens"):
        calibrate(model, [prompt], phase="decode", max_new_tokens=4, eos_token_ids=[end])


def test_a_float64_model_is_measured():
    model, prompts = random_model("llama"), random_prompts([12, 7])
    single = calibrate(model, prompts)
    double = calibrate(model.double(), prompts)
    assert double.attention.similarity == pytest.approx(single.attention.similarity, abs=1e-5)
    assert double.ffn.scale == pytest.approx(single.ffn.scale, abs=1e-5)


def test_nothing_waits_for_the_device_while_measuring(monkeypatch):
    """`.item()`, `.cpu()` and friends on anything but the final sums would stall a GPU."""
    model = random_model("llama")

    def forbidden(*args, **kwargs):
        raise AssertionError("host synchronisation inside a measuring forward")

    with monkeypatch.context() as patch:
        for name in ("item", "cpu", "tolist", "__bool__", "__int__", "__float__"):
            patch.setattr(torch.Tensor, name, forbidden)
        from adaskip.calibration.measure import _RowSums
        from adaskip.core.similarity import cosine_and_ratio

        probe = _RowSums(1)
        probe.mask = torch.ones(2, 3, dtype=torch.bool)
        for unit in ("attention", "ffn", "layer"):
            probe.record(unit, 0, torch.ones(2, 3, 4), torch.ones(2, 3, 4), torch.zeros(2, 3, 4))
        cosine_and_ratio(torch.ones(2, 3, 4), torch.ones(2, 3, 4))
    assert len(list(measure(model, random_prompts([3])))) == 1


def test_a_profile_says_what_it_was_measured_on(tmp_path):
    model = random_model("llama")
    profile = calibrate(model, random_prompts([4]), dataset="qasper", data_ids=["x1"])
    assert profile.dataset == "qasper"
    assert profile.data_ids == ("x1",)
    assert profile.dtype == "float32"
    assert profile.attn_implementation == "sdpa"
    assert set(profile.versions) == {"python", "torch", "transformers"}
    path = profile.save(tmp_path / "p.json")
    assert ImportanceProfile.load(path, model) == profile
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1.01)
    with pytest.raises(ValueError, match="calibrate this model"):
        ImportanceProfile.load(path, model)


def test_a_profile_says_whether_prompts_began_with_bos():
    model, (one, two) = random_model("llama"), random_prompts([4, 6])
    bos = torch.tensor([model.config.bos_token_id])
    with_bos = [torch.cat([bos, prompt]) for prompt in (one, two)]
    assert calibrate(model, with_bos).prompts_begin_with_bos is True
    assert calibrate(model, iter([with_bos[0].tolist(), two])).prompts_begin_with_bos is False
    model.config.bos_token_id = None
    assert calibrate(model, with_bos).prompts_begin_with_bos is None


def test_weights_without_a_fingerprint_are_refused_before_anything_is_measured():
    model = random_model("llama")
    model.register_parameter("elsewhere", torch.nn.Parameter(torch.empty(2, device="meta")))

    def prompts():
        raise AssertionError("a prompt was read")
        yield

    with pytest.raises(ValueError, match="elsewhere has no data"):
        calibrate(model, prompts())


def test_a_compiled_model_is_measured_as_the_model_it_wraps():
    model, prompts = random_model("llama"), random_prompts([5])
    for phase in ("prefill", "decode"):
        compiled = calibrate(torch.compile(model, backend="eager"), prompts, phase=phase, max_new_tokens=4)
        assert compiled == calibrate(model, prompts, phase=phase, max_new_tokens=4)


def test_calibration_leaves_the_model_as_it_was():
    model = random_model("llama")
    before = [dict(vars(layer)) for layer in model.model.layers]
    calibrate(model, random_prompts([4]))
    assert [vars(layer).keys() for layer in model.model.layers] == [state.keys() for state in before]


@pytest.mark.parametrize(
    ("prompts", "message"),
    [([], "found no prompt tokens"), ([torch.tensor([])], "prompt 0 must be"), ([[[1]]], "prompt 0")],
)
def test_nothing_to_measure_is_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        calibrate(random_model("llama"), prompts)
