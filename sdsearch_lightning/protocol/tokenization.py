"""Between text and tokens: what is ours may hold control strings, what comes from outside never does.

Our own text (prompts, tags) is encoded as it stands. Text from outside (questions, passages, siblings' queries) first
has every control string broken by one space after its first character, so that no tokenizer, whole-word or byte-level,
can make a tag or a special token of it: `<answer>` becomes `< answer>`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from copy import deepcopy
from typing import TYPE_CHECKING

from sdsearch_lightning.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_MAX_PENDING = 4  # bytes of the longest UTF-8 character: an incomplete one is resolved by then, or never


class TokenCodec:
    """A fast Hugging Face tokenizer together with the control strings of one protocol.

    Args:
        tokenizer: any fast tokenizer.
        tags: every tag of the protocol; each must survive encode and decode.

    Raises:
        ConfigError: the tokenizer is slow, or cannot spell a tag.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, tags: Sequence[str]) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"Expected a fast tokenizer (tokenizer.json), found {type(tokenizer).__name__}: token offsets need one."
            )
        self.tokenizer = tokenizer
        # A copy: calls of the tokenizer elsewhere, or its own file, may leave it truncating or padding.
        self._backend = deepcopy(tokenizer.backend_tokenizer)  # type: ignore[attr-defined]
        self._backend.no_truncation()
        self._backend.no_padding()
        # Added tokens that are not special can be control tokens too (<tool_call>), or plain runs of spaces.
        added = [
            t.content for t in tokenizer.added_tokens_decoder.values() if t.special or re.match("<.+>$", t.content)
        ]
        controls = {*tags, *tokenizer.all_special_tokens, *added} - {""}
        self.control_strings = tuple(sorted(controls, key=lambda text: (-len(text), text)))
        self._control = re.compile("|".join(map(re.escape, self.control_strings)))
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.eos_id: int | None = tokenizer.eos_token_id
        self._check(tags)

    def _check(self, tags: Sequence[str]) -> None:
        for tag in tags:
            spelled = self.decode(self.encode(tag)).strip()
            if spelled != tag:
                raise ConfigError(
                    f"The tokenizer cannot spell the tag {tag!r}: it comes back as {spelled!r}. "
                    "Add it to the vocabulary, or choose other tags under model.protocol."
                )
        self.split_tags = tuple(tag for tag in tags if len(self.encode(tag)) > 1)
        """Tags of several tokens: legal, since boundaries are found by text offsets; straddling tokens are SCAFFOLD."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of our own text: tags and special tokens in it are meant. Nothing is added around it."""
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_data(self, text: str) -> tuple[int, ...]:
        """Token ids of text from outside, as data: no control token comes of it."""
        return self.encode(self.neutralize(text))

    def neutralize(self, text: str) -> str:
        """`text` with each control string broken by a space after its first character."""
        return self._control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def holds_control(self, text: str) -> bool:
        """Whether a tag or a special token stands in `text`."""
        return self._control.search(text) is not None

    def decode(self, token_ids: Sequence[int]) -> str:
        """The exact text of `token_ids`, special tokens included."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))


class TurnText:
    """Decodes one turn token by token and remembers which characters each token covers.

    A character whose bytes are spread over several tokens belongs to all of them. Each step decodes a few tokens only,
    so a turn costs linear time.
    """

    def __init__(self, codec: TokenCodec) -> None:
        self._codec = codec
        self.token_ids: list[int] = []
        self.text = ""
        self._ranges: list[tuple[int, int]] = []
        self._window = 0  # first token of the decoding window: one resolved piece of left context
        self._resolved = 0  # tokens whose characters are known

    def push(self, token_id: int) -> None:
        """Append one token; `text` grows unless it ends inside a character."""
        self.token_ids.append(token_id)
        context = self._codec.decode(self.token_ids[self._window : self._resolved])
        piece = self._codec.decode(self.token_ids[self._window :])[len(context) :]
        pending = len(self.token_ids) - self._resolved
        if piece.endswith("�") and pending < _MAX_PENDING:
            return
        start, self.text = len(self.text), self.text + piece
        self._ranges += [(start, len(self.text))] * pending
        self._window, self._resolved = self._resolved, len(self.token_ids)

    @property
    def ranges(self) -> list[tuple[int, int]]:
        """(start, end) character range of each token; tokens of an unfinished character stand at the end of `text`."""
        rest = len(self.token_ids) - self._resolved
        return self._ranges + [(len(self.text), len(self.text))] * rest
