"""Between text and tokens: what is ours may hold control strings, what comes from outside never does.

Our own text (prompts, tags) is encoded as it stands. Text from outside (questions, passages, siblings' queries) first
has every control string broken by one space after its first character, so that no tokenizer, whole-word or byte-level,
can make a tag or a special token of it: `<answer>` becomes `< answer>`. What counts is what comes out: a tokenizer that
normalizes can make a tag of full-width or upper-case look-alikes, so its tokens are read back, and broken again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Any

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.protocol.chat_template import OutOfBoundsError, render_chat

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROUNDS = 4
"""How often text is broken anew because tokenizing it brought a control string out."""


class TokenCodec:
    """A fast Hugging Face tokenizer together with the control strings of one protocol.

    Args:
        tokenizer: any fast tokenizer.
        tags: every tag of the protocol; each must survive encode and decode.
        eos_ids: tokens that end a turn; None: those of `end_of_turn_ids`.

    Raises:
        ConfigError: the tokenizer is slow, or cannot spell a tag.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tags: Sequence[str], eos_ids: Iterable[int] | None = None
    ) -> None:
        if not getattr(tokenizer, "is_fast", False):
            raise ConfigError(
                f"Expected a fast tokenizer (tokenizer.json), found {type(tokenizer).__name__}: token offsets need one."
            )
        self.tokenizer = tokenizer
        # A copy: calls of the tokenizer elsewhere, or its own file, may leave it truncating or padding.
        self._beginning = deepcopy(tokenizer.backend_tokenizer)  # type: ignore[attr-defined]
        self._beginning.no_truncation()
        self._beginning.no_padding()
        self._backend = continuing(self._beginning)
        self._normalizes = self._backend.normalizer is not None
        # Added tokens that are not special can be control tokens too (<tool_call>), or plain runs of spaces.
        added = [
            t.content for t in tokenizer.added_tokens_decoder.values() if t.special or re.match("<.+>$", t.content)
        ]
        controls = {*tags, *tokenizer.all_special_tokens, *added} - {""}
        self.control_strings = tuple(sorted(controls, key=lambda text: (-len(text), text)))
        self._control = re.compile("|".join(map(re.escape, self.control_strings)))
        self.special_ids = frozenset(tokenizer.all_special_ids)
        self.eos_ids = tuple(end_of_turn_ids(tokenizer) if eos_ids is None else eos_ids)
        """Tokens that end a turn: those that end a text, and those that close a turn of a chat."""
        self.bos_ids = self._bos()
        """What the tokenizer itself puts before a text; empty for most."""
        self._check(tags)

    @property
    def eos_id(self) -> int | None:
        """The token that ends text; None where the tokenizer has none."""
        return self.eos_ids[0] if self.eos_ids else None

    def _bos(self) -> tuple[int, ...]:
        plain, marked = (self._beginning.encode("a", add_special_tokens=flag).ids for flag in (False, True))
        before = next((i for i in range(len(marked)) if marked[i : i + len(plain)] == plain), 0)
        return tuple(marked[:before])

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
        text = f"{''.join(tags[:2])} a,\n\n  b{tags[0]}"
        self.is_lossless = self.decode(self.encode(text)) == text
        """Whether text comes back as it was, white space included."""

    def encode(self, text: str) -> tuple[int, ...]:
        """Token ids of our own text, within a rollout: tags in it are meant, nothing is added around it."""
        return tuple(self._backend.encode(text, add_special_tokens=False).ids)

    def encode_prompt(self, text: str) -> tuple[int, ...]:
        """Token ids of our own text at the beginning of a rollout, as the tokenizer itself begins a text."""
        return tuple(self._beginning.encode(text, add_special_tokens=False).ids)

    def encode_data(self, text: str) -> tuple[int, ...]:
        """Token ids of text from outside, as data: no control token comes of it."""
        return self.encode(self.neutralize(text))

    def neutralize(self, text: str) -> str:
        """`text` with each control string broken by a space after its first character, and with no other that it hides.

        A look-alike that the tokenizer turns into a control string is broken where it comes out: the text is then the
        tokenizer's reading of it.
        """
        text = self._broken(text)
        for _ in range(_ROUNDS if self._normalizes else 0):
            read = self.decode(self.encode(text))
            if not self.holds_control(read):
                return text
            text = self._broken(read)
        return text if not self._normalizes else text.replace("<", " ")

    def _broken(self, text: str) -> str:
        return self._control.sub(lambda match: f"{match[0][0]} {match[0][1:]}", text)

    def holds_control(self, text: str) -> bool:
        """Whether a tag or a special token stands in `text`."""
        return self._control.search(text) is not None

    def steering_ids(self, tags: Sequence[str], documents_tag: str) -> tuple[list[int], list[int]]:
        """Ids of tokens that steer a rollout: tags of the environment's, where each is one token; then all others.

        Args:
            tags: of the protocol.
            documents_tag: the environment's, by its name.
        """
        own = [self.encode(f"<{slash}{documents_tag}>") for slash in ("", "/")]
        environment = {ids[0] for ids in own if len(ids) == 1}
        others = {*self._beginnings(tags), *self.special_ids, *self.eos_ids} - environment
        return sorted(environment), sorted(others)

    def _beginnings(self, tags: Sequence[str]) -> tuple[int, ...]:
        """Ids of tokens with which one of `tags` can begin: a whole tag or a piece of it, spaces before it or not."""
        texts = self._backend.decode_batch([[i] for i in range(len(self.tokenizer))], skip_special_tokens=False)
        read = ((i, text.lstrip()) for i, text in enumerate(texts))
        return tuple(i for i, text in read if text and any(t.startswith(text) or text.startswith(t) for t in tags))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The exact text of `token_ids`, special tokens included."""
        return str(self._backend.decode(list(token_ids), skip_special_tokens=False))


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, others: Iterable[int] = ()) -> tuple[int, ...]:
    """Tokens that end a turn: the tokenizer's end of text, `others`, and what its chat template closes a turn with.

    Args:
        tokenizer: any.
        others: the model's, from its generation config.
    """
    ends = (tokenizer.eos_token_id, *others, closing_token(tokenizer))
    return tuple(dict.fromkeys(token_id for token_id in ends if token_id is not None))


def closing_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The token with which the chat template closes what the assistant said; None without one."""
    said = "something"
    turns = [{"role": "user", "content": "a question"}, {"role": "assistant", "content": said}]
    if tokenizer.chat_template is None:
        return None
    try:
        text = render_chat(tokenizer, turns)
    except OutOfBoundsError:
        raise
    except ConfigError:  # a template that wants other turns
        return None
    ids = tokenizer(text.rpartition(said)[2], add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder
    return next((token_id for token_id in ids if token_id in added), None)


def continuing(backend: Any) -> Any:
    """The tokenizer as it is within a text: SentencePiece's, and some others, would begin every piece with a space.

    Args:
        backend: of the `tokenizers` library.

    Returns:
        A changed copy; the same where it begins nothing with a space.
    """
    spec = json.loads(backend.to_str())
    inside = {
        "normalizer": _without(spec["normalizer"], lambda part: part["type"] == "Prepend"),
        "pre_tokenizer": _without(spec["pre_tokenizer"]),
        "decoder": _without(spec["decoder"], lambda part: part["type"] == "Strip" and part.get("start")),
    }
    if all(spec[name] == part for name, part in inside.items()):
        return backend
    return type(backend).from_str(json.dumps(spec | inside))


def _without(part: Any, is_left_out: Callable[[Any], bool] = lambda part: False) -> Any:
    """A component without the parts that are left out, and without prefixes of its own."""
    if part is None or is_left_out(part):
        return None
    unprefixed = {"prepend_scheme": "never", "add_prefix_space": False}
    changed = {name: unprefixed.get(name, value) for name, value in part.items()}
    for name in ("normalizers", "pretokenizers", "decoders"):
        if name in part:
            kept = (_without(child, is_left_out) for child in part[name])
            changed[name] = [child for child in kept if child is not None]
    return changed
