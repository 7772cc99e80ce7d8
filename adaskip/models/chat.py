"""The chat wrapper of a prompt: a text with one `{prompt}`, given by the user or taken from a chat template."""

from __future__ import annotations

import re
from datetime import date

from transformers import PreTrainedTokenizerBase

from adaskip.models.errors import ModelError, said_in_one_line

DATE = date(2024, 7, 26)
"""The date for chat templates that print today's, so that a prompt is the same every day: the one that Llama-3's
templates print without a clock."""
CLOCK = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")


def check_chat(chat: str) -> None:
    """Raise ModelError unless `chat` is "none", "template" or a text with one `{prompt}` (or `{prompt|trim}`)."""
    if chat not in ("none", "template") and chat.count("{prompt}") + chat.count("{prompt|trim}") != 1:
        raise ModelError(f"chat must be 'none', 'template' or a text with one {{prompt}}, not {chat!r}")


def wrapper(chat: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The wrapper text with `{prompt}` for `chat`; None for "none".

    Raises:
        ModelError: there is no chat template, or it changes a prompt in another way than by stripping white space.
    """
    if chat == "none":
        return None
    if chat != "template":
        return chat
    spaced = " \n{prompt} \n"
    with said_in_one_line("the tokenizer has no usable chat template"):
        text, around_spaced = (_one_turn(tokenizer, content) for content in ("{prompt}", spaced))
    check_chat(text)
    if around_spaced == text:
        text = text.replace("{prompt}", "{prompt|trim}")
    elif around_spaced != text.replace("{prompt}", spaced):
        raise ModelError(
            "the tokenizer's chat template strips only some of the white space around a prompt: give a text with "
            "{prompt} instead"
        )
    # The tokenizer adds its own begin-of-text token when the wrapped prompt is tokenised.
    begins = tokenizer("", add_special_tokens=True).input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(tokenizer.bos_token)) if begins else text


def _one_turn(tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    messages = [{"role": "user", "content": content}]
    template = CLOCK.sub(lambda call: repr(DATE.strftime(call[2])), tokenizer.get_chat_template())
    if "strftime_now(" in template:
        raise ModelError(
            "it prints the date in a way that cannot be replaced by a fixed one: give a text with {prompt} instead"
        )
    return str(
        tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, add_generation_prompt=True)
    )
