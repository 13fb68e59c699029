"""A turn as text: which characters each token covers, and which kind each token is.

Masks are born here: a token's kind comes from the characters it covers, at the moment its turn ends, and is never
derived again. A turn that was sampled and one that was written for a demonstration are sorted by the same rule.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import NamedTuple

from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import SpanKind

_LOST = "\N{REPLACEMENT CHARACTER}"
_MAX_BYTES = 4
"""Of a character in UTF-8: as many tokens without a whole character are no part of one."""


class Region(NamedTuple):
    """Characters of a turn that are of one kind: the content of a tag."""

    start: int
    end: int
    kind: SpanKind


class TurnText:
    """Decodes one turn token by token and remembers which characters each token covers.

    A character whose bytes are spread over several tokens belongs to all of them. `text` holds whole characters only:
    one whose bytes are not all there yet is added when they are. Each step decodes what came since the last token that
    ended with a character, so a turn of ordinary text costs linear time.
    """

    def __init__(self, codec: TokenCodec) -> None:
        self._codec = codec
        self.token_ids: list[int] = []
        self.text = ""
        self.ranges: list[tuple[int, int]] = []
        """(start, end) character range of each token; a character that is not whole counts as there."""
        self._window = 0  # first token of the decoding window: one resolved piece of left context
        self._resolved = 0  # tokens before which every character is whole
        self._base = 0  # characters of those tokens
        self._stalled = 0  # tokens since a character became whole

    def push(self, token_id: int) -> None:
        """Append one token; `text` grows by the characters that it completes."""
        self.token_ids.append(token_id)
        context = self._codec.decode(self.token_ids[self._window : self._resolved])
        piece = self._codec.decode(self.token_ids[self._window :])[len(context) :]
        whole, start = piece.rstrip(_LOST), len(self.text)
        self._stalled = 0 if self._base + len(whole) > start else self._stalled + 1
        if self._stalled >= _MAX_BYTES:
            whole, self._stalled = piece, 0
        self.text = self.text[: self._base] + whole
        is_whole = whole == piece
        self.ranges.append((min(start, len(self.text)), len(self.text) + (not is_whole)))
        if is_whole:
            self._window, self._resolved, self._base = self._resolved, len(self.token_ids), len(self.text)

    def kinds(self, regions: Collection[Region], tags: re.Pattern[str], special_ids: Collection[int]) -> list[SpanKind]:
        """The kind of each token: SCAFFOLD where it touches a tag or is a special token, else that of its region.

        Args:
            regions: contents of tags; earlier ones win.
            tags: matches every tag.
            special_ids: tokens that are no text.
        """
        edges = [match.span() for match in tags.finditer(self.text)]

        def kind(token_id: int, start: int, end: int) -> SpanKind:
            if token_id in special_ids or any(start < e and s < end for s, e in edges):
                return SpanKind.SCAFFOLD
            inside = (region.kind for region in regions if region.start <= start and end <= region.end)
            return next(inside, SpanKind.REASONING)

        return [kind(token_id, *span) for token_id, span in zip(self.token_ids, self.ranges, strict=True)]


def written_turn(codec: TokenCodec, parts: Sequence[tuple[SpanKind, str, str]]) -> tuple[TurnText, list[Region]]:
    """A turn as a policy would write it: tokenized in one piece, so that tokens reach across tags as sampled ones do.

    Args:
        codec: encodes; contents are data.
        parts: kind, tag and content of each element, in order.

    Returns:
        The turn, and the regions of its contents.
    """
    text, regions = "", []
    for kind, tag, content in parts:
        text += f"<{tag}>"
        data = codec.neutralize(f" {content} ")
        regions.append(Region(len(text), len(text) + len(data), kind))
        text += f"{data}</{tag}>"
    turn = TurnText(codec)
    for token_id in codec.encode(text):
        turn.push(token_id)
    return turn, regions
