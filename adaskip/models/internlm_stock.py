"""InternLM's tokenizer as one that stock classes read without remote code, for exported checkpoints."""

from __future__ import annotations

import re
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import import_protobuf
from transformers.tokenization_utils_base import generate_merges

from adaskip.models.errors import ModelError
from adaskip.models.internlm import InternLMTokenizer

SPACE = "▁"
USER_DEFINED = 4
"""The type of pieces that are never cut or joined, as `<eoh>`."""
TEXTS = (
    "The quick brown fox, 12.5 km:  two spaces\n\n\tand a tab.\n",
    "<|User|>:Hello<eoh>\n<|Bot|>: It's here. <eoa> next</s> after",
    "  你好，世界。 naïve ﬁ ½ 😀 ",  # noqa: RUF001
    "def f(x):\n    return {'a': x ** 2}  # comment",
)
"""Of these both tokenizers must make the same ids."""


def stock_tokenizer(tokenizer: InternLMTokenizer) -> PreTrainedTokenizerFast:
    """A tokenizer with the same ids, whose files name no code. It does not clean up decoded text.

    Raises:
        ModelError: its ids of a text are others.
    """
    named = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    stock = PreTrainedTokenizerFast(
        tokenizer_object=_backend(tokenizer),
        clean_up_tokenization_spaces=False,
        padding_side=tokenizer.padding_side,
        model_max_length=tokenizer.model_max_length,
        **named,
    )
    stock.chat_template = tokenizer.chat_template
    for text in TEXTS:
        if stock(text).input_ids != tokenizer(text).input_ids:
            raise ModelError(
                f"the tokenizer of {tokenizer.name_or_path} cannot be written without remote code: a stock one makes "
                f"other tokens of {text!r}"
            )
    return stock


def _backend(tokenizer: InternLMTokenizer) -> Tokenizer:
    """SentencePiece's BPE: text gets a space in front, also after a special token, and its spaces are marks."""
    messages: Any = import_protobuf()
    proto: Any = messages.ModelProto.FromString(tokenizer.sp_model.serialized_model_proto())
    vocabulary = {piece.piece: token for token, piece in enumerate(proto.pieces)}
    merges = generate_merges(vocabulary, {piece.piece: piece.score for piece in proto.pieces})
    backend = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=merges,
            unk_token=str(tokenizer.unk_token),
            fuse_unk=True,
            byte_fallback=True,
            ignore_merges=True,
        )
    )
    backend.normalizer = _normalizer(proto.normalizer_spec)
    if whole := [re.escape(piece.piece) for piece in proto.pieces if piece.type == USER_DEFINED]:
        backend.pre_tokenizer = pre_tokenizers.Split(Regex("|".join(whole)), "isolated")
    backend.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    first, last = _ends(tokenizer)
    backend.post_processor = processors.TemplateProcessing(
        single=[*first, "$A", *last], special_tokens=[(token, vocabulary[token]) for token in (*first, *last)]
    )
    return backend


def _normalizer(spec: Any) -> normalizers.Normalizer:
    steps: list[normalizers.Normalizer] = []
    if spec.precompiled_charsmap:
        steps.append(normalizers.Precompiled(spec.precompiled_charsmap))
    if spec.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" +"), " ")]
    if spec.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    return normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])


def _ends(tokenizer: InternLMTokenizer) -> tuple[list[str], list[str]]:
    """The tokens that go before and after a text."""
    plain, whole = (tokenizer("a", add_special_tokens=added).input_ids for added in (False, True))
    start = next(i for i in range(len(whole)) if whole[i : i + len(plain)] == plain)
    first, last = whole[:start], whole[start + len(plain) :]
    return tokenizer.convert_ids_to_tokens(first), tokenizer.convert_ids_to_tokens(last)
