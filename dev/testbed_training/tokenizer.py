"""A word-level tokenizer over the testbed's closed vocabulary; decoding gives back the text exactly.

A space belongs to the token after it, as in byte-level BPE, so " Oslo" and "Oslo" are two tokens.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaskip.benchmarks.longbench import TASKS
from adaskip.testbed import lexicon as lex
from adaskip.testbed.tasks import GENERATORS

PAD, EOS, UNK = SPECIAL = ("<pad>", "<eos>", "<unk>")
PAD_ID, EOS_ID = 0, 1
PIECES = Regex(r" ?\w+| ?[^\w\s]|\n|\s")
LINE_STARTS = ("What", "Question", "Answer", "Type", "Passage", "Section", "Finding", "Headline")
SENTENCE_WORDS = (*LINE_STARTS, "the", "to", "is", "are", "said", "about", "from", "?", ".", ":")


def vocabulary() -> list[str]:
    """Every token, in a fixed order."""
    pre = pre_tokenizers.Split(PIECES, behavior="isolated")
    pieces = [piece for task in GENERATORS for piece, _ in pre.pre_tokenize_str(TASKS[task].template)]
    pieces = [piece for piece in pieces if piece not in ("{", "}", " {")]
    words = [
        *SENTENCE_WORDS,
        *(str(i) for i in range(1, 13)),
        *(word for words in lex.LEXICON.values() for word in words),
    ]
    pieces += ["\n", " ", *LINE_STARTS, *lex.OPENERS, "?", ".", ":", ","] + [f" {word}" for word in words]
    return [*SPECIAL, *dict.fromkeys(pieces)]


def build_tokenizer(model_max_length: int = 1280) -> PreTrainedTokenizerFast:
    """The tokenizer, as `AutoTokenizer` would load it."""
    tokens = vocabulary()
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token=UNK))
    core.pre_tokenizer = pre_tokenizers.Split(PIECES, behavior="isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
