"""Which tokens end a turn: what tokenizer, model and chat template say together, or what the user says."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import GenerationConfig

from helpers.models import tiny_model
from helpers.passages import PROTOCOL
from helpers.tokenizers import CHATML, EOS, IM_END, byte_tokenizer
from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.module import SDSearchModule
from sdsearch_lightning.policy.loading import ScratchModel
from sdsearch_lightning.protocol.conversation import Conversation, Stop
from sdsearch_lightning.protocol.tokenization import TokenCodec, closing_token, end_of_turn_ids
from sdsearch_lightning.supervised import SupervisedModule
from sdsearch_lightning.types import Limits, Question, RolloutRequest, StopReason

TURN_END = "<end_of_turn>"
STRICT = "{{ raise_exception('only user turns') }}"


def tokenizer_with(template: str | None = None) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [IM_END, TURN_END]})
    tokenizer.chat_template = template
    return tokenizer


def ends(
    template: str | None = None, eos_token_id: Any = None, kind: type = SDSearchModule, **options: Any
) -> list[str]:
    """Texts of the tokens that end a turn, once a module has model and tokenizer."""
    tokenizer = tokenizer_with(template)
    model = tiny_model(tokenizer=tokenizer)
    ids = None if eos_token_id is None else tokenizer.convert_tokens_to_ids(eos_token_id)
    model.generation_config = GenerationConfig(eos_token_id=ids)
    module = kind(scratch=ScratchModel(), protocol=PROTOCOL, **options)
    module.attach(model, tokenizer)
    return [module.codec.decode([token_id]) for token_id in module.codec.eos_ids]


@pytest.mark.parametrize("kind", [SDSearchModule, SupervisedModule])
@pytest.mark.parametrize(
    ("template", "model", "expected"),
    [
        (None, None, [EOS]),
        (None, EOS, [EOS]),
        (None, TURN_END, [EOS, TURN_END]),  # one id, as most generation configs have it
        (None, [EOS, TURN_END], [EOS, TURN_END]),  # Gemma-it: 1 and 106
        (CHATML, None, [EOS, IM_END]),  # Qwen2.5 base: <|im_end|> of its template
        (CHATML, [TURN_END, IM_END], [EOS, TURN_END, IM_END]),
        (STRICT, TURN_END, [EOS, TURN_END]),
    ],
)
def test_all_that_ends_a_turn_is_taken_together(
    kind: type, template: str | None, model: Any, expected: list[str]
) -> None:
    assert ends(template, model, kind) == expected


def test_what_the_user_says_counts_alone() -> None:
    assert ends(CHATML, TURN_END, eos_tokens=[TURN_END]) == [TURN_END]
    assert ends(CHATML, TURN_END, eos_tokens=[]) == []
    with pytest.raises(ConfigError, match=r"model\.eos_tokens: expected tokens of the tokenizer, found <end>, <eot>\."):
        ends(eos_tokens=["<end>", EOS, "<eot>"])


def test_what_a_template_closes_a_turn_with() -> None:
    tokenizer = tokenizer_with(CHATML)
    assert closing_token(tokenizer) == tokenizer.convert_tokens_to_ids(IM_END)
    for template in (None, STRICT, "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"):
        tokenizer.chat_template = template
        assert closing_token(tokenizer) is None
    assert end_of_turn_ids(tokenizer) == (tokenizer.eos_token_id,)


@pytest.mark.parametrize("end", [EOS, IM_END, TURN_END])
def test_each_of_them_ends_a_turn(end: str) -> None:
    tokenizer = tokenizer_with(CHATML)
    others = tokenizer.convert_tokens_to_ids([TURN_END])
    codec = TokenCodec(tokenizer, PROTOCOL.tags, end_of_turn_ids(tokenizer, others))
    request = RolloutRequest(Question("q", "who", ("x",)), (0, 0), 0, PROTOCOL.prompt_ids(codec, "who"), seed=0)
    conversation = Conversation(request, PROTOCOL, codec, Limits(max_invalid_actions=0))
    *said, last = [conversation.accept(token, -1.0) for token in codec.encode(f"well{end}")]
    assert not any(isinstance(event, Stop) for event in said)
    assert isinstance(last, Stop) and conversation.stop_reason is StopReason.MALFORMED
