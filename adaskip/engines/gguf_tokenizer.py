"""A tokenizer of transformers in the words of llama.cpp, where llama.cpp cuts text in the same way.

llama.cpp has two that Llamas use: `gpt2`, byte-level BPE with a list of merges after a fixed way of splitting text
(`tokenizer.ggml.pre`), and `llama`, SentencePiece's BPE, which joins the two neighbours whose union has the highest
score. A tokenizer.json of the second kind holds merges instead of scores; the rank of a token's merges is its score.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from gguf import GGUFWriter, TokenType
from transformers import PreTrainedTokenizerBase

from adaskip.engines.errors import ExportError

logger = logging.getLogger(__name__)

CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"|[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
GPT2 = {**BYTES, "use_regex": True}


def _sequence(*parts: dict[str, Any]) -> dict[str, Any]:
    return {"type": "Sequence", "pretokenizers": list(parts)}


def _split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


LLAMA3 = _sequence(_split(CONTRACTIONS + WORDS + r"|\p{N}{1,3}" + REST), BYTES)
PRE_TOKENIZERS: tuple[tuple[str, dict[str, Any], bool], ...] = (
    ("llama-bpe", LLAMA3, True),
    ("smaug-bpe", LLAMA3, False),
    ("qwen2", _sequence(_split(CONTRACTIONS + WORDS + r"|\p{N}" + REST), BYTES), False),
    ("smollm", _sequence({"type": "Digits", "individual_digits": True}, GPT2), False),
    ("gpt-2", GPT2, False),
)
"""llama.cpp's name of a way to split text, the tokenizer.json that says the same, and whether words of the vocabulary
are taken whole (`ignore_merges`)."""
SPACE = "▁"
TO_SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
METASPACE = {"type": "Metaspace", "replacement": SPACE, "split": False}
SPACED: tuple[tuple[dict[str, Any] | None, dict[str, Any] | None, bool], ...] = (
    ({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": SPACE}, TO_SPACE]}, None, True),
    *((None, {**METASPACE, "prepend_scheme": scheme}, scheme != "never") for scheme in ("first", "always", "never")),
    (TO_SPACE, None, False),
)
"""Normalizer and pre-tokenizer of a SentencePiece BPE, and whether a space goes in front of a text."""
IGNORED = ("trim_offsets",)
"""Fields of a pre-tokenizer that change no token."""
NO_SCORE = -1e6
"""Of tokens that no merge makes."""
SENTENCEPIECE_BPE = 2
"""`model_type` of a SentencePiece model file."""


@dataclass(frozen=True)
class Vocabulary:
    """What llama.cpp has to know of a tokenizer's tokens.

    model: gpt2 or llama. tokens: texts by id. types: by id, where not NORMAL. scores: by id, for llama. pre, merges: for
    gpt2. space_prefix: a space goes in front of a text.
    """

    model: str
    tokens: dict[int, str]
    types: dict[int, TokenType]
    scores: dict[int, float] | None = None
    pre: str = "default"
    merges: list[str] | None = None
    space_prefix: bool = False


def add_tokenizer(
    writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase | None, vocab_size: int, ends: Sequence[int] = ()
) -> None:
    """Add a tokenizer's fields; without one, the file takes and gives token ids.

    ends: tokens that end an answer beside the tokenizer's end of text.

    Raises:
        ExportError: llama.cpp has no tokenizer that makes the same tokens.
    """
    if tokenizer is None:
        writer.add_tokenizer_model("none")
        return
    vocabulary = vocabulary_of(tokenizer)
    if (most := max(vocabulary.tokens)) >= vocab_size:
        raise ExportError(f"the tokenizer has a token {most}, the model {vocab_size} embeddings")
    ids = range(vocab_size)
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list([vocabulary.tokens.get(token, f"[PAD{token}]") for token in ids])
    kinds = {token: vocabulary.types.get(token, TokenType.NORMAL) for token in vocabulary.tokens}
    writer.add_token_types([kinds.get(token, TokenType.UNUSED) for token in ids])
    if vocabulary.scores is not None:
        writer.add_token_scores([vocabulary.scores.get(token, NO_SCORE) for token in ids])
    if vocabulary.merges is not None:
        writer.add_token_merges(vocabulary.merges)
    writer.add_add_space_prefix(vocabulary.space_prefix)
    _add_special(writer, tokenizer)
    further = [token for token in dict.fromkeys(ends) if token != tokenizer.eos_token_id]
    if len(further) > 2:
        logger.warning(
            "%d tokens end an answer, of which llama.cpp knows three; left out: %s", 1 + len(further), further[2:]
        )
    for add, token in zip((writer.add_eot_token_id, writer.add_eom_token_id), further, strict=False):
        add(token)


def vocabulary_of(tokenizer: Any) -> Vocabulary:
    """A tokenizer's tokens. Raises ExportError where llama.cpp cuts text in another way."""
    if (model := getattr(tokenizer, "sp_model", None)) is not None:
        return _of_sentencepiece(model.serialized_model_proto())
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is None:
        raise ExportError(f"{type(tokenizer).__name__} is neither SentencePiece nor of the tokenizers library")
    spec = json.loads(backend.to_str())
    model = spec["model"]
    if model["type"] != "BPE" or any(
        model.get(name) for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
    ):
        raise ExportError(f"llama.cpp has no tokenizer like this one ({model['type']}); allowed: plain BPE, or none")
    merges = [pair if isinstance(pair, list) else pair.split(" ", 1) for pair in model["merges"]]
    tokens = {token: text for text, token in model["vocab"].items()}
    types = _added(spec["added_tokens"], tokens)
    if model.get("byte_fallback"):
        unknown = {} if tokenizer.unk_token_id is None else {tokenizer.unk_token_id: TokenType.UNKNOWN}
        return _of_spaced(spec, tokens, types | unknown, merges)
    return _of_bytes(spec, tokens, types, merges)


def _added(added: list[dict[str, Any]], tokens: dict[int, str]) -> dict[int, TokenType]:
    """The types of added tokens, whose texts go among `tokens`."""
    types = {}
    for token in added:
        if token["single_word"] or token["lstrip"] or token["rstrip"]:
            raise ExportError(f"the added token {token['content']!r} takes the white space around it, or whole words")
        tokens[token["id"]] = token["content"]
        types[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    return types


def _of_bytes(spec: Any, tokens: dict[int, str], types: dict[int, TokenType], merges: list[list[str]]) -> Vocabulary:
    found = (spec["normalizer"], _essence(spec["pre_tokenizer"]), bool(spec["model"].get("ignore_merges")))
    pre = next((name for name, split, whole in PRE_TOKENIZERS if found == (None, split, whole)), None)
    if pre is None:
        known = ", ".join(name for name, *_ in PRE_TOKENIZERS)
        raise ExportError(
            f"llama.cpp does not split text as this tokenizer does (normalizer {json.dumps(found[0])}, pre-tokenizer "
            f"{json.dumps(found[1])[:200]}); allowed: those that llama.cpp calls {known}"
        )
    return Vocabulary("gpt2", tokens, types, pre=pre, merges=[" ".join(pair) for pair in merges])


def _of_spaced(spec: Any, tokens: dict[int, str], types: dict[int, TokenType], merges: list[list[str]]) -> Vocabulary:
    found = (spec["normalizer"], _essence(spec["pre_tokenizer"]))
    prefix = next((prefix for *parts, prefix in SPACED if found == tuple(parts)), None)
    if prefix is None:
        raise ExportError(
            f"llama.cpp's SentencePiece neither normalises nor splits text as this tokenizer does "
            f"({json.dumps(found)[:200]}); allowed: spaces become {SPACE}"
        )
    ids = {text: token for token, text in tokens.items()}
    byte_tokens = {ids[text] for text in (f"<0x{byte:02X}>" for byte in range(256)) if text in ids}
    if len(byte_tokens) < 256:
        raise ExportError(f"the tokenizer has {len(byte_tokens)} of 256 byte tokens, which llama.cpp needs")
    types |= dict.fromkeys(byte_tokens, TokenType.BYTE)
    scores = _scores(merges, ids, {tokens[token] for token in types})
    return Vocabulary("llama", tokens, types, scores=scores, space_prefix=prefix)


def _scores(merges: list[list[str]], ids: dict[str, int], special: Iterable[str]) -> dict[int, float]:
    """Scores of tokens with which llama.cpp joins what the merges join, in their order.

    Raises:
        ExportError: there are none: a token's merges are not one after the other, or some are missing.
    """
    order: dict[str, int] = {}
    last = None
    for rank, pair in enumerate(merges):
        text = "".join(pair)
        if text != last and text in order:
            raise ExportError(f"merges of {text!r} have different ranks, where SentencePiece has one score for a token")
        order.setdefault(text, rank)
        last = text
    listed = {tuple(pair) for pair in merges}
    for text in ids.keys() - set(special):
        for cut in range(1, len(text)):
            pair = (text[:cut], text[cut:])
            if pair[0] in ids and pair[1] in ids and pair not in listed:
                raise ExportError(f"{pair[0]!r} and {pair[1]!r} are not merged, though {text!r} is a token")
    return {ids[text]: -float(rank) for text, rank in order.items()}


def _of_sentencepiece(proto: bytes) -> Vocabulary:
    from sentencepiece import sentencepiece_model_pb2

    model: Any = sentencepiece_model_pb2.ModelProto()  # type: ignore[attr-defined]  # made at run time
    model.ParseFromString(proto)
    normalizer = model.normalizer_spec
    if model.trainer_spec.model_type != SENTENCEPIECE_BPE or not model.trainer_spec.byte_fallback:
        raise ExportError("llama.cpp's SentencePiece is BPE with byte fallback; this tokenizer is another")
    if normalizer.precompiled_charsmap or normalizer.remove_extra_whitespaces:
        raise ExportError(f"llama.cpp's SentencePiece does not normalise text; this tokenizer does: {normalizer.name}")
    types = {token: TokenType(piece.type) for token, piece in enumerate(model.pieces) if piece.type != TokenType.NORMAL}
    tokens = {token: piece.piece for token, piece in enumerate(model.pieces)}
    scores = {token: piece.score for token, piece in enumerate(model.pieces)}
    return Vocabulary("llama", tokens, types, scores=scores, space_prefix=normalizer.add_dummy_prefix)


def _essence(part: Any) -> Any:
    """A part of a tokenizer.json without fields that change no token."""
    if isinstance(part, dict):
        return {name: _essence(value) for name, value in part.items() if name not in IGNORED}
    return [_essence(value) for value in part] if isinstance(part, list) else part


def _add_special(writer: GGUFWriter, tokenizer: Any) -> None:
    """Beginning and end of text, what is added to every text, and the chat template."""
    for name in ("bos", "eos", "unk", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            getattr(writer, f"add_{name}_token_id")(token)
    plain = tokenizer("a", add_special_tokens=False).input_ids
    whole = tokenizer("a").input_ids
    around = {
        (first, last): [tokenizer.bos_token_id] * first + plain + [tokenizer.eos_token_id] * last
        for first in (0, 1)
        for last in (0, 1)
    }
    added = next((ends for ends, ids in around.items() if ids == whole), None)
    if added is None:
        raise ExportError(f"the tokenizer makes {whole} of 'a', {plain} without special tokens; allowed: bos and eos")
    writer.add_add_bos_token(bool(added[0]))
    writer.add_add_eos_token(bool(added[1]))
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.get_chat_template())
