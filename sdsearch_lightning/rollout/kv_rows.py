"""Keys and values of running rollouts: a fixed number of rows, each as long as a rollout may get.

Rows never grow, so a decode step neither copies nor concatenates anything: it writes one cell per row and attends to a
view. Cells beyond a row's length hold whatever was there before; they are masked, and overwritten before they count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sdsearch_lightning.policy.attention import AttentionLayout, CausalSegments, Segment, causal_mask, masked_attention
from sdsearch_lightning.policy.policy import Policy


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
        """Bytes of keys and values of one token, over all layers."""
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
    """Attention that remembers how many layers ask, and what their keys look like."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(segments)
        self.keys: list[tuple[int, int, torch.dtype, torch.device]] = []

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        # Under autocast, rotary positions leave keys in float32; attention takes them as the values are.
        self.keys.append((key.shape[1], key.shape[3], value.dtype, key.device))
        return super().attend(layer, query, key, value, scale)


class KVRows:
    """Memory of `num_rows` rollouts of up to `capacity` tokens."""

    def __init__(self, shape: KVShape, num_rows: int, capacity: int) -> None:
        size = (shape.layers, 2, num_rows, shape.heads, capacity, shape.width)
        self.cells = torch.empty(size, dtype=shape.dtype, device=shape.device)
        self._num_clean = 0  # columns that hold no NaN in any row

    @property
    def num_rows(self) -> int:
        """S, the number of rollouts that have room at once."""
        return self.cells.shape[2]

    def reach(self, length: int) -> None:
        """Make columns ready before they are written or looked at.

        They are filled with zeros when they are first needed, not whatever is in memory: a masked cell weighs 0, and 0
        times NaN is NaN. Filling all of them at the start would touch memory that most rollouts never reach.
        """
        if length > self._num_clean:
            target = min(-(-length // 64) * 64, self.cells.shape[4])
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


class NewTokens(NamedTuple):
    """Tokens that one row reads in this pass, behind those it holds."""

    row: int
    start: int
    """Cells of the row that are filled already."""
    length: int
    """New tokens."""


class RowsAttention(AttentionLayout):
    """Tokens that some rows read, back to back, and then one more token of each of the first rows.

    Keys and values of the first part are written before the second one looks, so that a row may have tokens in both.

    Args:
        rows: the memory.
        new: the first part, in the order of its tokens.
        cells: [A] the second: which cell the token of each of the first A rows goes to; it sees all cells before.
    """

    def __init__(self, rows: KVRows, new: Sequence[NewTokens], cells: Sequence[int]) -> None:
        device, width = rows.cells.device, max(cells, default=-1) + 1
        rows.reach(max([width, *(part.start + part.length for part in new)]))
        self._all, self._new = rows.cells, new
        self._lengths = [part.length for part in new]
        self._masks = [causal_mask(part.length, part.start + part.length, device) for part in new]
        self._first = rows.cells[:, :, : len(cells), :, :width]
        self._row, self._cell = torch.arange(len(cells), device=device), torch.tensor(cells, device=device)
        self._mask = (torch.arange(width, device=device) <= self._cell[:, None])[:, None, None]  # [A, 1, 1, L]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """Write the new cells, then attend: first the tokens being read, then one token per running row."""
        parts = (x.to(self._all.dtype).split([*self._lengths, len(self._row)], dim=2) for x in (query, key, value))
        queries, keys, values = parts
        outputs = []
        for part, mask, own, k, v in zip(self._new, self._masks, queries, keys, values, strict=False):
            held = self._all[layer, :, part.row : part.row + 1, :, : part.start + part.length]
            held[0, :, :, part.start :], held[1, :, :, part.start :] = k, v
            outputs.append(masked_attention(own, held[0], held[1], mask, scale))
        if len(self._row):
            outputs.append(self._attend_last(layer, queries[-1], keys[-1], values[-1], scale))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _attend_last(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float | None) -> Tensor:
        """The heads of a group are queries of one key head, so keys are not repeated."""
        held_keys, held_values = self._first[layer]
        held_keys[self._row, :, self._cell] = key[0].transpose(0, 1)
        held_values[self._row, :, self._cell] = value[0].transpose(0, 1)
        grouped = query[0].transpose(0, 1).unflatten(1, (key.shape[1], -1))  # [A, Hkv, Hq / Hkv, D]
        output = scaled_dot_product_attention(grouped, held_keys, held_values, attn_mask=self._mask, scale=scale)
        return output.flatten(1, 2).transpose(0, 1)[None]
