"""What stands around the user's turn: the system turn, options of the chat template, the beginning of a text."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from helpers.passages import PROTOCOL
from helpers.tokenizers import CHATML, IM_END, IM_START, byte_tokenizer
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec

BOS = "<|begin|>"
THINKING = CHATML + "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
DEFAULT_SYSTEM = "{% if messages[0].role != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}" + CHATML


def codec_with(template: str | None = None, bos: bool = False, adds_bos: bool = False) -> TokenCodec:
    """Bytes, with a chat template, a token for the beginning of a text, and a tokenizer that sets it itself."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    if bos:
        tokenizer.add_special_tokens({"bos_token": BOS})
    if adds_bos:
        marks = [(BOS, tokenizer.bos_token_id)]
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single=f"{BOS} $A", special_tokens=marks)
    return TokenCodec(tokenizer, PROTOCOL.tags)


def written(codec: TokenCodec, **options: Any) -> str:
    return codec.decode(Protocol("[{question}]", **options).prompt_ids(codec, "who?"))


# The chat


ASKED = f"{IM_START}user\n[who?]{IM_END}\n{IM_START}assistant\n"


def test_the_system_turn_comes_first_and_takes_the_place_of_a_default() -> None:
    said = f"{IM_START}system\nSearch first.{IM_END}\n"
    assert written(codec_with(CHATML)) == ASKED
    assert written(codec_with(CHATML), system="Search first.") == said + ASKED
    assert written(codec_with(DEFAULT_SYSTEM)) == f"{IM_START}system\nBe kind.{IM_END}\n{ASKED}"
    assert written(codec_with(DEFAULT_SYSTEM), system="Search first.") == said + ASKED
    assert written(codec_with(DEFAULT_SYSTEM), system="") == f"{IM_START}system\n{IM_END}\n{ASKED}"


@pytest.mark.parametrize("options", [{"use_chat_template": False}, {}])
def test_a_system_turn_needs_a_chat(options: dict[str, Any]) -> None:
    codec = codec_with(CHATML if options else None)
    with pytest.raises(ConfigError, match="model.protocol.system: expected a tokenizer with a chat template"):
        written(codec, system="Search first.", **options)


def test_options_of_the_template_reach_it() -> None:
    codec = codec_with(THINKING)
    assert written(codec) == written(codec, chat_template_kwargs={"enable_thinking": True}) == ASKED
    assert written(codec, chat_template_kwargs={"enable_thinking": False}) == f"{ASKED}<think></think>"


def test_what_the_rollout_needs_is_not_the_templates_to_change() -> None:
    options = {"add_generation_prompt": False, "tokenize": True}
    assert written(codec_with(CHATML), chat_template_kwargs=options) == ASKED


# The beginning of a text


@pytest.mark.parametrize(
    ("adds_bos", "add_bos", "begins"),
    [
        (True, None, True),
        (True, True, True),
        (True, False, False),
        (False, None, False),
        (False, True, True),
        (False, False, False),
    ],
)
def test_a_prompt_begins_as_the_tokenizer_begins_a_text(adds_bos: bool, add_bos: bool | None, begins: bool) -> None:
    codec = codec_with(bos=True, adds_bos=adds_bos)
    assert written(codec, add_bos=add_bos) == (BOS if begins else "") + "[who?]"


def test_only_a_prompt_begins_a_text() -> None:
    codec = codec_with(bos=True, adds_bos=True)
    assert codec.tokenizer("x")["input_ids"][0] == codec.tokenizer.bos_token_id, "it would"
    assert codec.tokenizer.bos_token_id not in (*codec.encode("x"), *codec.encode_data("x"), *codec.encode_prompt("x"))
    assert codec.tokenizer.bos_token_id not in PROTOCOL.observation_ids(codec, "x")


def test_a_chat_template_has_its_own_beginning() -> None:
    codec = codec_with(BOS + CHATML, bos=True, adds_bos=True)
    assert written(codec) == written(codec, add_bos=False) == BOS + ASKED


def test_a_beginning_that_is_not_there_is_refused() -> None:
    with pytest.raises(ConfigError, match="add_bos is true, but the tokenizer has no beginning-of-text token"):
        written(codec_with(), add_bos=True)


def test_the_helpers_tokenizer_is_what_it_says() -> None:
    assert isinstance(codec_with(bos=True).tokenizer, PreTrainedTokenizerFast)
    assert codec_with().bos_ids == codec_with(bos=True).bos_ids == ()
    codec = codec_with(bos=True, adds_bos=True)
    assert codec.bos_ids == (codec.tokenizer.bos_token_id,)
