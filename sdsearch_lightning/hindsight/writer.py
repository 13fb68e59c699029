"""How a block gets its length: whole entries are dropped from its end until it fits, never a token of a rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.protocol.block_templates import BlockTemplates
from sdsearch_lightning.protocol.templates import Protocol
from sdsearch_lightning.protocol.tokenization import TokenCodec
from sdsearch_lightning.types import SiblingRecord

Item = TypeVar("Item")


class BlockBudget:
    """How many tokens a block may have, and the counts of what did not fit.

    Args:
        max_tokens: of one block text, tokenized by itself; None = any number.
    """

    def __init__(self, max_tokens: int | None = None) -> None:
        if max_tokens is not None and max_tokens < 1:
            raise ConfigError(f"hindsight.max_block_tokens: expected at least 1, or null, found {max_tokens}.")
        self.max_tokens = max_tokens
        self.dropped_entries = 0
        """Entries left out, over all texts written."""
        self.groups_over_budget = 0
        """Groups that are not taught because not even one entry fitted."""

    def fit(
        self, codec: TokenCodec, items: Sequence[Item], write: Callable[[Sequence[Item]], str]
    ) -> tuple[Sequence[Item], str]:
        """The longest beginning of `items` whose text is within the budget, and the text.

        Args:
            codec: counts tokens.
            items: entries, in the order in which they are written.
            write: makes the text of any beginning of them.

        Returns:
            Both empty where nothing fits, or nothing was there.
        """
        for kept in range(len(items), 0, -1):
            text = write(items[:kept])
            if self.max_tokens is None or len(codec.encode(text)) <= self.max_tokens:
                self.dropped_entries += len(items) - kept
                return items[:kept], text
        self.dropped_entries += len(items)
        return (), ""


@dataclass(frozen=True, slots=True)
class BlockWriter:
    """What a builder writes with: every text of a block comes out of `fit`."""

    protocol: Protocol
    codec: TokenCodec
    budget: BlockBudget

    @property
    def templates(self) -> BlockTemplates:
        """Texts of the blocks that the method itself does not need."""
        return self.protocol.block

    def fit(self, items: Sequence[Item], write: Callable[[Sequence[Item]], str]) -> tuple[Sequence[Item], str]:
        """As many entries as the budget allows, and their text; see `BlockBudget.fit`."""
        return self.budget.fit(self.codec, items, write)

    def siblings(self, entries: Sequence[SiblingRecord]) -> tuple[tuple[SiblingRecord, ...], str]:
        """Queries (and outcomes) of `entries`, as many as fit."""
        kept, text = self.fit(entries, lambda some: self.protocol.render_block(self.codec, some))
        return tuple(kept), text
