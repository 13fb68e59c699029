"""Which groups of rollouts a page holds, when it cannot hold them all: a rule, the same on every call, and told.

Groups are taken in this order while they fit: first and last step of each phase, mixed groups first; then one group of
every step, the steps in an order that halves the gaps, then a second one of every step, and so on. What fits whole is
taken whole.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

from sdsearch_lightning.report.island import island
from sdsearch_lightning.report.trajectories import Record
from sdsearch_lightning.report.views import family, group_head, is_right, rollout_view

ENDS = 8
"""Groups of the first and of the last step of a phase that come before all others."""

SLACK = 64
"""Bytes of a group beside its rollouts and what they share."""

GroupKey = tuple[str, int, tuple[int, ...]]
"""Phase (greedy and sampled are one), step, instance."""


@dataclass(slots=True)
class _Group:
    size: int = 0
    """Bytes of its view as JSON, without its blocks."""
    blocks: dict[int, int] = field(default_factory=dict)
    """Bytes of each different block, by its hash: a group shows one that all its rollouts share once."""
    rollouts: int = 0
    rights: set[bool] = field(default_factory=set)
    is_judged: bool = False
    """Whether some query of it has a verdict or a credit."""

    @property
    def total(self) -> int:
        """Bytes of its view as JSON, at most."""
        return self.size + sum(self.blocks.values()) * (1 if len(self.blocks) == 1 else self.rollouts)


@dataclass(frozen=True, slots=True)
class LeftOut:
    """What a page shows of the groups of one phase, and what there is."""

    phase: str
    shown: int
    groups: int
    shown_steps: int
    steps: int


def key_of(record: Record) -> GroupKey:
    """The group that a rollout is shown in."""
    return family(record["phase"]), record["step"], tuple(record["instance_id"])


class Survey:
    """What is known of all groups after one pass over the rollouts: a few numbers each, no text."""

    def __init__(self) -> None:
        self._groups: dict[GroupKey, _Group] = defaultdict(_Group)

    def add(self, record: Record) -> None:
        """Counts a rollout in."""
        group = self._groups[key_of(record)]
        view = rollout_view(record)
        if (block := view.pop("block", None)) is not None:
            group.blocks[hash(block)] = _size(block)
        group.size += _size(view) + (0 if group.size else _size(group_head(record)) + SLACK)
        group.rollouts += 1
        group.rights.add(is_right(record))
        group.is_judged |= bool(record["credit"] or record.get("query_credit"))

    def choose(self, budget: int) -> list[GroupKey]:
        """The groups to show, in order of phase, step and instance.

        Args:
            budget: bytes that their views may take together.
        """
        chosen, left = set(), budget
        for key in self._order():
            if key not in chosen and (size := self._groups[key].total) <= left:
                chosen.add(key)
                left -= size
        return sorted(chosen)

    def left_out(self, chosen: Iterable[GroupKey]) -> list[LeftOut]:
        """Per phase, what `chosen` is of all."""
        taken = set(chosen)
        told = []
        for phase in sorted({key[0] for key in self._groups}):
            every = [key for key in self._groups if key[0] == phase]
            shown = [key for key in every if key in taken]
            told.append(LeftOut(phase, len(shown), len(every), _count_steps(shown), _count_steps(every)))
        return told

    def _order(self) -> Iterator[GroupKey]:
        """Every group, some of them twice, the most wanted first."""
        phases: dict[str, dict[int, list[GroupKey]]] = defaultdict(lambda: defaultdict(list))
        for key in sorted(self._groups, key=self._rank):
            phases[key[0]][key[1]].append(key)
        for steps in phases.values():
            for step in sorted({min(steps), max(steps)}):
                yield from steps[step][:ENDS]
        rounds = [zip_longest(*(steps[step] for step in spread(sorted(steps)))) for steps in phases.values()]
        for row in zip_longest(*rounds, fillvalue=()):  # a round: one group of every step, phase by phase
            yield from (key for key in chain.from_iterable(row) if key is not None)

    def _rank(self, key: GroupKey) -> tuple[Any, ...]:
        group = self._groups[key]
        return len(group.rights) < 2, not group.is_judged, key[2]


def spread(steps: list[int]) -> list[int]:
    """`steps` (sorted) in an order each beginning of which is spread evenly: the ends, the middle, the quarters, ...

    >>> spread([1, 2, 3, 4, 5])
    [1, 5, 3, 2, 4]
    """
    order = [*steps[:1], *steps[-1:]][: len(steps)]
    gaps = [(0, len(steps) - 1)]
    while gaps:
        halves = []
        for first, last in gaps:
            if last - first > 1:
                middle = (first + last) // 2
                order.append(steps[middle])
                halves += [(first, middle), (middle, last)]
        gaps = halves
    return order


def _count_steps(keys: Collection[GroupKey]) -> int:
    return len({step for _, step, _ in keys})


def _size(view: Any) -> int:
    return len(island(view).encode("utf-8", "replace"))
