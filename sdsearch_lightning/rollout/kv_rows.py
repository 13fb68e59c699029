"""Keys and values of running rollouts: a fixed number of rows, each as long as a rollout may get.

Rows never grow, so a decode step neither copies nor concatenates anything: it writes one cell per row and attends to a
view. Cells beyond a row's length hold whatever was there before; they are masked, and overwritten before they count.

Next: slots.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sdsearch_lightning.attention import AttentionLayout, CausalSegments, Segment, causal_mask, masked_attention
from sdsearch_lightning.policy import Policy


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token of a rollout costs to remember."""

    layers: int
    heads: int
    """Of keys and values."""
    width: int
    """Of a head."""
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Of all layers, keys and values."""
        return 2 * self.layers * self.heads * self.width * self.dtype.itemsize

    @classmethod
    def of(cls, policy: Policy) -> KVShape:
        """Seen in a forward pass of two tokens, so under the precision of the moment."""
        witness = _Shapes([Segment(2)])
        ids = torch.zeros(2, dtype=torch.long, device=next(policy.parameters()).device)
        policy.advance(ids, ids + torch.arange(2, device=ids.device), witness, ids[:1])
        (key,) = set(witness.keys)  # all layers alike
        return cls(len(witness.keys), *key)


class _Shapes(CausalSegments):
    """Remembers what keys look like."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(segments)
        self.keys: list[tuple[int, int, torch.dtype, torch.device]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        self.keys.append((key.shape[1], key.shape[3], key.dtype, key.device))
        return super().attend(layer, query, key, value, scale)


class KVRows:
    """Memory of `num_rows` rollouts of up to `capacity` tokens."""

    def __init__(self, shape: KVShape, num_rows: int, capacity: int) -> None:
        size = (shape.layers, 2, num_rows, shape.heads, capacity, shape.width)
        self.cells = torch.empty(size, dtype=shape.dtype, device=shape.device)
        self._num_clean = 0  # columns that hold no NaN in any row

    @property
    def num_rows(self) -> int:
        """S."""
        return self.cells.shape[2]

    def reach(self, length: int) -> None:
        """Make columns ready before they are written or looked at.

        They are filled with zeros when they are first needed, not whatever is in memory: a masked cell weighs 0, and 0
        times NaN is NaN. Filling all of them at the start would touch memory that most rollouts never reach.
        """
        if length > self._num_clean:
            target = min(-(-length // 256) * 256, self.cells.shape[4])
            self.cells[..., self._num_clean : target, :] = 0
            self._num_clean = target

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` cells of one row into another."""
        self.cells[:, :, target, :, :length] = self.cells[:, :, source, :, :length]

    def exchange(self, one: int, length: int, other: int, other_length: int) -> None:
        """Two rows with what they hold; a length of 0 means that the row's content is of no use any more."""
        if one == other:
            return
        kept = self.cells[:, :, one, :, :length].clone()
        self.copy(other, one, other_length)
        self.cells[:, :, other, :, :length] = kept


class Feed(NamedTuple):
    """New tokens of one row."""

    row: int
    start: int
    """Cells of the row that are filled already."""
    length: int
    """New tokens."""


class PrefillRows(AttentionLayout):
    """New tokens of some rows, back to back: each looks at all that its row holds before it."""

    def __init__(self, rows: KVRows, feeds: Sequence[Feed]) -> None:
        rows.reach(max(feed.start + feed.length for feed in feeds))
        self._rows, self._feeds = rows, feeds
        self._lengths = [feed.length for feed in feeds]
        device = rows.cells.device
        self._masks = [causal_mask(feed.length, feed.start + feed.length, device) for feed in feeds]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `AttentionLayout.attend`."""
        parts = zip(*(x.split(self._lengths, dim=2) for x in (query, key, value)), strict=True)
        outputs = []
        for feed, mask, (own, k, v) in zip(self._feeds, self._masks, parts, strict=True):
            held = self._rows.cells[layer, :, feed.row : feed.row + 1, :, : feed.start + feed.length]
            held[0, :, :, feed.start :], held[1, :, :, feed.start :] = k, v
            outputs.append(masked_attention(own, held[0], held[1], mask, scale))
        return torch.cat(outputs, dim=2)


class DecodeRows(AttentionLayout):
    """One new token of each of the first rows.

    Args:
        rows: their memory.
        lengths: [A] cells that each of the first A rows has filled already.
    """

    def __init__(self, rows: KVRows, lengths: Sequence[int]) -> None:
        device = rows.cells.device
        rows.reach(max(lengths) + 1)
        self._cells = rows.cells[:, :, : len(lengths), :, : max(lengths) + 1]
        self._row = torch.arange(len(lengths), device=device)
        self._column = torch.tensor(lengths, device=device)
        seen = torch.arange(max(lengths) + 1, device=device) <= self._column[:, None]
        self._mask = seen[:, None, None]  # [A, 1, 1, L]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """See `AttentionLayout.attend`. The heads of a group are queries of one key head: keys are not repeated."""
        keys, values = self._cells[layer]
        keys[self._row, :, self._column] = key[0].transpose(0, 1)
        values[self._row, :, self._column] = value[0].transpose(0, 1)
        grouped = query[0].transpose(0, 1).unflatten(1, (key.shape[1], -1))  # [A, Hkv, Hq / Hkv, D]
        output = scaled_dot_product_attention(grouped, keys, values, attn_mask=self._mask, scale=scale)
        return output.flatten(1, 2).transpose(0, 1)[None]
