"""Token ids of prompts, cut in the middle, wrapped and tokenised as LongBench does, and of the answers that follow."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SEAM_TOKENS = 8
"""Last tokens of a prompt that a reference answer is tokenised after."""


def build_prompt_ids(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    max_prompt_tokens: int,
    chat_template: str | None = None,
) -> list[int]:
    """Token ids of a prompt.

    One of more than `max_prompt_tokens` loses its middle. The cut is on token ids, but what goes on is the decoded
    text, wrapped and tokenised again: the result may differ from the limit by the wrapper and by tokens at the seam.

    Args:
        max_prompt_tokens: the model's limit before wrapping (llama 31500, internlm 7500, vicuna 15500).
        chat_template: text with `{prompt}`, or with `{prompt|trim}` for a wrapper that drops the white space around a
            prompt. None: no wrapper.

    Raises:
        ValueError: the limit is below 2, or the chat template has no `{prompt}`.
    """
    if max_prompt_tokens < 2:
        raise ValueError(f"max_prompt_tokens is {max_prompt_tokens}, it must be at least 2")
    prompt = _cut_middle(prompt, tokenizer, max_prompt_tokens)
    return _tokenise(prompt if chat_template is None else _wrap(prompt, chat_template), tokenizer)


def build_reference_ids(
    answer: str, prompt_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase, max_tokens: int
) -> list[int]:
    """Token ids of an answer as it would follow the prompt, at most `max_tokens`; none if it is empty.

    A space stands between them unless the prompt ends in white space. The answer is tokenised together with the end of
    the prompt, since some tokenizers put a space before whatever they begin with.
    """
    answer = answer.strip()
    if not answer:
        return []
    seam = str(tokenizer.decode(list(prompt_ids[-SEAM_TOKENS:])))
    follows = answer if seam[-1:].isspace() else f" {answer}"
    before, both = (tokenizer(text, add_special_tokens=False).input_ids for text in (seam, seam + follows))
    if both[: len(before)] != before:  # the seam became another token
        return list(tokenizer(follows, add_special_tokens=False).input_ids)[:max_tokens]
    return list(both[len(before) :])[:max_tokens]


def count_tokens(prompt: str, tokenizer: PreTrainedTokenizerBase) -> int:
    """Tokens of a prompt before it is cut and wrapped: what `max_prompt_tokens` limits."""
    return len(_tokenise(prompt, tokenizer))


def _cut_middle(prompt: str, tokenizer: PreTrainedTokenizerBase, max_tokens: int) -> str:
    ids = _tokenise(prompt, tokenizer)
    if len(ids) <= max_tokens:
        return prompt
    half = max_tokens // 2
    start, end = (tokenizer.decode(part, skip_special_tokens=True) for part in (ids[:half], ids[-half:]))
    return f"{start}{end}"


def _wrap(prompt: str, chat_template: str) -> str:
    # Not str.format: a template may hold other braces.
    if "{prompt|trim}" in chat_template:
        return chat_template.replace("{prompt|trim}", prompt.strip())
    if "{prompt}" not in chat_template:
        raise ValueError(f"the chat template has no {{prompt}}: {chat_template!r}")
    return chat_template.replace("{prompt}", prompt)


def _tokenise(text: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return list(tokenizer(text, truncation=False, verbose=False).input_ids)
