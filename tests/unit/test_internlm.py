"""InternLM loaded natively computes what its published architecture says, with the tokens of its own tokenizer."""

from __future__ import annotations

import copy

import pytest
import torch
from accelerate import dispatch_model
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, StaticCache

from adaskip.models.errors import ModelError
from adaskip.models.internlm import InternLMTokenizer, llama_config
from adaskip.models.loading import load_model
from adaskip.models.rope import LENGTH, DynamicNTKRope, fix_dynamic_rope
from tests.compiled_runs import CountedGraphs, assert_same, run
from tests.internlm_reference import (
    CONFIG,
    EOA,
    EOH,
    LIMIT,
    VOCAB,
    Reference,
    clean_up,
    random_weights,
    train_tokenizer,
    write_checkpoint,
)
from tests.smollm2 import ONE_PROCESS, load_smollm2

TOLERANCE = {"rtol": 0.0, "atol": 2e-5}
LENGTHS = (1, LIMIT - 3, LIMIT, LIMIT + 1, 3 * LIMIT)


def random_ids(length: int, seed: int = 0) -> Tensor:
    return torch.randint(3, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(scope="module")
def weights():
    return random_weights()


@pytest.fixture(scope="module", params=["safetensors", "bin"])
def checkpoint(request, tmp_path_factory, weights):
    return write_checkpoint(tmp_path_factory.mktemp("internlm") / "snapshot", weights, layout=request.param)


@pytest.fixture(scope="module")
def model(tmp_path_factory, weights):
    folder = write_checkpoint(tmp_path_factory.mktemp("internlm") / "model", weights, layout="safetensors")
    return load_model("internlm", folder, device="cpu").model


@torch.no_grad()
def decode(model, prompt: Tensor, rest: Tensor, cache=None) -> Tensor:
    """Logits [1 + len(rest), V] of the prompt's last token and of every further one, step by step on a cache."""
    out = model(input_ids=prompt[None], past_key_values=cache, use_cache=True)
    logits = [out.logits[0, -1]]
    for token in rest:
        out = model(input_ids=token[None, None], past_key_values=out.past_key_values)
        logits.append(out.logits[0, -1])
    return torch.stack(logits)


def decode_reference(reference: Reference, prompt: Tensor, rest: Tensor) -> Tensor:
    return torch.stack([reference(prompt)[-1], *(reference(token[None])[-1] for token in rest)])


@pytest.mark.parametrize("length", LENGTHS)
def test_prefill_logits_match_the_published_architecture(checkpoint, weights, length):
    loaded = load_model("internlm", checkpoint, device="cpu")
    ids = random_ids(length)
    torch.testing.assert_close(loaded.model(ids[None]).logits[0], Reference(weights, {})(ids), **TOLERANCE)


@pytest.mark.parametrize(
    ("config", "bias"),
    [
        ({"rotary": {"base": 500, "type": "dynamic", "scaling_factor": 2.0}}, True),
        ({"rotary": {"base": 10000, "type": "dynamic"}}, True),
        ({"rotary": {"base": 500, "type": "origin"}}, True),
        ({"bias": False}, False),
    ],
)
def test_rotary_and_bias_settings_are_mapped(tmp_path, config, bias):
    weights = random_weights(seed=1, bias=bias)
    folder = write_checkpoint(tmp_path / "snapshot", weights, layout="safetensors", config=config)
    ids = random_ids(2 * LIMIT)
    logits = load_model("internlm", folder, device="cpu").model(ids[None]).logits[0]
    torch.testing.assert_close(logits, Reference(weights, config)(ids), **TOLERANCE)


def test_published_sizes_are_mapped():
    published = {
        **CONFIG,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 103168,
        "max_position_embeddings": 8192,
    }
    config = llama_config(published)
    assert (config.attention_bias, config.mlp_bias, config.num_key_value_heads) == (True, False, 32)
    assert config.rope_parameters == {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 1.0}
    assert (config.max_position_embeddings, config.vocab_size, config.head_dim) == (8192, 103168, 128)


def test_a_config_from_before_rotary_has_plain_rope():
    config = llama_config({name: value for name, value in CONFIG.items() if name != "rotary"})
    assert config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}


def test_unknown_rotary_type_is_refused():
    with pytest.raises(ModelError, match="'yarn'; allowed are 'origin' and 'dynamic'"):
        llama_config({**CONFIG, "rotary": {"type": "yarn"}})


def test_decode_below_the_limit_matches_the_published_code(model, weights):
    ids = random_ids(LIMIT)
    logits = decode(model, ids[:6], ids[6:])
    torch.testing.assert_close(logits, decode_reference(Reference(weights, {}), ids[:6], ids[6:]), **TOLERANCE)


def test_decode_above_the_limit_keeps_the_base_of_the_prompt(model, weights):
    ids, prompt = random_ids(3 * LIMIT), 2 * LIMIT
    logits = decode(model, ids[:prompt], ids[prompt:])
    fixed = decode_reference(Reference(weights, {}, fixed_length=prompt), ids[:prompt], ids[prompt:])
    torch.testing.assert_close(logits, fixed, **TOLERANCE)
    # The whole sequence in one go with that base: what is cached and what is new agree.
    torch.testing.assert_close(logits, Reference(weights, {}, fixed_length=prompt)(ids)[prompt - 1 :], **TOLERANCE)


@pytest.mark.slow
@ONE_PROCESS
def test_on_a_trained_model_decode_above_the_limit_follows_the_published_code_and_stock_does_not():
    """The published code raises the base with the length for all keys, stock only for new ones, ours not at all."""
    limit, prompt, total = 128, 400, 430
    plain = load_smollm2().model
    config = copy.deepcopy(plain.config)
    base = config.rope_parameters["rope_theta"]
    config.max_position_embeddings = limit
    config.rope_parameters = {"rope_type": "dynamic", "rope_theta": base, "factor": 1.0}
    ours, stock = (LlamaForCausalLM(config).eval() for _ in range(2))
    for model in (ours, stock):
        model.load_state_dict(plain.state_dict())
    assert fix_dynamic_rope(ours)
    torch.manual_seed(0)
    options = {"do_sample": True, "top_k": 0, "eos_token_id": None, "suppress_tokens": [0, 1, 2], "pad_token_id": 0}
    begin = torch.ones(2, 1, dtype=torch.long)
    stories = plain.generate(begin, attention_mask=begin, max_new_tokens=total - 1, **options)
    published = {**config.to_dict(), "rotary": {"base": base, "type": "dynamic"}}
    divergence, agreement = torch.zeros(2), torch.zeros(2)
    for ids in stories:
        wanted = decode_reference(Reference(plain.state_dict(), published), ids[:prompt], ids[prompt:])
        # Stock as it answers its first request: afterwards it stays on the highest base it has seen.
        for which, model in enumerate((ours, copy.deepcopy(stock))):
            logits = decode(model, ids[:prompt], ids[prompt:])
            divergence[which] += kl(logits, wanted) / len(stories)
            agreement[which] += (logits.argmax(-1) == wanted.argmax(-1)).float().mean() / len(stories)
    print(f"KL {divergence.tolist()}, same next token {agreement.tolist()}")
    assert divergence[0] < 0.001, divergence
    assert divergence[1] > 10 * divergence[0], divergence
    assert agreement[0] > agreement[1], agreement


def kl(logits: Tensor, wanted: Tensor) -> Tensor:
    """Mean over positions, in nats."""
    return torch.nn.functional.kl_div(
        logits.log_softmax(-1), wanted.log_softmax(-1), log_target=True, reduction="batchmean"
    )


def test_a_long_request_leaves_no_trace_in_the_next(model, weights):
    ids = random_ids(2 * LIMIT, seed=3)
    before = model(ids[None]).logits
    model(random_ids(4 * LIMIT)[None])
    assert torch.equal(model(ids[None]).logits, before)

    stock = LlamaForCausalLM(llama_config(CONFIG)).eval()
    stock.load_state_dict(weights)
    before = stock(ids[None]).logits
    stock(random_ids(4 * LIMIT)[None])
    assert not torch.equal(stock(ids[None]).logits, before), (
        "stock transformers has mended this: adaskip.models.rope can go"
    )


def test_interleaved_requests_do_not_disturb_each_other(model):
    first, second = random_ids(3 * LIMIT, seed=4), random_ids(2 * LIMIT, seed=5)
    alone = decode(model, first[: 2 * LIMIT], first[2 * LIMIT :])
    out = model(first[None, : 2 * LIMIT], use_cache=True)
    other = model(second[None, :LIMIT], use_cache=True)
    mixed = [out.logits[0, -1]]
    for token in first[2 * LIMIT :]:
        out = model(token[None, None], past_key_values=out.past_key_values)
        other = model(second[None, LIMIT:][:, :1], past_key_values=other.past_key_values)
        mixed.append(out.logits[0, -1])
    assert torch.equal(torch.stack(mixed), alone)


def test_rows_of_a_batch_equal_single_requests(model):
    prompts = [random_ids(length, seed=length) for length in (5, LIMIT + 4, 2 * LIMIT)]
    width = max(map(len, prompts))
    ids = torch.stack([torch.nn.functional.pad(prompt, (width - len(prompt), 0)) for prompt in prompts])
    mask = torch.stack([torch.arange(width) >= width - len(prompt) for prompt in prompts]).long()
    options = {"max_new_tokens": LIMIT, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    batch = model.generate(ids, attention_mask=mask, **options)[:, width:]
    for prompt, answer in zip(prompts, batch, strict=True):
        assert torch.equal(model.generate(prompt[None], **options)[0, len(prompt) :], answer)


def test_a_reused_static_cache_begins_anew(model):
    ids, prompt = random_ids(2 * LIMIT + 6, seed=6), 2 * LIMIT
    cache = StaticCache(config=model.config, max_cache_len=5 * LIMIT)
    decode(model, random_ids(4 * LIMIT), random_ids(3), cache)
    cache.reset()
    torch.testing.assert_close(
        decode(model, ids[:prompt], ids[prompt:], cache), decode(model, ids[:prompt], ids[prompt:]), **TOLERANCE
    )


@pytest.mark.parametrize("length", LENGTHS)
def test_rope_equals_stock_bit_for_bit_below_the_limit_and_closely_above(length):
    stock = LlamaForCausalLM(llama_config(CONFIG)).model.rotary_emb
    x, positions = torch.empty(1), torch.arange(length)[None]
    for ours, theirs in zip(DynamicNTKRope(stock)(x, positions), stock(x, positions), strict=True):
        assert torch.equal(ours, theirs) if length <= LIMIT else torch.allclose(ours, theirs, atol=1e-5)


def test_decode_steps_only_read_the_length_that_the_prompt_left_on_the_cache(model):
    ids, prompt = random_ids(3 * LIMIT), 2 * LIMIT
    out = model(ids[None, :prompt], use_cache=True)
    left = getattr(out.past_key_values, LENGTH)
    for token in ids[prompt:]:
        model(token[None, None], past_key_values=out.past_key_values)
        assert getattr(out.past_key_values, LENGTH) is left
    assert left.tolist() == [[prompt]]


class FreshInputs(CountedGraphs):
    """Refuses a step that takes in what an earlier one put out: the next run of a CUDA graph overwrites its outputs."""

    def config(self, **options):
        outputs: list[Tensor] = []

        def backend(graph, example_inputs):
            self.append(graph)

            def run(*inputs):
                assert not any(given is made for given in inputs for made in outputs)
                made = graph.forward(*inputs)
                outputs.extend(made)
                return made

            return run

        return super().config(backend=backend, **options)


def test_compiled_decode_equals_eager_and_takes_in_no_output_of_an_earlier_step(model):
    prompts, graphs = [random_ids(length, seed=length) for length in (5, LIMIT + 4, 2 * LIMIT)], FreshInputs()
    compiled = run(model, prompts, compile_config=graphs.config())
    assert len(graphs) == 1
    assert_same(compiled, run(model, prompts))
    torch.compiler.reset()


@pytest.mark.slow
def test_rope_compiles_into_one_graph(model):
    """Stock dynamic rope branches on its data, which cannot be compiled without a break."""
    ids, prompt = random_ids(2 * LIMIT + 3), 2 * LIMIT
    compiled = torch.compile(model, backend="eager", fullgraph=True, dynamic=True)
    torch.testing.assert_close(
        decode(compiled, ids[:prompt], ids[prompt:]), decode(model, ids[:prompt], ids[prompt:]), **TOLERANCE
    )
    torch.compiler.reset()


def test_only_dynamic_rope_is_replaced():
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    model = LlamaForCausalLM(config)
    rope = model.model.rotary_emb
    assert not fix_dynamic_rope(model)
    assert model.model.rotary_emb is rope


def test_rope_goes_where_its_input_is():
    """Where accelerate spreads a model, the embeddings may lie on another device than the rotary module was put on."""
    rope = DynamicNTKRope(LlamaForCausalLM(llama_config(CONFIG)).model.rotary_emb)
    x, positions = torch.empty(1, device="meta"), torch.arange(3)[None]
    assert {part.device.type for part in rope(x, positions)} == {"meta"}
    assert {buffer.device.type for buffer in rope.buffers()} == {"meta"}


def test_a_model_spread_over_memory_and_disk_answers_like_one_that_is_not(model, weights, tmp_path):
    spread = LlamaForCausalLM(llama_config(CONFIG)).eval()
    spread.load_state_dict(weights)
    places = {"model.embed_tokens": "cpu", "model.rotary_emb": "disk", "model.norm": "disk", "lm_head": "cpu"}
    places |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    dispatch_model(spread, device_map=places, main_device="cpu", offload_dir=tmp_path)
    assert fix_dynamic_rope(spread)
    ids, prompt = random_ids(2 * LIMIT + 4), 2 * LIMIT
    assert torch.equal(decode(spread, ids[:prompt], ids[prompt:]), decode(model, ids[:prompt], ids[prompt:]))


def test_a_copied_model_uses_its_own_rope(model):
    twin = copy.deepcopy(model)
    ids = random_ids(2 * LIMIT + 4)
    assert torch.equal(
        decode(twin, ids[: 2 * LIMIT], ids[2 * LIMIT :]), decode(model, ids[: 2 * LIMIT], ids[2 * LIMIT :])
    )
    assert twin.model.rotary_emb is not model.model.rotary_emb


TEXTS = [
    "The quick brown fox",
    "  leading, two  and   three spaces ",
    "line\nbreak\n\n  indented\ttab",
    f"<|User|>:Hello{EOH}\n<|Bot|>:",
    "你好，世界 😀 Ａﬁ",  # noqa: RUF001
    f"a{EOA}b {EOA} c",
    "▁odd\u00a0spaces",
    "",
    "\n",
    "It 's a test , is n't it ? We 've 'm 're done ! 5 ' 6  . .",
]
RULES = [
    {"add_dummy_prefix": prefix, "remove_extra_whitespaces": strip, "normalization_rule_name": rule}
    for prefix in (True, False)
    for strip in (True, False)
    for rule in ("identity", "nmt_nfkc")
]


@pytest.mark.parametrize("rules", RULES, ids=lambda rules: "-".join(map(str, rules.values())))
def test_tokens_and_text_are_sentencepieces_own(tmp_path, rules):
    train_tokenizer(tmp_path / "tokenizer.model", **rules)
    original = SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    tokenizer = InternLMTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for text in TEXTS:
        ids = original.encode(text)
        assert tokenizer(text).input_ids == [original.bos_id(), *ids]
        assert tokenizer.decode(ids, skip_special_tokens=True) == clean_up(original.decode(ids))


def test_decoded_text_is_cleaned_up_whatever_the_settings_say(checkpoint):
    tokenizer = load_model("internlm", checkpoint, device="cpu").tokenizer
    assert tokenizer.clean_up_tokenization_spaces is False
    ids = tokenizer("It 's a test , is n't it ?").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "It's a test, isn't it?"


def test_special_tokens_in_the_text_are_special(checkpoint):
    loaded = load_model("internlm", checkpoint, device="cpu")
    tokenizer = loaded.tokenizer
    assert tokenizer("<s>")["input_ids"] == [1, 1]
    ids = [1, *tokenizer("fox", add_special_tokens=False).input_ids, 2]
    assert tokenizer.decode(ids) == "<s>fox</s>"
    assert tokenizer.decode(ids, skip_special_tokens=True) == "fox"


def test_chat_wrapper_and_ends_of_answer(checkpoint):
    spec = load_model("internlm", checkpoint, device="cpu").spec
    original = SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
    assert spec.chat_template == "<|User|>:{prompt}<eoh>\n<|Bot|>:"
    assert spec.stop_token_ids == (original.piece_to_id(EOA), original.eos_id())
    assert spec.stop_strings == (EOA,)
