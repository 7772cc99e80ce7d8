"""Chat wrappers: LongBench's own, and the tokenizer's chat template as text with one place for the prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from adaskip.benchmarks.longbench import TASKS
from adaskip.benchmarks.prompts import build_prompt_ids
from adaskip.models.chat import wrapper
from adaskip.models.loading import load_model, load_tokenizer
from adaskip.models.registry import registry
from tests import family_snapshots
from tests.checkpoints import CHAT_TEMPLATE
from tests.family_snapshots import refused

no_network = family_snapshots.no_network
snapshots = family_snapshots.snapshots
damaged = family_snapshots.damaged


def test_chat_wrappers_are_longbenchs():
    assert registry()["llama"].chat == "none"
    assert registry()["internlm"].chat == "<|User|>:{prompt}<eoh>\n<|Bot|>:"
    assert registry()["vicuna"].chat == (
        "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
        "detailed, and polite answers to the user's questions. USER: {prompt} ASSISTANT:"
    )


def test_tokenizers_own_chat_template(snapshots):
    loaded = load_model("llama", snapshots["llama"], device="cpu", chat="template")
    assert loaded.spec.chat_template == (
        "<|start_header_id|>user<|end_header_id|>\n\n{prompt|trim}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    prompt = TASKS["multifieldqa_en"].template.format(context="She jumps.", input="who?")
    ids = build_prompt_ids(prompt, loaded.tokenizer, 500, loaded.spec.chat_template)
    begin = loaded.tokenizer.bos_token_id
    assert ids[0] == begin
    assert begin not in ids[1:]


def with_chat_template(folder: Path, content: str) -> None:
    """The snapshot's chat template with `content` in the place of `message['content'] | trim`."""
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE.replace("message['content'] | trim", content))


@pytest.mark.parametrize("content", ["message['content'] | trim", "message['content']"])
@pytest.mark.parametrize("context", ["text", " \n text {prompt} {prompt|trim} {} \t\n"])
def test_wrapping_equals_the_tokenizers_own_whatever_white_space_is_around_a_prompt(damaged, content, context):
    with_chat_template(damaged, content)
    loaded = load_model("llama", damaged, device="cpu", chat="template")
    tokenizer, spec = loaded.tokenizer, loaded.spec
    for template in ("{context}", TASKS["passage_count"].template):
        prompt = template.format(context=context)
        ids = build_prompt_ids(prompt, tokenizer, 5000, spec.chat_template)
        messages = [{"role": "user", "content": prompt}]
        assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)


def test_a_chat_template_that_prints_todays_date_prints_the_same_one_every_day(damaged):
    (damaged / "chat_template.jinja").write_text("Today: {{ strftime_now('%d %b %Y') }}\n{{ messages[0].content }}:")
    assert wrapper("template", load_tokenizer(damaged)) == "Today: 26 Jul 2024\n{prompt}:"


def test_a_chat_template_whose_date_cannot_be_fixed_is_refused(damaged):
    (damaged / "chat_template.jinja").write_text("{% set f = '%d' %}{{ strftime_now(f) }} {{ messages[0].content }}:")
    assert "prints the date in a way that cannot be replaced" in refused("llama", damaged, chat="template")


def test_a_chat_template_that_drops_white_space_on_one_side_only_is_refused(damaged):
    with_chat_template(damaged, "message['content'].rstrip()")
    assert "strips only some of the white space around a prompt" in refused("llama", damaged, chat="template")


def test_chat_choices_are_checked(snapshots):
    assert load_model("vicuna", snapshots["vicuna"], device="cpu", chat="none").spec.chat_template is None
    assert load_model("llama", snapshots["llama"], device="cpu", chat="Q: {prompt}").spec.chat_template == "Q: {prompt}"
    assert "text with one {prompt}" in refused("llama", snapshots["llama"], chat="templates")
    assert "no usable chat template" in refused("vicuna", snapshots["vicuna"], chat="template")
