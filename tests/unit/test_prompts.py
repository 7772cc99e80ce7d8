"""Prompt ids equal an independent straight-line version of LongBench's pred.py, over odd cases."""

import re
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from adaskip import testbed
from adaskip.benchmarks import prompts
from adaskip.benchmarks.longbench import TASKS, LongBench
from adaskip.benchmarks.prompts import build_reference_ids
from adaskip.models.internlm import InternLMTokenizer
from adaskip.models.loading import load_tokenizer
from adaskip.models.source import find_source
from adaskip.runs.records import prompt_ids
from tests.internlm_reference import clean_up, train_tokenizer
from tests.smollm2 import ONE_PROCESS

CHAT = '<|User|>:{prompt}<eoh>\n<|Bot|>: {"json": {}}'
PUNCTUATION = "It 's odd , is n't it ? We 've seen it ! 'm 're . "
MULTI_BYTE = "Zoë wrote “naïve” – 第三段落：北京欢迎你。 👩‍👩‍👧 a\u0301 \u2028 end"  # noqa: RUF001


def byte_level() -> PreTrainedTokenizerFast:
    """Byte-level BPE, as Llama 3's: a cut may fall inside a character."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<bos>", "<eos>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([task.template for task in TASKS.values()], trainer)
    bos = tokenizer.token_to_id("<bos>")
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", bos)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def byte_fallback() -> PreTrainedTokenizerFast:
    """SentencePiece's shape, as Vicuna's and InternLM's: spaces are letters, unknown characters become bytes."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for character in "▁abcdefghijklmnopqrstuvwxyzAQ:.,":
        vocab[character] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def internlm() -> InternLMTokenizer:
    """SentencePiece itself, and decoded text loses spaces in front of punctuation."""
    with tempfile.TemporaryDirectory() as folder:
        train_tokenizer(Path(folder) / "tokenizer.model")
        return InternLMTokenizer.from_pretrained(folder, local_files_only=True)


def smollm2() -> PreTrainedTokenizerBase:
    """A real one, which is read from a GGUF file."""
    return load_tokenizer(find_source("smollm2").path)


MAKERS = [byte_level, byte_fallback, internlm, pytest.param(smollm2, marks=(ONE_PROCESS, pytest.mark.slow))]


@pytest.fixture(scope="module", params=MAKERS, ids=lambda maker: maker.__name__)
def tokenizer(request):
    return request.param()


def straight_line(record, template, in_chat, tokenizer, max_length, chat_template):
    """What LongBench's get_pred does up to `generate`, line by line."""
    encode, decode = straight_line_tokenizer(tokenizer)
    prompt = template.format(**record)
    tokenized_prompt = encode(prompt)
    if len(tokenized_prompt) > max_length:
        half = int(max_length / 2)
        prompt = decode(tokenized_prompt[:half]) + decode(tokenized_prompt[-half:])
    if in_chat and chat_template:
        before, after = chat_template.split("{prompt}")
        prompt = before + prompt + after
    return encode(prompt)


def straight_line_tokenizer(tokenizer):
    """The two functions that get_pred uses; InternLM's on its SentencePiece model, as its published class has them."""
    if not isinstance(tokenizer, InternLMTokenizer):
        return (
            lambda text: tokenizer(text, truncation=False, return_tensors="pt").input_ids[0].tolist(),
            lambda ids: tokenizer.decode(ids, skip_special_tokens=True),
        )
    original: SentencePieceProcessor = tokenizer.sp_model
    special = {original.unk_id(), original.bos_id(), original.eos_id()}
    return (
        lambda text: [original.bos_id(), *original.encode(text)],
        lambda ids: clean_up(original.decode([token for token in ids if token not in special])),
    )


def record(context: str, question: str = "Who?") -> dict:
    return {"input": question, "context": context, "answers": ["x"], "length": 1, "all_classes": None, "_id": "id1"}


def build_prompt_ids(sample, spec, tokenizer, limit, chat_template=None) -> list[int]:
    """What a run of LongBench gives a model of that tokenizer, limit and wrapper."""
    model = SimpleNamespace(max_prompt_tokens=limit, chat_template=chat_template)
    loaded: Any = SimpleNamespace(tokenizer=tokenizer, spec=model)
    (ids,) = prompt_ids(LongBench(), spec.name, [sample], loaded)
    return ids.tolist()


def num_tokens(sample, task, tokenizer) -> int:
    return len(tokenizer(task.template.format(**sample)).input_ids)


@pytest.mark.parametrize("chat_template", [None, CHAT])
@pytest.mark.parametrize("over", [-1, 0, 1, 2, 3, 40], ids="over{}".format)
@pytest.mark.parametrize("task", ["qasper", "trec", "multifieldqa_zh", "passage_count", "lcc"])
def test_prompt_ids_equal_the_straight_line_version(tokenizer, task, over, chat_template):
    spec, sample = TASKS[task], record(PUNCTUATION + MULTI_BYTE * 3 + " {braces} %s", PUNCTUATION)
    limit = num_tokens(sample, spec, tokenizer) - over
    expected = straight_line(sample, spec.template, task not in {"trec", "lcc"}, tokenizer, limit, chat_template)
    assert build_prompt_ids(sample, spec, tokenizer, limit, chat_template) == expected


@settings(max_examples=60, deadline=None)
@given(context=st.text(max_size=200), question=st.text(max_size=20), limit=st.integers(2, 120), chat=st.booleans())
def test_any_text_and_any_limit_equal_the_straight_line_version(tokenizer, context, question, limit, chat):
    sample, spec = record(context, question), TASKS["triviaqa" if limit % 2 else "multifieldqa_en"]
    template = CHAT if chat else None
    expected = straight_line(sample, spec.template, limit % 2 == 0, tokenizer, limit, template)
    assert build_prompt_ids(sample, spec, tokenizer, limit, template) == expected


def test_a_prompt_that_fits_is_not_touched(tokenizer):
    sample, spec = record("short"), TASKS["trec"]
    ids = tokenizer(spec.template.format(**sample)).input_ids
    assert build_prompt_ids(sample, spec, tokenizer, len(ids)) == ids


def test_one_token_over_costs_the_middle_and_keeps_both_ends():
    """Words as tokens, so that the cut can be seen: 9 tokens with a limit of 8 keep the first 4 and the last 4."""
    words = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    vocab = {word: number for number, word in enumerate(["?", *words, "A", "B"])}
    tokenizer = Tokenizer(models.WordLevel(vocab, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
    text = " ".join(words)

    assert prompts.build_prompt_ids(text, fast, 9) == list(range(1, 10))
    # the joined halves have no space between them: "four" + "six" becomes one unknown word, as in the original
    assert prompts.build_prompt_ids(text, fast, 8) == [1, 2, 3, 0, 7, 8, 9]
    assert prompts.build_prompt_ids(text, fast, 9, "A {prompt} B") == [10, *range(1, 10), 11]


def test_the_odd_half_is_rounded_down(tokenizer):
    sample, spec = record("word " * 50), TASKS["qasper"]
    assert build_prompt_ids(sample, spec, tokenizer, 21) == build_prompt_ids(sample, spec, tokenizer, 20)


def test_the_chat_wrapper_survives_the_cut(tokenizer):
    ids = build_prompt_ids(record("word " * 200), TASKS["qasper"], tokenizer, 40, CHAT)
    text = tokenizer.decode(ids, skip_special_tokens=True)
    assert text.strip().startswith("<|User|>:You")
    assert text.endswith('<|Bot|>: {"json": {}}')


def test_whole_documents_equal_the_straight_line_version(tokenizer):
    spec = TASKS["multi_news"]
    for sample in testbed.records("multi_news", limit=3):
        assert num_tokens(sample, spec, tokenizer) > 300
        expected = straight_line(sample, spec.template, True, tokenizer, 300, CHAT)
        assert build_prompt_ids(sample, spec, tokenizer, 300, CHAT) == expected


@pytest.mark.parametrize(
    ("changes", "limit", "chat", "says"),
    [
        ({"input": None}, 100, None, "record id1 has no field 'input', which the prompt of qasper needs"),
        ({}, 1, None, "max_prompt_tokens is 1, it must be at least 2"),
        ({}, 100, "USER: ", "the chat template has no {prompt}: 'USER: '"),
    ],
)
def test_what_cannot_be_built_is_said_in_one_line(changes, limit, chat, says):
    sample = {key: value for key, value in (record("x") | changes).items() if value is not None}
    with pytest.raises(ValueError, match=re.escape(says)) as caught:
        build_prompt_ids(sample, TASKS["qasper"], byte_level(), limit, chat)
    assert str(caught.value) == says


@pytest.mark.parametrize("ending", ["Answer:", "Bot:\n"])
def test_a_reference_follows_its_prompt_as_one_text_would_be_tokenised(tokenizer, ending):
    prompt = f"the context of a question. {ending}"
    ids = tokenizer(prompt).input_ids
    answer = LongBench().reference("qasper", {**record("x"), "answers": ["  a town, quite far ", "another"]})
    between = "" if ending[-1].isspace() and str(tokenizer.decode(ids))[-1].isspace() else " "
    expected = tokenizer(f"{prompt}{between}a town, quite far").input_ids
    made = build_reference_ids(answer, ids, tokenizer, 99)
    assert [*ids, *made] == expected
    assert build_reference_ids(answer, ids, tokenizer, 3) == made[:3]


def test_a_reference_after_a_space_brings_no_second_one():
    tokenizer = byte_level()
    ids = tokenizer("the context of a question. answer: ").input_ids
    made = build_reference_ids("a town", ids, tokenizer, 99)
    assert str(tokenizer.decode([*ids, *made], skip_special_tokens=True)).endswith("answer: a town")


def test_an_empty_reference_has_no_tokens(tokenizer):
    assert build_reference_ids(" ", tokenizer("Answer:").input_ids, tokenizer, 9) == []
