"""The wrapper of a prompt: a text with one `{prompt}`, given or taken from a tokenizer's chat template."""

from __future__ import annotations

from transformers import PreTrainedTokenizerBase

from adaskip.models.errors import ModelError, said_in_one_line


def check_chat(chat: str) -> None:
    """ModelError unless `chat` is "none", "template" or a text with one `{prompt}` (or `{prompt|trim}`)."""
    if chat not in ("none", "template") and chat.count("{prompt}") + chat.count("{prompt|trim}") != 1:
        raise ModelError(f"chat must be 'none', 'template' or a text with one {{prompt}}, not {chat!r}")


def wrapper(chat: str, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """The text with `{prompt}` that `chat` stands for.

    Raises:
        ModelError: there is no chat template, or it does more to a prompt than to drop the white space around it.
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
            "the tokenizer's chat template drops some of the white space around a prompt: give a text with {prompt}"
        )
    # The tokenizer puts its own begin-of-text in front when the wrapped prompt is tokenised.
    begins = tokenizer("", add_special_tokens=True).input_ids[:1] == [tokenizer.bos_token_id]
    return text.removeprefix(str(tokenizer.bos_token)) if begins else text


def _one_turn(tokenizer: PreTrainedTokenizerBase, content: str) -> str:
    messages = [{"role": "user", "content": content}]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
