"""Keys and values of running rollouts: a fixed number of rows, each as long as a rollout may get.

Rows never grow, so a decode step neither copies nor concatenates anything: it writes one cell per row and attends to a
view. Cells beyond a row's length hold whatever was there before; they are masked, and overwritten before they count. A
cell is a position of its rollout, so a layer with a window sees the last cells of a row and no others. Behind the last
cell of each row lies one that nobody looks at: what a step of a fixed size computes too many goes there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from sdsearch_lightning.policy.attention import (
    AttentionLayout,
    Call,
    CausalSegments,
    Segment,
    causal_mask,
    masked_attention,
)
from sdsearch_lightning.policy.flash import Places, flash
from sdsearch_lightning.policy.placing import Place, plainly
from sdsearch_lightning.policy.policy import Policy


class CellShape(NamedTuple):
    """What a layer remembers of a token, once for its key and once for its value."""

    heads: int
    width: int


@dataclass(frozen=True, slots=True)
class KVShape:
    """What one token of a rollout costs to remember."""

    cells: tuple[tuple[CellShape, CellShape], ...]
    """By layer: its keys and its values."""
    dtype: torch.dtype
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes of keys and values of one token, over all layers."""
        return sum(cell.heads * cell.width for layer in self.cells for cell in layer) * self.dtype.itemsize

    @classmethod
    def of(cls, policy: Policy) -> KVShape:
        """Seen in a forward pass of two tokens, so under the precision of the moment."""
        witness = _Shapes([Segment(2)])
        ids = torch.zeros(2, dtype=torch.long, device=next(policy.parameters()).device)
        policy.advance(ids, ids + torch.arange(2, device=ids.device), witness, ids[:1])
        return cls(tuple(witness.cells), witness.dtype, ids.device)


class _Shapes(CausalSegments):
    """Attention that remembers what keys and values look like, layer by layer."""

    def __init__(self, segments: Sequence[Segment]) -> None:
        super().__init__(segments)
        self.cells: list[tuple[CellShape, CellShape]] = []
        self.dtype = torch.float32

    def attend(self, call: Call) -> Tensor:
        assert call.layer == len(self.cells), "layers ask in order"
        key, value = (CellShape(x.shape[1], x.shape[3]) for x in (call.key, call.value))
        self.cells.append((key, value))
        # Under autocast, rotary positions leave keys in float32; attention takes them as the values are.
        self.dtype = call.value.dtype
        return super().attend(call)


class KVRows:
    """Memory of `num_rows` rollouts of up to `capacity` tokens.

    Cells of one shape lie in one tensor, whatever layers and sides they belong to: in most models there is one. `place`
    is how numbers that concern them get to their device.
    """

    def __init__(self, shape: KVShape, num_rows: int, capacity: int, place: Place = plainly) -> None:
        wanted = [cell for layer in shape.cells for cell in layer]
        self.device, self.num_rows, self.capacity, self.place = shape.device, num_rows, capacity, place
        self.blocks = {
            cell: torch.empty(
                (wanted.count(cell), num_rows, cell.heads, capacity + 1, cell.width),
                dtype=shape.dtype,
                device=shape.device,
            )
            for cell in dict.fromkeys(wanted)
        }
        """[n, S, H, capacity + 1, width] by shape: n sides of layers."""
        taken = dict.fromkeys(self.blocks, 0)
        self._sides: list[Tensor] = []
        for cell in wanted:
            self._sides.append(self.blocks[cell][taken[cell]])
            taken[cell] += 1
        self._num_clean = 0  # columns that hold no NaN in any row

    def numbers(self, values: Sequence[Any]) -> Tensor:
        """Integers of the host, beside the rows."""
        return self.place(values, self.device, torch.long)

    def layer(self, index: int) -> tuple[Tensor, Tensor]:
        """[S, H, capacity + 1, width] keys and values of a layer."""
        return self._sides[2 * index], self._sides[2 * index + 1]

    def reach(self, length: int) -> None:
        """Make columns ready before they are written or looked at.

        They are filled with zeros when they are first needed, not whatever is in memory: a masked cell weighs 0, and 0
        times NaN is NaN. Filling all of them at the start would touch memory that most rollouts never reach.
        """
        if length > self._num_clean:
            target = min(-(-length // 64) * 64, self.capacity)
            for block in self.blocks.values():
                block[..., self._num_clean : target, :] = 0
            self._num_clean = target

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` cells of one row into another."""
        for block in self.blocks.values():
            block[:, target, :, :length] = block[:, source, :, :length]

    def exchange(self, one: int, length: int, other: int, other_length: int) -> None:
        """Two rows with what they hold; a length of 0 means that the row's content is of no use any more."""
        if one == other:
            return
        kept = [block[:, one, :, :length].clone() for block in self.blocks.values()]
        self.copy(other, one, other_length)
        for block, cells in zip(self.blocks.values(), kept, strict=True):
            block[:, other, :, :length] = cells


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
        rows: the memory, made ready as far as `width` and the ends of the first part.
        new: the first part, in the order of its tokens.
        cells: [A] the second: which cell the token of each of the first A rows goes to; it sees all cells before.
        width: cells that any of them sees, its own among them.
    """

    def __init__(self, rows: KVRows, new: Sequence[NewTokens], cells: Tensor, width: int) -> None:
        self._rows, self._new, self._cell, self._width = rows, new, cells, width
        self._lengths = [part.length for part in new]
        self._row = torch.arange(len(cells), device=rows.device)
        self._places: tuple[Places, Tensor, Tensor] | None = None
        self._new_masks: dict[int | None, list[Tensor]] = {}  # by window
        self._last_masks: dict[int | None, Tensor] = {}

    def attend(self, call: Call) -> Tensor:
        """Write the new cells, then attend: first the tokens being read, then one token per running row."""
        dtype = self._rows.layer(call.layer)[1].dtype
        sizes = [sum(self._lengths), len(self._row)]
        parts = zip(*(x.to(dtype).split(sizes, dim=2) for x in (call.query, call.key, call.value)), strict=True)
        first, second = (call._replace(query=q, key=k, value=v) for q, k, v in parts)
        outputs = []
        if self._new:
            outputs.append(self._attend_new_fused(first) if first.fits_flash else self._attend_new(first))
        if len(self._row):
            outputs.append(self._attend_last(second))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)

    def _attend_new(self, call: Call) -> Tensor:
        """The tokens being read, a call per row."""
        held_keys, held_values = self._rows.layer(call.layer)
        tokens = zip(*(x.split(self._lengths, dim=2) for x in (call.query, call.key, call.value)), strict=True)
        outputs = []
        for part, mask, (own, k, v) in zip(self._new, self._masks_of_new(call.window), tokens, strict=True):
            row, end = slice(part.row, part.row + 1), part.start + part.length
            held_keys[row, :, part.start : end], held_values[row, :, part.start : end] = k, v
            seen = call._replace(query=own, key=held_keys[row, :, :end], value=held_values[row, :, :end])
            outputs.append(masked_attention(seen, mask))
        return torch.cat(outputs, dim=2)

    def _attend_new_fused(self, call: Call) -> Tensor:
        """The same in one kernel, for which the keys of all rows are copied to stand together."""
        places, (row, cell), (key_row, key_cell) = self._places or self._find_places()
        sides = self._rows.layer(call.layer)
        for side, new in zip(sides, (call.key, call.value), strict=True):
            side[row, :, cell] = new[0].transpose(0, 1)
        key, value = (side[key_row, :, key_cell] for side in sides)  # [L, Hkv, D]
        query = call.query[0].transpose(0, 1)
        return flash(query, key, value, places, call.scale, call.window).transpose(0, 1)[None]

    def _find_places(self) -> tuple[Places, Tensor, Tensor]:
        """Where the tokens of rows end, then row and cell [2, T] of each new token and [2, L] of all that are seen."""
        new = [(part.row, part.start + i) for part in self._new for i in range(part.length)]
        seen = [(part.row, i) for part in self._new for i in range(part.start + part.length)]
        rows = self._rows
        places = Places.of(self._lengths, [part.start + part.length for part in self._new], rows.device, rows.place)
        written, read = (rows.numbers(cells).T for cells in (new, seen))
        self._places = places, written, read
        return self._places

    def _attend_last(self, call: Call) -> Tensor:
        """One token per row, which looks at the row's cells up to its own."""
        sides = self._rows.layer(call.layer)
        for side, new in zip(sides, (call.key, call.value), strict=True):
            side[self._row, :, self._cell] = new[0].transpose(0, 1)
        held_keys, held_values = (side[: len(self._row), :, : self._width] for side in sides)
        mask, query = self._mask_of_last(call.window), call.query[0].transpose(0, 1)  # [A, Hq, D]
        if call.softcap is not None or call.sinks is not None:
            seen = call._replace(query=query[:, :, None], key=held_keys, value=held_values)
            return masked_attention(seen, mask)[:, :, 0].transpose(0, 1)[None]
        # The heads of a group are queries of one key head, so keys are not repeated.
        grouped = query.unflatten(1, (held_keys.shape[1], -1))  # [A, Hkv, Hq / Hkv, D]
        output = scaled_dot_product_attention(grouped, held_keys, held_values, attn_mask=mask, scale=call.scale)
        return output.flatten(1, 2).transpose(0, 1)[None]

    def _masks_of_new(self, window: int | None) -> list[Tensor]:
        if window not in self._new_masks:
            self._new_masks[window] = [
                causal_mask(part.length, part.start + part.length, window, device=self._rows.device)
                for part in self._new
            ]
        return self._new_masks[window]

    def _mask_of_last(self, window: int | None) -> Tensor:
        """[A, 1, 1, L]."""
        if window not in self._last_masks:
            column, cell = torch.arange(self._width, device=self._rows.device), self._cell[:, None]
            seen = column <= cell
            if window is not None:
                seen &= column > cell - window
            self._last_masks[window] = seen[:, None, None]
        return self._last_masks[window]
