"""Exact search by matrix products in two passes, on any device that torch knows.

The first takes all products and keeps only the highest score of each block of rows, its peak; the host waits for
nothing. The second scores the rows of few blocks again, one by one: k best scores lie in k blocks at most. In bfloat16
scores are off by no more than is known, so more blocks are scored, as many as that leaves in question.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 32
"""Rows that share a peak: more make the first pass cheaper, fewer the second."""
_FEWEST_ROWS, _MOST_ROWS = 1 << 12, 1 << 18
"""Of one product."""
_NUMBERS = 1 << 29
"""Of all that is held for queries that are searched together: 1 GiB in bfloat16."""
_SECOND = 10
"""Numbers of a row in the second pass: its index, twice, and its score."""


def queries_at_once(num_rows: int, k: int) -> int:
    """How many queries may be searched together, for memory's sake: 785 among 21 million vectors for k of 5."""
    return max(_NUMBERS // (num_rows // BLOCK + _FEWEST_ROWS + _SECOND * BLOCK * _blocks_for(k)), 1)


def best_rows(asked: Tensor, vectors: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k best of [N, D] vectors for each of [B, D] queries, by products in float32.

    Args:
        asked: on the device that computes.
        vectors: float32; may lie elsewhere, and is then copied part by part.
        k: N at most.

    Returns:
        [B, k] scores, highest first, and their rows.
    """
    # A GPU may have been told to take such products in TF32, which is 2^-10 off: the best of a few more blocks.
    _, rows = _best_blocks(asked, vectors, k if asked.device.type == "cpu" else _blocks_for(k))
    query = torch.arange(len(asked), device=asked.device).repeat_interleave(rows.shape[1])
    scores, order = score_rows(asked, vectors, query, rows.flatten(0, 1)).view(len(asked), -1).topk(k)
    return scores, rows.flatten(1).gather(1, order)


@dataclass(frozen=True, slots=True)
class Candidates:
    """Rows that may be among the k best, as far as rounded vectors can tell."""

    rows: Tensor
    """[B, C]"""
    near_mask: Tensor
    """[B, C]: which of them are meant, k at least; where `is_doubtful` is False all others have lower scores."""
    is_doubtful: Tensor
    """[B]: more rows than were looked at may be among the best, or arithmetic was worse than its bound."""


@dataclass(frozen=True, slots=True)
class Rounded:
    """Vectors in bfloat16, and what rounding did to them."""

    vectors: Tensor
    """[N, D]"""
    error: float
    """The largest length of what was taken from a vector or added to it."""
    length: float
    """The largest length of a rounded vector."""

    @classmethod
    def of(cls, parts: Iterable[Tensor], num_rows: int, dimension: int, device: torch.device) -> Rounded:
        """Rounds [N, D] float32 vectors that come in parts."""
        vectors = torch.empty(num_rows, dimension, dtype=torch.bfloat16, device=device)
        error = length = torch.zeros((), device=device)
        start = 0
        for part in parts:
            exact = part.to(device)
            rounded = vectors[start : start + len(exact)].copy_(exact).float()
            error = torch.maximum(error, (rounded - exact).norm(dim=1).max())
            length = torch.maximum(length, rounded.norm(dim=1).max())
            start += len(exact)
        return cls(vectors, float(error), float(length))

    def candidates(self, asked: Tensor, k: int) -> Candidates:
        """Rows that may be among the k best for each of [B, D] float32 queries.

        A block whose peak, or a row whose score, is below the k-th by more than both can be off is left out.
        """
        num_blocks = _blocks_for(k)
        rough, close = self.bounds(asked)
        peaks, rows = _best_blocks(asked.to(self.vectors.dtype), self.vectors, num_blocks)
        rough = rough + half_step(peaks)
        near_mask = _may_be_best(peaks, rough + close, k)
        is_doubtful = near_mask[:, -1] & (rows[0].numel() < len(self.vectors))
        width = int(near_mask.sum(1).max())
        query, place = near_mask.nonzero(as_tuple=True)
        scores = torch.full((len(asked), width, BLOCK), -torch.inf, device=asked.device)
        scores[query, place] = score_rows(asked, self.vectors, query, rows[query, place])
        is_off = (scores.amax(2) - peaks[:, :width]).abs() > rough[:, :width]  # never, if sums are kept in float32
        is_doubtful |= (is_off & near_mask[:, :width]).any(1)
        scores, order = scores.flatten(1).topk(min(num_blocks, width * BLOCK))
        near_mask = _may_be_best(scores, close, k)
        is_doubtful |= near_mask[:, -1] & (scores.shape[1] < width * BLOCK)
        width = int(near_mask.sum(1).max())
        return Candidates(rows.flatten(1).gather(1, order[:, :width]), near_mask[:, :width], is_doubtful)

    def bounds(self, asked: Tensor) -> tuple[Tensor, Tensor]:
        """How far a product in bfloat16, before it is rounded itself, is from q.x', and how far that is from q.x.

            q.x = q'.x' + (q - q').x' + q.(x - x')         with q', x' the rounded q, x

        By Cauchy and Schwarz the second term is |q - q'| |x'| at most, the third |q| |x - x'|. To each comes what sums
        of D products in float32 lose in any order, D 2^-24 |q| |x'|: four times that, as some devices cut instead
        of rounding, the norms here are such sums too, and so is what either is compared with.

        Returns:
            Two bounds, each [B, 1].
        """
        length = asked.norm(dim=1, keepdim=True)
        lost = (asked.to(self.vectors.dtype).float() - asked).norm(dim=1, keepdim=True)
        summing = asked.shape[1] * 2.0**-22 * length * self.length
        return lost * self.length + summing, length * self.error + summing


def _blocks_for(k: int) -> int:
    """How many blocks, and then rows, may be looked at: several times what random ones need, as a scan costs more."""
    return 4 * k + 52


def half_step(rough: Tensor) -> Tensor:
    """What rounding to bfloat16 may have changed in numbers that came out as `rough`: half the step at each."""
    return 2.0 ** (torch.frexp(rough).exponent - 9) * (rough != 0)


def _may_be_best(scores: Tensor, slack: Tensor, k: int) -> Tensor:
    """Which of [B, C] scores, highest first and each off by `slack` at most, may be among the k best: a [B, C] mask.

    k of them are in truth no lower than the k-th less its slack, so what stays below that with its own slack is not
    wanted. What only reaches it is a tie, of which any may be left out. NaN, of vectors or of slack, may be anything.
    """
    least = (scores - slack)[:, min(k, scores.shape[1]) - 1, None]
    near_mask = ~(scores + slack <= least)
    near_mask[:, :k] = True
    return near_mask


def _best_blocks(asked: Tensor, vectors: Tensor, num_blocks: int) -> tuple[Tensor, Tensor]:
    """The blocks with the highest peaks, by products in the precision of `vectors`; all, where there are fewer.

    Rows of a block are not neighbours: a product of C rows has C / BLOCK blocks, and block j holds its rows j, j +
    C / BLOCK, ... So a maximum is taken over columns that lie side by side, at full speed on a GPU and on a CPU.

    Returns:
        [B, num_blocks] peaks, highest first, as float32; [B, num_blocks, BLOCK] rows, N or more where there is none.
    """
    num_rows, num_queries = len(vectors), len(asked)
    chunk = min(_rows_at_once(asked), -(-num_rows // BLOCK) * BLOCK)
    product = asked.new_empty(num_queries, chunk)  # used again: it stays in the cache
    peaks = asked.new_empty(num_queries, -(-num_rows // BLOCK))
    for start in range(0, num_rows, chunk):
        part = vectors[start : start + chunk].to(asked.device)
        width, first = -(-len(part) // BLOCK), start // BLOCK
        scores = product[:, : width * BLOCK]
        torch.mm(asked, part.T, out=scores[:, : len(part)])
        if len(part) < width * BLOCK:  # in the last product
            scores[:, len(part) :] = -torch.inf
        torch.amax(scores.unflatten(1, (BLOCK, width)), 1, out=peaks[:, first : first + width])
    found, blocks = peaks.topk(min(num_blocks, peaks.shape[1]))
    starts = blocks // (chunk // BLOCK) * chunk
    steps = ((num_rows - starts).clamp(max=chunk) + BLOCK - 1) // BLOCK
    offsets = torch.arange(BLOCK, device=asked.device) * steps.unsqueeze(-1)
    return found.float(), (starts + blocks - starts // BLOCK).unsqueeze(-1) + offsets


def _rows_at_once(asked: Tensor) -> int:
    """Rows of one product, so that it stays in the cache: 2 or 4 MiB of a CPU, 16 MiB of a GPU in bfloat16."""
    numbers = 1 << 20 if asked.device.type == "cpu" else 1 << 23
    return min(max(numbers // len(asked), _FEWEST_ROWS), _MOST_ROWS) // BLOCK * BLOCK


def score_rows(asked: Tensor, vectors: Tensor, query: Tensor, rows: Tensor) -> Tensor:
    """Scores of [P, R] rows, each line for the query whose number stands in `query`; -inf for a row behind the last.

    Products are taken one by one, not as a matrix: in float32 whatever is set for those, and for any batch the same.
    """
    scores = torch.empty(rows.shape, device=asked.device)
    numbers = 1 << 19 if asked.device.type == "cpu" else 1 << 26  # of vectors that are held in float32
    step = max(numbers // (rows.shape[1] * vectors.shape[1]), 1)
    for start in range(0, len(rows), step):
        some = slice(start, start + step)
        wanted = rows[some].flatten().clamp(max=len(vectors) - 1).to(vectors.device)
        inside = vectors.index_select(0, wanted).to(asked.device).float().view(-1, *rows.shape[1:], vectors.shape[1])
        torch.sum(inside.mul_(asked[query[some]].unsqueeze(1)), 2, out=scores[some])
    return scores.masked_fill_(rows >= len(vectors), -torch.inf)
