"""The output layer at the rows that are wanted, chunk by chunk, and what is made of its logits on the spot.

Logits are by far the largest tensors of a step: one row has as many numbers as the vocabulary. So a `Reading` says
which rows are wanted and what to make of them, and no more than `MAX_LOGITS` of them exist at a time. Many rows go
through the output layer in one pass; readings get them a chunk at a time, small enough for a cache. Where a loss is
trained on, the gradient of a chunk is taken while its logits are there, and takes their place: each row meets the
output layer once going forward and never again, whatever number of losses look at it. A loss has to be a sum over rows
for that, which the weight rule (losses/weights.py) makes every loss be.

    reading of a row              products with the output layer
    loss, forward and backward    1 + 2      (recomputation in the backward pass would make it 2 + 2)
    its pair under the teacher    1
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

MAX_LOGITS = 2**26
"""Logits of a pass: 268 MB in float32."""
MIN_ROWS = 256
"""Smaller passes cost more time, in the gradient of the output layer's weights, than they save memory."""
CHUNK_LOGITS, CPU_CHUNK_LOGITS = 2**24, 2**20
"""Logits of a chunk; a loss makes a dozen tensors of that size. On a CPU they should stay in its cache."""


class Chunk(NamedTuple):
    """Some rows of a reading. What is kept of it has to be a copy: the memory of the logits is used again."""

    rows: slice
    """Which of the reading's R rows these C are."""
    logits: Tensor
    """[C, V]."""
    hidden: Tensor
    """[C, H] what the output layer made them of."""
    paired: Tensor | None
    """[C, V] logits of the reading's `paired` rows, without gradient."""


Read = Callable[[Chunk], tuple[Tensor, Any]]
"""Gives the chunk's share of K loss terms [K] (differentiable; K = 0 where nothing is trained on), and what to keep."""


@dataclass(frozen=True, slots=True)
class Reading:
    """Rows to look at, and what to make of them."""

    targets: Tensor
    """[R] index into the T packed tokens: the tokens that the rows predict, never a sequence's first."""
    read: Read
    paired: Tensor | None = None
    """[R, H] hidden rows of an earlier call; their logits come along."""


class Outcome(NamedTuple):
    """What the readings of one pass made of their rows."""

    terms: Tensor
    """[K] loss terms, summed over all chunks of all readings."""
    kept: list[list[Any]]
    """What each reading kept of its chunks."""


def keep_logits(chunk: Chunk) -> tuple[Tensor, Tensor]:
    """Keeps the logits themselves; for few rows only."""
    return chunk.logits.new_zeros(0), chunk.logits


class Head(NamedTuple):
    """A model's output layer: from hidden rows to logits."""

    project: Callable[[Tensor], Tensor]
    """[C, H] -> [C, V], row by row."""
    weights: tuple[nn.Parameter, ...]
    """What it is made of, as far as it learns."""
    num_tokens: int
    """V."""

    def passes(self, num_rows: int) -> Iterator[slice]:
        """Slices of `num_rows` rows that go through the layer together.

        Without a row there is one empty slice, so that a loss of 0 still belongs to the graph.

        """
        step = max(MIN_ROWS, MAX_LOGITS // self.num_tokens)
        return (slice(start, min(start + step, num_rows)) for start in range(0, max(num_rows, 1), step))

    def chunks(self, reading: Reading, where: slice, logits: Tensor, hidden: Tensor) -> Iterator[Chunk]:
        """A reading's rows `where`, with logits [P, V] and hidden [P, H]; at least one chunk, if an empty one."""
        paired = None
        if reading.paired is not None:
            with torch.no_grad():
                paired = self.project(reading.paired[where])
        step = max(1, (CPU_CHUNK_LOGITS if logits.device.type == "cpu" else CHUNK_LOGITS) // self.num_tokens)
        pairs = [None] * max(1, -(-len(logits) // step)) if paired is None else paired.split(step)
        start = where.start
        for few, states, pair in zip(logits.split(step), hidden.split(step), pairs, strict=True):
            yield Chunk(slice(start, start + len(few)), few, states, pair)
            start += len(few)


def read_rows(
    head: Head, rows: Sequence[Tensor], readings: Sequence[Reading], mixture: Sequence[float] | None
) -> Outcome:
    """Put rows through the output layer and let their readings have them.

    Args:
        head: the output layer.
        rows: [R, H] hidden rows, one tensor per reading.
        readings: what is made of them.
        mixture: [K] the coefficients with which the terms will be added up for the backward pass: the gradient is taken
            for it at once, and that of any other mixture costs the rows once more. None = plain autograd, which keeps
            all logits until then.
    """
    if mixture is not None and torch.is_grad_enabled():
        work = _Work(head, readings, mixture)
        terms: Tensor = _FusedHead.apply(work, *rows, *head.weights)  # type: ignore[no-untyped-call]
        return Outcome(terms, work.kept)
    found = [
        [
            reading.read(chunk)
            for where in head.passes(len(row))
            for chunk in head.chunks(reading, where, head.project(row[where]), row[where])
        ]
        for reading, row in zip(readings, rows, strict=True)
    ]
    sums = torch.stack([terms for part in found for terms, _ in part]).sum(0)
    return Outcome(sums, [[kept for _, kept in part] for part in found])


class _Work:
    """The gradients of one call, and what it takes to find those of another mixture."""

    def __init__(self, head: Head, readings: Sequence[Reading], mixture: Sequence[float]) -> None:
        self.head, self.readings, self.mixture = head, readings, mixture
        self.kept: list[list[Any]] = []

    def run(self, rows: Sequence[Tensor], mixture: Sequence[float]) -> tuple[Tensor, list[Tensor | None]]:
        """Terms [K], and the gradients of their mixture in `rows` and in the weights; fills `kept`."""
        self.kept[:] = [[] for _ in self.readings]
        shares: list[Tensor] = []
        of_rows: list[Tensor] = [torch.zeros_like(row) for row in rows]
        of_weights: list[Tensor | None] = [None] * len(self.head.weights)
        for reading, row, of_row, kept in zip(self.readings, rows, of_rows, self.kept, strict=True):
            for where in self.head.passes(len(row)):
                with torch.enable_grad():
                    hidden = row[where].detach().requires_grad_()
                    logits = self.head.project(hidden)
                gradient = logits.detach()  # the logits, until chunk by chunk their gradient takes their place
                for chunk in self.head.chunks(reading, where, gradient, hidden.detach()):
                    terms, keep, of_logits = self._differentiate(reading, chunk, mixture)
                    shares.append(terms)
                    kept.append(keep)
                    chunk.logits.copy_(of_logits)
                of_row[where], *more = torch.autograd.grad(logits, [hidden, *self.head.weights], gradient)
                of_weights = [new if old is None else old.add_(new) for old, new in zip(of_weights, more, strict=True)]
        return torch.stack(shares).sum(0), [*of_rows, *of_weights]

    @staticmethod
    def _differentiate(reading: Reading, chunk: Chunk, mixture: Sequence[float]) -> tuple[Tensor, Any, Tensor]:
        """Terms [K] of a chunk, what is kept of it, and the gradient of the terms' mixture in its logits."""
        with torch.enable_grad():
            logits = chunk.logits.detach().requires_grad_()
            terms, keep = reading.read(chunk._replace(logits=logits))
            mixed = (terms * terms.new_tensor(mixture)).sum()
        return terms.detach(), keep, torch.autograd.grad(mixed, logits)[0]


class _FusedHead(torch.autograd.Function):
    """Terms going forward; going backward, the gradients that were found on the way."""

    @staticmethod
    def forward(ctx: Any, work: _Work, *rows_and_weights: Tensor) -> Tensor:
        rows = rows_and_weights[: len(work.readings)]
        device = rows[0].device.type
        ctx.work, ctx.rows = work, [row.detach() for row in rows]
        ctx.autocast = device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
        terms, ctx.gradients = work.run(ctx.rows, work.mixture)
        return terms

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, of_terms: Tensor) -> tuple[Tensor | None, ...]:
        # Given away, not kept: a weight without a gradient then takes this one over instead of a copy.
        gradients, ctx.gradients = ctx.gradients, None
        factor = common_factor(of_terms.tolist(), ctx.work.mixture)
        if factor is None or gradients is None:
            factor, kept = 1.0, list(ctx.work.kept)
            with torch.autocast(ctx.autocast[0], dtype=ctx.autocast[1], enabled=ctx.autocast[2]):
                _, gradients = ctx.work.run(ctx.rows, of_terms.tolist())
            ctx.work.kept[:] = kept
        return (None, *(g if factor == 1 or g is None else g.mul_(factor) for g in gradients))


def common_factor(values: Sequence[float], mixture: Sequence[float], tolerance: float = 1e-6) -> float | None:
    """The number that makes `values` of `mixture`, up to the rounding of float32; None where there is none."""
    pairs = list(zip(values, mixture, strict=True))
    factor = next((value / part for value, part in pairs if part), 0.0)
    return factor if all(abs(value - factor * part) <= tolerance * abs(value) for value, part in pairs) else None
