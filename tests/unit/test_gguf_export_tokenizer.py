"""Tokenizers in the words of llama.cpp: SentencePiece's own library and transformers make the same tokens of them."""

from __future__ import annotations

import pytest
import sentencepiece
from gguf import GGUFWriter, TokenType
from sentencepiece import sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adaskip.engines.errors import ExportError
from adaskip.engines.gguf_tokenizer import add_tokenizer
from tests.checkpoints import LINES, write_family
from tests.internlm_reference import train_tokenizer

LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEXTS = ("The quick brown fox", "quickly  over the   dogs.", "Question: who? 12345", "naïve 世界 🚀\n\ttab", "a")


def fields_of(tokenizer, vocab_size: int = 600) -> dict:
    writer = GGUFWriter(None, "llama")
    add_tokenizer(writer, tokenizer, vocab_size)
    return {key.removeprefix("tokenizer."): field.value for key, field in writer.kv_data[0].items()}


def byte_level(*splits, ignore_merges: bool = False, normalizer=None, use_regex: bool = False, **special):
    """A byte-level BPE trained on a few lines, which splits text so."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    bytes_last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, bytes_last]) if splits else bytes_last
    tokenizer.decoder = decoders.ByteLevel()
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|begin|>", "<|end|>"]
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=320, special_tokens=specials, initial_alphabet=alphabet)
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token=specials[0], eos_token=specials[1], **special)


def split(regex: str):
    return pre_tokenizers.Split(Regex(regex), behavior="isolated")


@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [
        ("llama-bpe", lambda: byte_level(split(LLAMA3_REGEX), ignore_merges=True)),
        ("smaug-bpe", lambda: byte_level(split(LLAMA3_REGEX))),
        ("qwen2", lambda: byte_level(split(LLAMA3_REGEX.replace("{1,3}", "")))),
        ("smollm", lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True)),
        ("gpt-2", lambda: byte_level(use_regex=True)),
    ],
)
def test_the_way_of_splitting_text_has_llama_cpps_name(name, tokenizer):
    made = tokenizer()
    fields = fields_of(made)
    assert (fields["ggml.model"], fields["ggml.pre"], fields["ggml.add_space_prefix"]) == ("gpt2", name, False)
    assert fields["ggml.tokens"][: len(made)] == made.convert_ids_to_tokens(range(len(made)))
    assert fields["ggml.tokens"][len(made) :] == [f"[PAD{token}]" for token in range(len(made), 600)]
    assert fields["ggml.token_type"] == [TokenType.CONTROL] * 2 + [TokenType.NORMAL] * (len(made) - 2) + [
        TokenType.UNUSED
    ] * (600 - len(made))
    assert all(" " in merge.strip() for merge in fields["ggml.merges"])
    assert [fields[f"ggml.{end}_token_id"] for end in ("bos", "eos")] == [0, 1]


@pytest.mark.parametrize(
    ("tokenizer", "message"),
    [
        (lambda: byte_level(split(r"\w+")), "does not split text as this tokenizer does"),
        (lambda: byte_level(use_regex=True, ignore_merges=True), "does not split text as this tokenizer does"),
        (lambda: byte_level(use_regex=True, normalizer=normalizers.NFC()), "does not split text .*NFC"),
        (
            lambda: PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))),
            "no tokenizer like this one .WordLevel",
        ),
        (
            lambda: byte_level(use_regex=True, extra_special_tokens=[AddedToken("<mask>", lstrip=True, special=True)]),
            "'<mask>' takes the white space",
        ),
    ],
)
def test_a_tokenizer_that_llama_cpp_does_not_have_is_refused(tokenizer, message):
    with pytest.raises(ExportError, match=message):
        fields_of(tokenizer())


def test_a_vocabulary_beyond_the_embeddings_is_refused():
    with pytest.raises(ExportError, match="has a token 308, the model 300 embeddings"):
        fields_of(byte_level(use_regex=True), vocab_size=300)


def test_without_a_tokenizer_the_file_is_of_token_ids():
    assert fields_of(None) == {"general.architecture": "llama", "ggml.model": "none"}


@pytest.mark.parametrize(("first", "last"), [(True, False), (False, False), (True, True), (False, True)])
def test_what_is_added_around_a_text_is_found_out(first, last):
    tokenizer = byte_level(use_regex=True)
    parts = ["<|begin|>"] * first + ["$A"] + ["<|end|>"] * last
    specials = [("<|begin|>", 0), ("<|end|>", 1)]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(" ".join(parts), special_tokens=specials)
    fields = fields_of(tokenizer)
    assert (fields["ggml.add_bos_token"], fields["ggml.add_eos_token"]) == (first, last)


def test_another_token_around_a_text_is_refused():
    tokenizer = byte_level(use_regex=True)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("a $A", special_tokens=[("a", 68)])
    with pytest.raises(ExportError, match=r"of 'a', .* without special tokens; allowed: bos and eos"):
        fields_of(tokenizer)


def test_the_chat_template_goes_along(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_family("llama", tmp_path))
    assert fields_of(tokenizer, len(tokenizer))["chat_template"] == tokenizer.chat_template


def sentencepiece_of(fields: dict) -> sentencepiece.SentencePieceProcessor:
    """SentencePiece's own BPE over the tokens and scores of a file, which is what llama.cpp computes."""
    model = sentencepiece_model_pb2.ModelProto()
    for text, kind, score in zip(fields["ggml.tokens"], fields["ggml.token_type"], fields["ggml.scores"], strict=True):
        model.pieces.add(piece=text, type=int(kind), score=score)
    model.trainer_spec.model_type, model.trainer_spec.byte_fallback = 2, True
    model.normalizer_spec.add_dummy_prefix = fields["ggml.add_space_prefix"]
    model.normalizer_spec.remove_extra_whitespaces = False
    processor = sentencepiece.SentencePieceProcessor()
    processor.LoadFromSerializedProto(model.SerializeToString())
    return processor


def test_a_sentencepiece_model_read_by_transformers_has_scores_that_make_its_tokens(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_family("vicuna", tmp_path))
    fields = fields_of(tokenizer, len(tokenizer))
    assert (fields["ggml.model"], fields["ggml.add_space_prefix"]) == ("llama", True)
    kinds = [TokenType.UNKNOWN, TokenType.CONTROL, TokenType.CONTROL, TokenType.USER_DEFINED]
    assert fields["ggml.token_type"][:4] == kinds
    processor = sentencepiece_of(fields)
    for text in TEXTS:
        assert processor.EncodeAsIds(text) == tokenizer(text, add_special_tokens=False).input_ids, text


def test_internlms_own_sentencepiece_goes_along_with_its_scores(tmp_path):
    from adaskip.models.internlm import InternLMTokenizer

    options = {"remove_extra_whitespaces": False, "normalization_rule_name": "identity"}
    train_tokenizer(tmp_path / "tokenizer.model", **options)
    tokenizer = InternLMTokenizer.from_pretrained(tmp_path)
    processor = sentencepiece_of(fields_of(tokenizer, len(tokenizer)))
    for text in TEXTS:
        assert processor.EncodeAsIds(text) == tokenizer(text, add_special_tokens=False).input_ids, text


def test_a_sentencepiece_that_normalises_text_is_refused(tmp_path):
    from adaskip.models.internlm import InternLMTokenizer

    train_tokenizer(tmp_path / "tokenizer.model")  # nmt_nfkc
    with pytest.raises(ExportError, match="does not normalise text; this tokenizer does: nmt_nfkc"):
        fields_of(InternLMTokenizer.from_pretrained(tmp_path))


def spaced(merges: list[tuple[str, str]], tokens: str):
    """A SentencePiece-like tokenizer.json of 256 bytes, single characters and these merges."""
    texts = [f"<0x{byte:02X}>" for byte in range(256)] + [*tokens] + ["".join(pair) for pair in merges]
    vocab = {text: token for token, text in enumerate(["<unk>", *dict.fromkeys(texts)])}
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<unk>", eos_token="<unk>")


def test_merges_that_no_scores_can_order_are_refused():
    fine = [("a", "b"), ("b", "a"), ("ab", "a"), ("a", "ba")]
    fields = fields_of(spaced(fine, "▁ab"))
    assert [-fields["ggml.scores"][fields["ggml.tokens"].index(text)] for text in ("ab", "ba", "aba")] == [0, 1, 2]
    with pytest.raises(ExportError, match="merges of 'aba' have different ranks"):
        fields_of(spaced([("a", "b"), ("b", "a"), ("ab", "a"), ("a", "a"), ("a", "ba")], "▁ab"))
    with pytest.raises(ExportError, match="'a' and 'ba' are not merged, though 'aba' is a token"):
        fields_of(spaced([("a", "b"), ("b", "a"), ("ab", "a")], "▁ab"))
