"""What training reads: the rows of several files, how often each file is read, and what is kept for validation.

Invariant: a Mixture says which rows an epoch holds, never in which order; that is the loader's.
"""

from __future__ import annotations

import hashlib
import random
from bisect import bisect_left
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, TypeVar

from sdsearch_lightning.errors import ConfigError
from sdsearch_lightning.types import Question

Row = TypeVar("Row")


class Mixture(Sequence[Row]):
    """The rows of some files, one file after the other, and how often an epoch reads each file.

    Weight 2 reads every row twice, 0.5 every other half in turn, 1.5 all rows and such a half. The share of an epoch is
    rounded to whole rows, at least one, and is equally large in every epoch.

    Args:
        rows: the rows of all files.
        sizes: rows of each file; one file by default.
        weights: readings per row and epoch of each file, above 0; 1 by default.
    """

    def __init__(self, rows: Sequence[Row], sizes: Sequence[int] = (), weights: Sequence[float] = ()) -> None:
        self.rows = rows
        self.sizes = tuple(sizes) or (len(rows),)
        self.weights = tuple(weights) or (1.0,) * len(self.sizes)
        assert sum(self.sizes) == len(rows) and len(self.sizes) == len(self.weights), "every row is of one file"

    @classmethod
    def of(cls, rows: Sequence[Row]) -> Mixture[Row]:
        """`rows`, each read once in an epoch where they are not a Mixture already."""
        return rows if isinstance(rows, Mixture) else cls(rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    @property
    def is_even(self) -> bool:
        """Whether an epoch reads every row once."""
        return all(weight == 1 for weight in self.weights)

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows that an epoch reads, repeated ones counted each time."""
        return sum(whole * size + part for size, (whole, part) in zip(self.sizes, self._readings, strict=True))

    def indices(self, seed: int | None, epoch: int) -> Sequence[int]:
        """[rows_per_epoch] what an epoch reads, unshuffled.

        A part of a file is a window on one seeded permutation of it, which moves on by its own size in every epoch, and
        around: no row comes twice in a window, and over the epochs all come equally often.
        """
        if self.is_even:
            return range(len(self))
        read: list[int] = []
        start = 0
        for file, (size, (whole, part)) in enumerate(zip(self.sizes, self._readings, strict=True)):
            read += [*range(start, start + size)] * whole
            if part:
                permutation = random.Random(f"{seed}/{file}/part").sample(range(size), size)
                read += [start + permutation[(epoch * part + i) % size] for i in range(part)]
            start += size
        return read

    def select(self, keep: Sequence[int]) -> Mixture[Row]:
        """The rows at these rising indices, under the weights of their files."""
        ends = [bisect_left(keep, end) for end in accumulate(self.sizes, initial=0)]
        sizes = [end - start for start, end in pairwise(ends)]
        return Mixture([self.rows[index] for index in keep], sizes, self.weights)

    @property
    def _readings(self) -> list[tuple[int, int]]:
        """How often an epoch reads each file as a whole, and how many rows of it once more."""
        readings = []
        for size, weight in zip(self.sizes, self.weights, strict=True):
            whole, part = divmod(weight, 1)
            least = 1 if size and not whole else 0
            readings.append((int(whole), max(round(part * size), least)))
        return readings


def fingerprint(questions: Sequence[Question]) -> str:
    """Twelve hexadecimal digits of the questions, their answers, ids, sources and support, and their order."""
    digest = hashlib.sha256()
    for question in questions:
        digest.update(f"{question!r}{question.support or ''}\n".encode())
    return digest.hexdigest()[:12]


def hold_out(questions: Sequence[Question], count: int, seed: int) -> tuple[Mixture[Question], list[Question]]:
    """What is left for training, and `count` different questions that are kept for validation.

    No weight has a say, and every row that asks a held-out question once more is left out of both.

    Raises:
        ConfigError: nothing would be left for training.
    """
    rows = Mixture.of(questions)
    texts = [_comparable(question) for question in rows]
    if rows and count >= (different := len(set(texts))):
        raise ConfigError(
            f"data.holdout: expected fewer than {different}, the number of different training questions, found {count}."
        )
    first: dict[str, int] = {}
    for index in random.Random(f"{seed}/holdout").sample(range(len(rows)), len(rows)):
        if len(first) < count:
            first.setdefault(texts[index], index)
    kept = [index for index, text in enumerate(texts) if text not in first]
    return rows.select(kept), [rows[index] for index in sorted(first.values())]


def draw_per_source(questions: Sequence[Question], count: int) -> list[Question]:
    """At most `count` questions of each source, in their order; a source's draw depends on its own questions alone."""
    places: dict[str, list[int]] = {}
    for index, question in enumerate(questions):
        places.setdefault(question.source, []).append(index)
    kept = [
        index
        for source, indices in places.items()
        for index in random.Random(f"{source}/subset").sample(indices, min(count, len(indices)))
    ]
    return [questions[index] for index in sorted(kept)]


def overlap(training: Sequence[Question], validation: Sequence[Question]) -> list[Question]:
    """The validation questions that training asks too, whatever their case, spacing and question mark."""
    asked = {_comparable(question) for question in training}
    return [question for question in validation if _comparable(question) in asked]


def _comparable(question: Question) -> str:
    return " ".join(question.text.split()).casefold().rstrip("? ")
